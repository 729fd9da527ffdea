/* Dirty tracking: what the guest wrote, page by page. The TLB allows a write only after a write went through a fill, and
 * every change to the log flushes all TLBs, so each first write to a page is seen here. */
#include "engine.h"

/* mark_page_dirty_in_slot(). */
void ak_mark_page_dirty(struct ak_vcpu *v, struct ak_slot *slot, u64 gfn)
{
    u64 at = gfn - slot->base_gfn;
    (void)v;
    if (slot->dirty_bitmap)
        __atomic_or_fetch(&slot->dirty_bitmap[at / 64], 1ull << (at % 64), __ATOMIC_RELAXED);
}
