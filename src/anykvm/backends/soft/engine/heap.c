/* A heap of a fixed size for each vCPU's engine: a buddy allocator. A guest decides what its engine allocates (tables of
 * pages with code, trees of translations, copies of code, TLBs), so the host must bound it. All of it depends on the
 * translations: when the heap is low the vCPU leaves the guest and forgets them (coherence.c), and the heap is empty again.
 *
 * The heap is the vCPU's from KVM_CREATE_VCPU on. Therefore KVM_RUN cannot fail for want of memory, and an engine that
 * fails while it is made or runs leaves nothing behind: its heap goes as a whole. */
#define _GNU_SOURCE
#include "heap.h"
#include "engine.h"
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define AK_HEAP_FREE 0x80u /* in orders[] */
#define HEAD ((sizeof(struct ak_heap) + AK_PAGE_SIZE - 1) & AK_PAGE_MASK)

__thread struct ak_heap *ak_heap;

static size_t offset(const struct ak_heap *h, const void *block)
{
    return (size_t)((const uint8_t *)block - h->base);
}

static uint8_t *order_of(struct ak_heap *h, size_t at)
{
    return &h->orders[at >> AK_HEAP_LEAST_ORDER];
}

static void put(struct ak_heap *h, size_t at, u32 order)
{
    struct ak_heap_block *b = (struct ak_heap_block *)(h->base + at);
    b->next = h->free[order];
    b->link = &h->free[order];
    if (b->next)
        b->next->link = &b->next;
    h->free[order] = b;
    h->filled |= 1u << order;
    *order_of(h, at) = (uint8_t)(AK_HEAP_FREE | order);
}

/* Take a block out of its list. Its bytes beyond h->high are all 0 then. */
static void take(struct ak_heap *h, struct ak_heap_block *b, u32 order)
{
    *b->link = b->next;
    if (b->next)
        b->next->link = b->link;
    *b = (struct ak_heap_block){0};
    if (!h->free[order])
        h->filled &= ~(1u << order);
}

static u32 order_for(size_t size)
{
    u32 order = AK_HEAP_LEAST_ORDER;
    while (((size_t)1 << order) < size)
        order++;
    return order;
}

/* The heap is low: have the vCPU forget its translations before it runs on. */
void ak_heap_is_low(struct ak_heap *h)
{
    if (h->low || !h->vcpu)
        return;
    h->low = 1;
    ak_kick(h->vcpu);
}

static void *alloc(struct ak_heap *h, size_t size, bool zero)
{
    if (size > AK_HEAP_SIZE)
        return NULL;
    u32 order = order_for(size), from;
    u32 fit = h->filled & ~((1u << order) - 1);
    if (!fit)
        return NULL;
    from = (u32)__builtin_ctz(fit);
    struct ak_heap_block *b = h->free[from];
    size_t at = offset(h, b), end = at + ((size_t)1 << order);
    take(h, b, from);
    while (from > order) /* the lower half goes on, so that high grows late */
        from--, put(h, at + ((size_t)1 << from), from);
    *order_of(h, at) = (uint8_t)order;
    if (zero && at < h->high)
        memset(b, 0, (end < h->high ? end : h->high) - at);
    if (end > h->high)
        h->high = end;
    if (!(h->filled >> AK_HEAP_BIG_ORDER))
        ak_heap_is_low(h);
    return b;
}

/* Memory aligned to its size, at least to 64 bytes; NULL: there is none. */
void *ak_heap_alloc(struct ak_heap *h, size_t size)
{
    return alloc(h, size, false);
}

void *ak_heap_zalloc(struct ak_heap *h, size_t size)
{
    return alloc(h, size, true);
}

bool ak_heap_has(const struct ak_heap *h, const void *block)
{
    return h && offset(h, block) < AK_HEAP_SIZE;
}

void ak_heap_free(struct ak_heap *h, void *block)
{
    if (!block)
        return;
    size_t at = offset(h, block);
    u32 order = *order_of(h, at);
    for (; order < AK_HEAP_ORDERS - 1; order++) {
        size_t buddy = at ^ ((size_t)1 << order);
        if (*order_of(h, buddy) != (AK_HEAP_FREE | order))
            break;
        take(h, (struct ak_heap_block *)(h->base + buddy), order);
        *order_of(h, buddy) = 0;
        *order_of(h, at) = 0;
        at &= ~((size_t)1 << order);
    }
    put(h, at, order);
}

/* realloc(): NULL leaves the block as it is. */
void *ak_heap_resize(struct ak_heap *h, void *block, size_t size)
{
    size_t room = (size_t)1 << *order_of(h, offset(h, block));
    if (size <= room)
        return block;
    void *grown = ak_heap_alloc(h, size);
    if (!grown)
        return NULL;
    memcpy(grown, block, room);
    ak_heap_free(h, block);
    return grown;
}

/* All memory a vCPU's engine will ever have. 0 or -ENOMEM. The pages themselves are the host's until they are touched. */
int ak_heap_create(struct ak_heap **result)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    const int data = PROT_READ | PROT_WRITE;
    struct ak_heap *h = ak_injected_failure() ? MAP_FAILED : mmap(NULL, HEAD + AK_HEAP_SIZE, data, flags, -1, 0);
    if (h == MAP_FAILED)
        return -ENOMEM;
    void *code = ak_injected_failure() ? MAP_FAILED : mmap(NULL, AK_CODE_SIZE, data | PROT_EXEC, flags, -1, 0);
    if (code == MAP_FAILED) {
        munmap(h, HEAD + AK_HEAP_SIZE);
        return -ENOMEM;
    }
    h->base = (uint8_t *)h + HEAD;
    h->code = code;
    put(h, 0, AK_HEAP_ORDERS - 1);
    *result = h;
    return 0;
}

/* Everything the engine had goes at once, whatever state it is in. */
void ak_heap_destroy(struct ak_heap *h)
{
    munmap(h->code, AK_CODE_SIZE);
    munmap(h, HEAD + AK_HEAP_SIZE);
}
