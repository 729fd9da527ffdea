/* Translated code follows memory. The engine notices stores that hit its own blocks only through the same mapping; here
 * every host page with translated code is remembered with a copy of its bytes, so that a store through another mapping
 * stays on the slow path, and a change made from outside (the VMM, a device, another vCPU) is found on entry. */
#include "engine_internal.h"
#include <stdlib.h>
#include <string.h>

#define CODE_PAGES_COMPARED 16 /* on entry; with more, translations are looked up anew and compared when met */

struct code_page {
    u64 hva;         /* 0: free */
    u8 *copy;
    u32 first, last; /* the bytes that were translated: [first, last) */
};

static u32 hash(const struct ak_vcpu *v, u64 hva)
{
    return (u32)((hva >> 12) * 0x9e3779b97f4a7c15ull >> 32) & (v->code_room - 1);
}

static struct code_page *table(const struct ak_vcpu *v)
{
    return (struct code_page *)v->code_pages;
}

static struct code_page *find(const struct ak_vcpu *v, u64 hva)
{
    if (!v->code_room)
        return NULL;
    for (u32 i = hash(v, hva);; i = (i + 1) & (v->code_room - 1)) {
        if (table(v)[i].hva == hva)
            return &table(v)[i];
        if (!table(v)[i].hva)
            return NULL;
    }
}

static void put(struct ak_vcpu *v, struct code_page page)
{
    u32 i = hash(v, page.hva);
    while (table(v)[i].hva)
        i = (i + 1) & (v->code_room - 1);
    table(v)[i] = page;
}

static bool grow(struct ak_vcpu *v)
{
    struct code_page *old = table(v);
    u32 room = v->code_room;
    struct code_page *fresh = calloc(room ? room * 2 : 64, sizeof *fresh);
    if (!fresh)
        return false;
    v->code_room = room ? room * 2 : 64;
    v->code_pages = (u64 *)fresh;
    for (u32 i = 0; i < room; i++)
        if (old[i].hva)
            put(v, old[i]);
    free(old);
    return true;
}

/* A block is about to be translated from this page (its first, or the one it goes on to). The copy is taken before the
 * translator reads: one taken later might have bytes that another vCPU wrote in between, and the block would pass for new. */
void ak_code_read(struct ak_vcpu *v, u64 hva, bool goes_on)
{
    struct ak_code_copy *c = &v->code_copy[goes_on];
    if (!goes_on)
        v->code_copy[1].hva = 0;
    c->hva = 0;
    if (find(v, hva) || (!c->bytes && !(c->bytes = malloc(AK_PAGE_SIZE))))
        return;
    if (!ak_copy_in(c->bytes, hva, AK_PAGE_SIZE))
        c->hva = hva;
}

/* The copy becomes the page's. Without one (no memory left), the page counts as changed whenever it is compared. */
static u8 *take_copy(struct ak_vcpu *v, u64 hva)
{
    for (int i = 0; i < 2; i++)
        if (v->code_copy[i].hva == hva) {
            u8 *bytes = v->code_copy[i].bytes;
            v->code_copy[i] = (struct ak_code_copy){0};
            return bytes;
        }
    return NULL;
}

/* The engine translated its first block of a page: stores to it must be seen from now on. */
void tlb_protect_code_x86_64(struct uc_struct *uc, u64 ram_addr)
{
    struct ak_vcpu *v = ak_current;
    u64 hva = (ram_addr & AK_PAGE_MASK) + AK_HOST_WINDOW_BASE;
    (void)uc;
    if (find(v, hva))
        return;
    if (v->code_count * 2 >= v->code_room && !grow(v))
        return;
    struct code_page page = {.hva = hva, .copy = take_copy(v, hva), .last = AK_PAGE_SIZE};
    if (v->span_hva == hva)
        page.first = v->span_first, page.last = v->span_last;
    put(v, page);
    v->code_count++;
    tlb_reset_dirty_x86_64(v->cpu, hva, AK_PAGE_SIZE);
}

static void forget(struct ak_vcpu *v, u64 hva)
{
    struct code_page *p = find(v, hva);
    if (!p)
        return;
    free(p->copy);
    *p = (struct code_page){0};
    v->code_count--;
    u32 i = (u32)(p - table(v)); /* close the gap */
    for (u32 j = (i + 1) & (v->code_room - 1); table(v)[j].hva; j = (j + 1) & (v->code_room - 1)) {
        struct code_page moved = table(v)[j];
        table(v)[j] = (struct code_page){0};
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
    return p->copy && ak_host_equal(p->hva + p->first, p->copy + p->first, p->last - p->first);
}

static void widen(struct code_page *p, u32 first, u32 last)
{
    p->first = first < p->first ? first : p->first;
    p->last = last > p->last ? last : p->last;
}

/* A block was translated from these bytes of a page; it is linked to the page next, or the page is known already. */
void ak_code_span(struct ak_vcpu *v, u64 hva, u32 size)
{
    u32 first = (u32)(hva & ~AK_PAGE_MASK), last = first + size < AK_PAGE_SIZE ? first + size : AK_PAGE_SIZE;
    v->span_hva = hva & AK_PAGE_MASK;
    struct code_page *p = find(v, v->span_hva);
    if (!p) {
        v->span_first = first, v->span_last = last;
        return;
    }
    widen(p, first, last);
}

/* The same block goes on at the start of this page. */
void ak_code_span_rest(struct ak_vcpu *v, u64 hva, u32 size)
{
    struct code_page *p = find(v, hva & AK_PAGE_MASK);
    if (p)
        widen(p, 0, size);
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
        if (table(v)[i].hva) {
            left--;
            if (!unchanged(&table(v)[i]))
                stale[n++] = table(v)[i].hva;
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

void ak_code_pages_free(struct ak_vcpu *v)
{
    for (u32 i = 0; i < v->code_room; i++)
        free(table(v)[i].copy);
    for (int i = 0; i < 2; i++)
        free(v->code_copy[i].bytes);
    free(v->code_pages);
    v->code_pages = NULL;
    v->code_room = v->code_count = 0;
}
