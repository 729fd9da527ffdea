/* Dirty tracking: what the guest wrote, page by page. A TLB entry allows writes only after a write went through a fill,
 * which marks the page first; whatever forgets marks does so while no vCPU is in guest mode and flushes all TLBs. So a
 * page that a TLB lets the guest write is marked, and the first write after a harvest is seen here again.
 *
 * With dirty rings the bitmap is ours alone: a set bit is what a writable SPTE is to KVM, a page that was pushed and not
 * reset since, so that it is pushed once. Sources: km:mark_page_dirty_in_slot(), dr:kvm_dirty_ring_*(), ABI.md 4.6. */
#include "engine.h"
#include <errno.h>
#include <stdlib.h>

#define DIRTY_GFN_F_DIRTY 1u
#define DIRTY_GFN_F_RESET 2u

struct ak_dirty_gfn { /* struct kvm_dirty_gfn: shared with user space */
    u32 flags, slot;
    u64 offset;
};

/* -- marking, by a vCPU in guest mode ------------------------------------------------------------------------------- */

static u32 ring_used(const struct ak_dirty_ring *ring)
{
    return __atomic_load_n(&ring->dirty_index, __ATOMIC_RELAXED) - __atomic_load_n(&ring->reset_index, __ATOMIC_RELAXED);
}

/* kvm_dirty_ring_soft_full(): row 21, the guest is not to be entered. */
bool ak_dirty_ring_full(const struct ak_vcpu *v)
{
    return v->ring.size && ring_used(&v->ring) >= v->ring.size - AK_DIRTY_RING_RESERVED;
}

