/* Memory attributes: which guest frames are private. Sorted ranges that neither touch nor overlap, so that what a
 * conversion costs depends on how often privacy changes along the guest's memory, never on how much memory there is.
 * Changed only while no vCPU is in guest mode: a TLB fill reads them without a lock. Source: kvm_main.c. */
#include "engine.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The first range that ends at this frame or later. */
static u32 position(const struct ak_vm *vm, u64 gfn)
{
    u32 low = 0, high = vm->nprivate;
    while (low < high) {
        u32 mid = (low + high) / 2;
        if (vm->private_ranges[mid].last < gfn)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

/* kvm_mem_is_private(). */
bool ak_gfn_is_private(const struct ak_vm *vm, u64 gfn)
{
    u32 at = position(vm, gfn);
    return at < vm->nprivate && vm->private_ranges[at].first <= gfn;
}

/* kvm_range_has_memory_attributes(): all of the frames are so already. */
static bool uniform(const struct ak_vm *vm, u64 first, u64 last, bool is_private)
{
    u32 at = position(vm, first);
    const struct ak_range *r = at < vm->nprivate ? &vm->private_ranges[at] : NULL;
    if (is_private)
        return r && r->first <= first && r->last >= last;
    return !r || r->first > last;
}

static bool reserve(struct ak_vm *vm, u32 more)
{
    if (vm->nprivate + more <= vm->private_room)
        return true;
    u32 room = vm->private_room ? vm->private_room * 2 : 16;
    struct ak_range *grown = ak_realloc(vm->private_ranges, room * sizeof *grown);
    if (!grown)
        return false;
    vm->private_ranges = grown;
    vm->private_room = room;
    return true;
}

/* Put n ranges in the place of those from..to-1. */
static void splice(struct ak_vm *vm, u32 from, u32 to, const struct ak_range *new, u32 n)
{
    memmove(vm->private_ranges + from + n, vm->private_ranges + to, (vm->nprivate - to) * sizeof *new);
    memcpy(vm->private_ranges + from, new, n * sizeof *new);
    vm->nprivate = vm->nprivate - (to - from) + n;
}

static void make_private(struct ak_vm *vm, u64 first, u64 last)
{
    struct ak_range whole = {first, last};
    u32 from = position(vm, first ? first - 1 : 0), to = from; /* one that ends just before it is joined */
    while (to < vm->nprivate && vm->private_ranges[to].first <= last + 1)
        to++;
    if (from < to) {
        const struct ak_range *low = &vm->private_ranges[from], *high = &vm->private_ranges[to - 1];
        whole.first = low->first < first ? low->first : first;
        whole.last = high->last > last ? high->last : last;
    }
    splice(vm, from, to, &whole, 1);
}

static void make_shared(struct ak_vm *vm, u64 first, u64 last)
{
    struct ak_range rest[2];
    u32 from = position(vm, first), to = from, n = 0;
    while (to < vm->nprivate && vm->private_ranges[to].first <= last)
        to++;
    if (from == to)
        return;
    const struct ak_range *low = &vm->private_ranges[from], *high = &vm->private_ranges[to - 1];
    if (low->first < first)
        rest[n++] = (struct ak_range){low->first, first - 1};
    if (high->last > last)
        rest[n++] = (struct ak_range){last + 1, high->last};
    splice(vm, from, to, rest, n);
}

/* kvm_vm_set_mem_attributes() of npages (> 0) frames, one caller at a time: in force for every vCPU when it returns.
 * 0 or -ENOMEM, and then nothing has changed. */
int ak_set_memory_attributes(struct ak_vm *vm, u64 gfn, u64 npages, bool is_private)
{
    u64 last = gfn + npages - 1;
    int r = 0;
    if (uniform(vm, gfn, last, is_private))
        return 0;
    ak_vm_pause(vm);
    if (!reserve(vm, 1))
        r = -ENOMEM;
    else if (is_private)
        make_private(vm, gfn, last);
    else
        make_shared(vm, gfn, last);
    ak_vm_resume(vm, true);
    return r;
}
