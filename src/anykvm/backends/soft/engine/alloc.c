/* What the engine calls instead of the C library (setup.py: ENGINE_CALLS): memory comes from its vCPU's heap, and where it
 * would end the process (abort(), exit(), a failed assertion) the vCPU ends instead. */
#define _GNU_SOURCE
#include "heap.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

/* The engine cannot go on. ak_vcpu_create() fails then, and KVM_RUN ends with KVM_EXIT_INTERNAL_ERROR. */
void ak_engine_failed(void)
{
    if (!ak_heap || !ak_heap->landing)
        abort(); /* it was not told to do anything */
    siglongjmp(*ak_heap->landing, 1);
}

/* The tests' fault injection: how many more allocations of the engine's work; 0: all. */
static uint32_t allocations_left;

void ak_fail_engine_allocation(uint32_t after)
{
    allocations_left = after;
}

static bool injected_failure(void)
{
    return __builtin_expect(allocations_left != 0, 0) && !--allocations_left;
}

static void *try_alloc(size_t size, bool zero)
{
    if (!ak_heap)
        return zero ? calloc(1, size) : malloc(size);
    if (injected_failure())
        return NULL;
    return zero ? ak_heap_zalloc(ak_heap, size) : ak_heap_alloc(ak_heap, size);
}

/* The engine does not look whether it got memory. */
static void *must(void *block)
{
    if (!block)
        ak_engine_failed();
    return block;
}

void *ak_engine_malloc(size_t size)
{
    return must(try_alloc(size, false));
}

void *ak_engine_calloc(size_t count, size_t size)
{
    size_t bytes;
    return must(__builtin_mul_overflow(count, size, &bytes) ? NULL : try_alloc(bytes, true));
}

void ak_engine_free(void *block)
{
    if (ak_heap_has(ak_heap, block))
        ak_heap_free(ak_heap, block);
    else
        free(block);
}

void *ak_engine_realloc(void *block, size_t size)
{
    if (!block)
        return ak_engine_malloc(size);
    return must(ak_heap_has(ak_heap, block) ? ak_heap_resize(ak_heap, block, size) : realloc(block, size));
}

/* Blocks of the heap are aligned to their size, of which the engine asks for at least as much as for alignment. */
int ak_engine_posix_memalign(void **block, size_t alignment, size_t size)
{
    if (!ak_heap)
        return posix_memalign(block, alignment, size);
    *block = must(try_alloc(size > alignment ? size : alignment, false));
    return 0;
}

char *ak_engine_strdup(const char *text)
{
    size_t size = strlen(text) + 1;
    return memcpy(ak_engine_malloc(size), text, size);
}

int ak_engine_vasprintf(char **text, const char *format, va_list arguments)
{
    va_list again;
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (length < 0)
        return -1;
    *text = ak_engine_malloc((size_t)length + 1);
    return vsnprintf(*text, (size_t)length + 1, format, arguments);
}

/* The one thing that the engine maps is the buffer for translated code, which is there already. */
void *ak_engine_mmap(void *address, size_t size, int prot, int flags, int fd, off_t at)
{
    if (!ak_heap)
        return mmap(address, size, prot, flags, fd, at);
    if (ak_heap->code_taken || size != AK_CODE_SIZE)
        ak_engine_failed();
    ak_heap->code_taken = 1;
    return ak_heap->code;
}

void ak_engine_abort(void)
{
    ak_engine_failed();
}

void ak_engine_exit(int status)
{
    (void)status;
    ak_engine_failed();
}

/* Replaced: tables of a TLB, the only ones asked for by this function. The engine makes them larger for a guest that uses many
 * pages, up to 1 GiB, and smaller if it gets no memory. 32,768 entries of 64 bytes reach as far as is of use. */
#define TLB_TABLE_MOST (2u << 20)

void *g_try_malloc_n(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > TLB_TABLE_MOST)
        return NULL;
    return try_alloc(bytes, false);
}

/* Replaced: random numbers for RDRAND and RDSEED. The engine's own generator belongs to a thread and would be allocated on the
 * heap of one vCPU. */
int qemu_guest_getrandom(void *to, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = getrandom((char *)to + done, size - done, 0);
        if (n < 0 && errno != EINTR)
            return -1;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

void qemu_guest_getrandom_nofail(void *to, size_t size)
{
    if (qemu_guest_getrandom(to, size))
        ak_engine_failed();
}