/* kvm_dirty_ring_push(). The guest leaves at the next boundary once the ring is at its soft limit. */
static void ring_push(struct ak_vcpu *v, u32 slot, u64 offset)
{
    struct ak_dirty_ring *ring = &v->ring;
    struct ak_dirty_gfn *entry = &ring->gfns[ring->dirty_index & (ring->size - 1)];
    if (ring_used(ring) >= ring->size)
        return; /* never: the reserve is larger than what can come between two looks at the limit */
    entry->slot = slot;
    entry->offset = offset;
    __atomic_store_n(&entry->flags, DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
    __atomic_store_n(&ring->dirty_index, ring->dirty_index + 1, __ATOMIC_RELAXED);
    if (ak_dirty_ring_full(v))
        ak_kick(v);
}

/* mark_page_dirty_in_slot(), before the store is done. */
void ak_mark_page_dirty(struct ak_vcpu *v, struct ak_slot *slot, u64 gfn)
{
    u64 at = gfn - slot->base_gfn, bit = 1ull << (at % 64);
    if (!slot->dirty_bitmap || (__atomic_load_n(&slot->dirty_bitmap[at / 64], __ATOMIC_RELAXED) & bit))
        return;
    u64 before = __atomic_fetch_or(&slot->dirty_bitmap[at / 64], bit, __ATOMIC_SEQ_CST);
    if (v->ring.size && !(before & bit))
        ring_push(v, slot->id, at);
}

/* In a TLB fill, before the access is done: if it filled the ring, leave with RIP at its instruction, as KVM does after
 * the fault that pushed the entry. Where an instruction cannot be left half way, the kick ends the run soon enough. */
void ak_dirty_ring_check(struct ak_vcpu *v, uintptr_t retaddr)
{
    if (ak_dirty_ring_full(v) && v->emulation == AK_NATIVE && !v->delivering && !v->stopping)
        ak_leave(v, AK_EXIT_DIRTY_FULL, retaddr);
}

/* -- the bitmaps: the caller holds the VM's slots_lock -------------------------------------------------------------- */

static bool any(const u64 *bitmap, const u64 *mask, u64 words)
{
    for (u64 i = 0; i < words; i++)
        if (__atomic_load_n(&bitmap[i], __ATOMIC_RELAXED) & (mask ? mask[i] : ~0ull))
            return true;
    return false;
}

/* kvm_get_dirty_log_protect() of a slot's bitmap: copy it to user space at `to`, and forget it unless user space does
 * that itself (keep). 0, -EFAULT or -ENOMEM. With no page marked no vCPU is disturbed: one that is marked from now on
 * belongs to the next harvest. */
int ak_get_dirty_log(struct ak_vm *vm, u64 *bitmap, u64 npages, u64 to, bool keep)
{
    u64 words = (npages + 63) / 64, *copy = ak_calloc(words, sizeof *copy);
    if (!copy)
        return -ENOMEM;
    if (keep) {
        for (u64 i = 0; i < words; i++)
            copy[i] = __atomic_load_n(&bitmap[i], __ATOMIC_SEQ_CST);
    } else if (any(bitmap, NULL, words)) {
        ak_vm_pause(vm);
        for (u64 i = 0; i < words; i++)
            if (bitmap[i]) {
                copy[i] = bitmap[i];
                bitmap[i] = 0;
            }
        ak_vm_resume(vm, true);
    }
    int r = ak_copy_out(to, copy, words * sizeof *copy);
    free(copy);
    return r;
}

/* kvm_clear_dirty_log_protect(), its range checked: forget the pages set in user space's bitmap at `from`, whose bit 0
 * is page `first`. 0, -EFAULT or -ENOMEM. */
int ak_clear_dirty_log(struct ak_vm *vm, u64 *bitmap, u64 first, u32 npages, u64 from)
{
    u64 words = ((u64)npages + 63) / 64, *mask = ak_calloc(words + 1, sizeof *mask);
    if (!mask)
        return -ENOMEM;
    bitmap += first / 64;
    int r = words ? ak_copy_in(mask, from, words * sizeof *mask) : 0;
    if (!r && any(bitmap, mask, words)) {
        ak_vm_pause(vm);
        for (u64 i = 0; i < words; i++)
            if (bitmap[i] & mask[i])
                bitmap[i] &= ~mask[i];
        ak_vm_resume(vm, true);
    }
    free(mask);
    return r;
}

/* -- the rings ------------------------------------------------------------------------------------------------------ */

/* kvm_dirty_ring_alloc(): the vCPU's ring is at `gfns`, which user space maps too. Before the vCPU runs. */
void ak_dirty_ring_setup(struct ak_vcpu *v, struct ak_dirty_gfn *gfns, u32 entries)
{
    v->ring = (struct ak_dirty_ring){.gfns = gfns, .size = entries};
}

static bool harvested(const struct ak_dirty_ring *ring)
{
    const struct ak_dirty_gfn *entry = ring->size ? &ring->gfns[ring->reset_index & (ring->size - 1)] : NULL;
    return entry && (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & DIRTY_GFN_F_RESET);
}

/* kvm_reset_dirty_gfn(): a slot that is gone, or a page it does not have, is passed over; user space may write anything
 * into an entry. */
static void rearm(struct ak_vm *vm, u32 id, u64 offset)
{
    struct ak_slot *slot = id < vm->ids_room ? vm->slots_by_id[id] : NULL;
    if (slot && slot->dirty_bitmap && offset < slot->npages)
        slot->dirty_bitmap[offset / 64] &= ~(1ull << (offset % 64));
}

/* KVM_RESET_DIRTY_RINGS: take back the entries user space has harvested, and see their pages' next writes again. Returns
 * how many. */
int ak_reset_dirty_rings(struct ak_vm *vm)
{
    bool some = false;
    int count = 0;
    for (struct ak_vcpu *v = vm->vcpus; v; v = v->next)
        some |= harvested(&v->ring);
    if (!some)
        return 0;
    ak_vm_pause(vm);
    for (struct ak_vcpu *v = vm->vcpus; v; v = v->next)
        for (u32 n = 0; n < v->ring.size && harvested(&v->ring); n++) {
            struct ak_dirty_gfn *entry = &v->ring.gfns[v->ring.reset_index & (v->ring.size - 1)];
            u32 slot = __atomic_load_n(&entry->slot, __ATOMIC_RELAXED);
            u64 offset = __atomic_load_n(&entry->offset, __ATOMIC_RELAXED);
            __atomic_store_n(&entry->flags, 0, __ATOMIC_RELEASE);
            __atomic_store_n(&v->ring.reset_index, v->ring.reset_index + 1, __ATOMIC_RELAXED);
            rearm(vm, slot, offset);
            count++;
        }
    ak_vm_resume(vm, true);
    return count;
}
