/* Translated code follows memory. The engine notices stores that hit its own blocks only through the same mapping; here
 * every host page with translated code is remembered with a copy of its bytes, so that a store through another mapping
 * stays on the slow path, and a change made from outside (the VMM, a device, another vCPU) is found on entry. */
#include "engine_internal.h"
#include <string.h>

#define CODE_PAGES_COMPARED 16 /* on entry; with more, translations are looked up anew and compared when met */
#define CODE_PAGES_MOST 16384 /* with more, all translations are forgotten */
#define CODE_ROOM_LEAST 64

struct code_page {
    u64 hva;         /* 0: free */
    u8 *copy;        /* of the bytes first..last; NULL: there was no room, the page counts as changed when it is compared */
    u32 first, last; /* the bytes that were translated, and those between: [first, last) */
};

static u32 hash(const struct ak_vcpu *v, u64 hva)
{
    return (u32)((hva >> 12) * 0x9e3779b97f4a7c15ull >> 32) & (v->code_room - 1);
}

static struct code_page *find(const struct ak_vcpu *v, u64 hva)
{
    if (!v->code_room)
        return NULL;
    for (u32 i = hash(v, hva);; i = (i + 1) & (v->code_room - 1)) {
        if (v->code_pages[i].hva == hva)
            return &v->code_pages[i];
        if (!v->code_pages[i].hva)
            return NULL;
    }
}

static struct code_page *put(struct ak_vcpu *v, struct code_page page)
{
    u32 i = hash(v, page.hva);
    while (v->code_pages[i].hva)
        i = (i + 1) & (v->code_room - 1);
    v->code_pages[i] = page;
    return &v->code_pages[i];
}

/* Room for one page more. */
static bool grow(struct ak_vcpu *v)
{
    struct code_page *old = v->code_pages;
    u32 room = v->code_room, more = room ? room * 2 : CODE_ROOM_LEAST;
    if (v->code_count * 2 < room)
        return true;
    struct code_page *fresh = v->code_count < CODE_PAGES_MOST ? ak_heap_zalloc(v->heap, more * sizeof *fresh) : NULL;
    if (!fresh)
        return false;
    v->code_room = more;
    v->code_pages = fresh;
    for (u32 i = 0; i < room; i++)
        if (old[i].hva)
            put(v, old[i]);
    ak_heap_free(v->heap, old);
    return true;
}

/* A block is about to be translated from this page (its first, or the one it goes on to). The copy is taken before the
 * translator reads: one taken later might have bytes that another vCPU wrote in between, and the block would pass for new. */
void ak_code_read(struct ak_vcpu *v, u64 hva, bool goes_on)
{
    struct ak_code_copy *c = &v->code_copy[goes_on];
    if (!goes_on)
        v->code_copy[1].hva = 0;
    c->first = c->last = 0;
    c->hva = ak_copy_in(c->bytes, hva, AK_PAGE_SIZE) ? 0 : hva;
}

static const struct ak_code_copy *before_translation(const struct ak_vcpu *v, u64 hva)
{
    for (int i = 0; i < 2; i++)
        if (v->code_copy[i].hva == hva)
            return &v->code_copy[i];
    return NULL;
}

/* The bytes [first, last) of a page are translated now. What was copied earlier stays: older translations are of that. What is
 * copied is only what was translated, so that a guest with a little code in each page costs little. */
static void cover(struct ak_vcpu *v, struct code_page *p, u32 first, u32 last)
{
    const struct ak_code_copy *c = before_translation(v, p->hva);
    bool known = p->last > p->first;
    if (known && first >= p->first && last <= p->last)
        return;
    if (known) {
        first = first < p->first ? first : p->first;
        last = last > p->last ? last : p->last;
    }
    u8 *copy = c && (p->copy || !known) ? ak_heap_alloc(v->heap, last - first) : NULL;
    if (copy) {
        memcpy(copy, c->bytes + first, last - first);
        if (known)
            memcpy(copy + (p->first - first), p->copy, p->last - p->first);
    }
    ak_heap_free(v->heap, p->copy);
    p->copy = copy;
    p->first = first;
    p->last = last;
}

/* The engine translated its first block of a page: stores to it must be seen from now on. */
void tlb_protect_code_x86_64(struct uc_struct *uc, u64 ram_addr)
{
    struct ak_vcpu *v = ak_current;
    u64 hva = (ram_addr & AK_PAGE_MASK) + AK_HOST_WINDOW_BASE;
    (void)uc;
    if (find(v, hva))
        return;
    tlb_reset_dirty_x86_64(v->cpu, hva, AK_PAGE_SIZE);
    if (!grow(v)) {
        ak_heap_is_low(v->heap); /* the block that was just translated is forgotten with the rest when it has run */
        return;
    }
    const struct ak_code_copy *c = before_translation(v, hva);
    struct code_page *p = put(v, (struct code_page){.hva = hva});
    v->code_count++;
    if (c && c->last > c->first)
        cover(v, p, c->first, c->last);
    else
        cover(v, p, 0, AK_PAGE_SIZE);
}

