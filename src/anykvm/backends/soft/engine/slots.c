/* The memslot table: guest frames to host addresses, sorted by base_gfn. Updates happen while no vCPU is in guest mode
 * (ak_vm_pause), so a TLB fill reads it without a lock. */
#include "engine.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static u32 position(const struct ak_vm *vm, u64 gfn)
{
    u32 low = 0, high = vm->nslots;
    while (low < high) {
        u32 mid = (low + high) / 2;
        if (vm->slots[mid]->base_gfn + vm->slots[mid]->npages <= gfn)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

struct ak_slot *ak_gfn_to_memslot(struct ak_vm *vm, u64 gfn)
{
    u32 at = position(vm, gfn);
    return at < vm->nslots && vm->slots[at]->base_gfn <= gfn ? vm->slots[at] : NULL;
}

static int room_for_id(struct ak_vm *vm, u32 id)
{
    if (id < vm->ids_room)
        return 0;
    u32 room = id + 1 > vm->ids_room * 2 ? id + 1 : vm->ids_room * 2;
    struct ak_slot **grown = ak_realloc(vm->slots_by_id, room * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    memset(grown + vm->ids_room, 0, (room - vm->ids_room) * sizeof *grown);
    vm->slots_by_id = grown;
    vm->ids_room = room;
    return 0;
}

void ak_slot_free(struct ak_slot *slot)
{
    free(slot->mapped);
    free(slot);
}

static int room_for_slot(struct ak_vm *vm)
{
    if (vm->nslots < vm->slots_room)
        return 0;
    u32 room = vm->slots_room ? vm->slots_room * 2 : 16;
    struct ak_slot **grown = ak_realloc(vm->slots, room * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    vm->slots = grown;
    vm->slots_room = room;
    return 0;
}

/* All memory that a slot to be needs; nothing else has changed. NULL: there is none. */
struct ak_slot *ak_slot_prepare(struct ak_vm *vm, const struct ak_slot *slot)
{
    if (room_for_slot(vm) || room_for_id(vm, slot->id))
        return NULL;
    struct ak_slot *copy = ak_malloc(sizeof *copy);
    if (!copy)
        return NULL;
    *copy = *slot;
    if (ak_mapped_alloc(vm, copy)) {
        free(copy);
        return NULL;
    }
    return copy;
}

/* Put in a slot that was prepared. It cannot fail. */
void ak_slot_link(struct ak_vm *vm, struct ak_slot *slot)
{
    u32 at = position(vm, slot->base_gfn);
    memmove(vm->slots + at + 1, vm->slots + at, (vm->nslots - at) * sizeof *vm->slots);
    vm->slots[at] = slot;
    vm->nslots++;
    vm->slots_by_id[slot->id] = slot;
}

static struct ak_slot *exact(struct ak_vm *vm, u64 base_gfn, u32 id, u32 *at)
{
    *at = position(vm, base_gfn);
    if (*at < vm->nslots && vm->slots[*at]->base_gfn == base_gfn && vm->slots[*at]->id == id)
        return vm->slots[*at];
    return NULL;
}

int ak_slot_remove(struct ak_vm *vm, u64 base_gfn, u32 id)
{
    u32 at;
    struct ak_slot *slot = exact(vm, base_gfn, id, &at);
    if (!slot)
        return -ENOENT;
    memmove(vm->slots + at, vm->slots + at + 1, (vm->nslots - at - 1) * sizeof *vm->slots);
    vm->nslots--;
    vm->slots_by_id[id] = NULL;
    ak_slot_free(slot);
    ak_zap_all(vm);
    return 0;
}

int ak_slot_flags(struct ak_vm *vm, u64 base_gfn, u32 id, u32 flags, u64 *dirty_bitmap)
{
    u32 at;
    struct ak_slot *slot = exact(vm, base_gfn, id, &at);
    if (!slot)
        return -ENOENT;
    slot->flags = flags;
    slot->dirty_bitmap = dirty_bitmap;
    return 0;
}
