/* malloc() and its kin for everything but the engines, so that tests can make the n-th of them fail. What is got here is
 * returned by free(). */
#include "memory.h"
#include <errno.h>
#include <stdlib.h>

static uint32_t fails_in; /* 0: none */

/* For tests: the nth allocation from now on fails, 1 is the next; 0: none does. */
void ak_fail_allocation(uint32_t nth)
{
    __atomic_store_n(&fails_in, nth, __ATOMIC_SEQ_CST);
}

/* Whether the one that is about to be made is to fail. */
bool ak_injected_failure(void)
{
    if (__builtin_expect(!__atomic_load_n(&fails_in, __ATOMIC_RELAXED), 1) || __atomic_sub_fetch(&fails_in, 1, __ATOMIC_SEQ_CST))
        return false;
    errno = ENOMEM;
    return true;
}

void *ak_malloc(size_t size)
{
    return ak_injected_failure() ? NULL : malloc(size);
}

void *ak_calloc(size_t count, size_t size)
{
    return ak_injected_failure() ? NULL : calloc(count, size);
}

void *ak_realloc(void *block, size_t size)
{
    return ak_injected_failure() ? NULL : realloc(block, size);
}