static void forget(struct ak_vcpu *v, u64 hva)
{
    struct code_page *p = find(v, hva);
    if (!p)
        return;
    ak_heap_free(v->heap, p->copy);
    *p = (struct code_page){0};
    v->code_count--;
    u32 i = (u32)(p - v->code_pages); /* close the gap */
    for (u32 j = (i + 1) & (v->code_room - 1); v->code_pages[j].hva; j = (j + 1) & (v->code_room - 1)) {
        struct code_page moved = v->code_pages[j];
        v->code_pages[j] = (struct code_page){0};
        put(v, moved);
    }
}

/* The last block of a page is gone. */
void tlb_unprotect_code_x86_64(struct uc_struct *uc, u64 ram_addr)
{
    (void)uc;
    forget(ak_current, (ram_addr & AK_PAGE_MASK) + AK_HOST_WINDOW_BASE);
}

static void set_dirty_entry(struct ak_vcpu *v, u8 *entry, u64 va)
{
    u64 *write = (u64 *)(entry + TLB_ENTRY_WRITE), addend = *(u64 *)(entry + TLB_ENTRY_ADDEND);
    const u64 notdirty = 1u << 10;
    if (*write == (va | notdirty) && !find(v, va + addend))
        *write = va;
}

/* Stores to a page become fast, unless it has translated code. */
void tlb_set_dirty_x86_64(struct CPUState *cpu, u64 va)
{
    struct ak_vcpu *v = ak_current;
    u8 *base = (u8 *)cpu;
    va &= AK_PAGE_MASK;
    for (int mode = 0; mode < TLB_MODES; mode++) {
        u8 *fast = base + TLB_FAST_IN_CPU + mode * TLB_FAST_SIZE;
        u64 mask = *(u64 *)(fast + TLB_FAST_MASK);
        set_dirty_entry(v, *(u8 **)(fast + TLB_FAST_TABLE) + ((va >> 12) & (mask >> TLB_ENTRY_BITS)) * TLB_ENTRY_SIZE, va);
        u8 *victims = base + TLB_DESC_IN_CPU + mode * TLB_DESC_SIZE + TLB_DESC_VICTIMS;
        for (int i = 0; i < TLB_VICTIMS; i++)
            set_dirty_entry(v, victims + i * TLB_ENTRY_SIZE, va);
    }
}

static bool unchanged(const struct code_page *p)
{
    return p->copy && ak_host_equal(p->hva + p->first, p->copy, p->last - p->first);
}

static void translated(struct ak_vcpu *v, struct ak_code_copy *c, u64 page, u32 first, u32 last)
{
    struct code_page *p = find(v, page);
    if (c->hva == page)
        c->first = first, c->last = last;
    if (p)
        cover(v, p, first, last);
}

/* A block was translated from these bytes of a page; it is linked to the page next, or the page is known already. */
void ak_code_span(struct ak_vcpu *v, u64 hva, u32 size)
{
    u32 first = (u32)(hva & ~AK_PAGE_MASK), last = first + size < AK_PAGE_SIZE ? first + size : AK_PAGE_SIZE;
    translated(v, &v->code_copy[0], hva & AK_PAGE_MASK, first, last);
}

/* The same block goes on at the start of this page. */
void ak_code_span_rest(struct ak_vcpu *v, u64 hva, u32 size)
{
    translated(v, &v->code_copy[1], hva & AK_PAGE_MASK, 0, size);
}

static void invalidate(struct ak_vcpu *v, u64 hva)
{
    tb_invalidate_phys_range_x86_64(v->uc, hva - AK_HOST_WINDOW_BASE, hva - AK_HOST_WINDOW_BASE + AK_PAGE_SIZE);
    forget(v, hva);
}

/* On entry: somebody may have written code since. */
void ak_check_code(struct ak_vcpu *v)
{
    if (v->code_count > CODE_PAGES_COMPARED) {
        tlb_flush_x86_64(v->cpu); /* pages are compared when they are fetched from again */
        return;
    }
    u64 stale[CODE_PAGES_COMPARED];
    u32 n = 0;
    for (u32 i = 0, left = v->code_count; left; i++)
        if (v->code_pages[i].hva) {
            left--;
            if (!unchanged(&v->code_pages[i]))
                stale[n++] = v->code_pages[i].hva;
        }
    while (n)
        invalidate(v, stale[--n]);
}

/* At a fetch fill, with many code pages. */
void ak_check_code_page(struct ak_vcpu *v, u64 hva)
{
    const struct code_page *p = v->code_count > CODE_PAGES_COMPARED ? find(v, hva) : NULL;
    if (p && !unchanged(p))
        invalidate(v, hva);
}

/* The engine has dropped all translations (tb_flush()), because its buffer was full or we asked for it. */
extern void __real_tcg_region_reset_all_x86_64(struct TCGContext *tcg);
void __wrap_tcg_region_reset_all_x86_64(struct TCGContext *tcg)
{
    struct ak_vcpu *v = ak_current;
    __real_tcg_region_reset_all_x86_64(tcg);
    if (!v) /* it is being made */
        return;
    for (u32 i = 0; i < v->code_room; i++)
        ak_heap_free(v->heap, v->code_pages[i].copy);
    ak_heap_free(v->heap, v->code_pages);
    v->code_pages = NULL;
    v->code_room = v->code_count = 0;
}

/* The heap is low, or there are too many pages with code: forget all translations, and the engine's tables of pages too, which
 * it would keep. */
void ak_forget_code(struct ak_vcpu *v)
{
    tb_flush_x86_64(v->cpu);
    tb_cleanup_x86_64(v->uc);
    v->heap->low = 0;
}
