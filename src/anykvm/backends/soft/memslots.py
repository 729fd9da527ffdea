"""Memslots: KVM_SET_USER_MEMORY_REGION and _REGION2. Source:
kvm_main.c:kvm_set_memory_region(), whose checks stand here in its order, numbered in comments.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from anykvm.abi.constants import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from anykvm.abi.limits import KVM_MEM_MAX_NR_PAGES
from anykvm.backends.soft.capabilities import KVM_USER_MEM_SLOTS
from anykvm.backends.soft.cpuid import MAXPHYADDR
from anykvm.backends.soft.dirty import DirtyBitmap, DirtyLog
from anykvm.backends.soft.engine.library import AkSlot, library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.gmem_binding import Binding, Bindings
from anykvm.backends.soft.ordered import SortedNumbers
from anykvm.host.ranges import PAGE_SIZE

PAGE_SHIFT: Final = 12
TASK_SIZE_MAX: Final = (1 << 47) - PAGE_SIZE
"""End of user addresses; access_ok() of a host with 4-level page tables."""
_U64: Final = (1 << 64) - 1
_MAX_GFN: Final = (1 << (MAXPHYADDR - PAGE_SHIFT)) - 1
_V1_FLAGS: Final = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY


class Region(NamedTuple):
    """The caller's ``struct kvm_userspace_memory_region``, every field as given."""

    slot: int
    """Slot number; the upper 16 bits are the address space."""
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    guest_memfd: int = 0
    """Descriptor, with KVM_MEM_GUEST_MEMFD."""
    guest_memfd_offset: int = 0


class Memslot(NamedTuple):
    """struct kvm_memory_slot: an active slot."""

    slot: int
    """Address space << 16 | id."""
    flags: int
    base_gfn: int
    npages: int
    userspace_addr: int
    binding: Binding | None = None
    """The pages of a guest_memfd, with KVM_MEM_GUEST_MEMFD."""


class AddressSpace:
    """The slots of one address space, by id and by guest frame; no two share a frame."""

    def __init__(self) -> None:
        """No slots."""
        self.by_id: dict[int, Memslot] = {}
        self._bases = SortedNumbers()
        self._by_base: dict[int, Memslot] = {}
        self._stale = False
        """There was no memory to note a change by frame: to be made anew from ``by_id``."""

    def _below(self, end: int) -> Memslot | None:
        """Find the last slot that begins below ``end``."""
        if self._stale:
            self._index_anew()
        base = self._bases.at_or_below(end - 1)
        return None if base is None else self._by_base[base]

    def _index_anew(self) -> None:
        self._bases, self._by_base = SortedNumbers(), {}
        for slot in self.by_id.values():
            self._bases.add(slot.base_gfn)
            self._by_base[slot.base_gfn] = slot
        self._stale = False

    def gfn_to_memslot(self, gfn: int) -> Memslot | None:
        """Find the slot of a guest frame."""
        slot = self._below(gfn + 1)
        return slot if slot and gfn < slot.base_gfn + slot.npages else None

    def overlap(self, base_gfn: int, npages: int, ignore: Memslot | None) -> Memslot | None:
        """Find a slot, other than ``ignore``, that has one of these frames (kvm_check_memslot_overlap())."""
        slot = self._below(base_gfn + npages)
        if slot and slot is ignore:
            slot = self._below(slot.base_gfn)
        return slot if slot and slot.base_gfn + slot.npages > base_gfn else None

    def index(self, old: Memslot | None, new: Memslot | None) -> None:
        """Note by frame that ``old`` is gone from ``by_id`` and ``new`` is there; either may be None. Cannot fail."""
        try:
            if old is not None:
                self._bases.remove(old.base_gfn)
                del self._by_base[old.base_gfn]
            if new is not None:
                self._bases.add(new.base_gfn)
                self._by_base[new.base_gfn] = new
        except Exception:  # MemoryError; for a list that cannot shrink SystemError; others if it was stale
            self._stale = True


class Memslots:
    """All memslots of a VM. The caller holds the VM's lock around every method."""

    def __init__(self, vm_address: int, address_spaces: int, *, guest_memfd: bool = True) -> None:
        """For the engine's VM at this address; ``guest_memfd``: its slots can have one (KVM_CAP_GUEST_MEMFD)."""
        self._vm_address = vm_address
        self._flags = _V1_FLAGS | (KVM_MEM_GUEST_MEMFD if guest_memfd else 0)
        self.spaces = tuple(AddressSpace() for _ in range(address_spaces))
        self._bindings = Bindings()
        self.nr_memslot_pages = 0
        self.dirty = DirtyLog()

    def set_memory_region(self, region: Region, *, v1: bool) -> None:
        """Create, delete, move or change a slot; ``v1``: by KVM_SET_USER_MEMORY_REGION, which knows two flags.

        Refused: EINVAL, EEXIST (its frames belong to another slot), ENOMEM.
        """
        check_region(region, len(self.spaces), _V1_FLAGS if v1 else self._flags)
        space = self.spaces[region.slot >> 16]
        old = space.by_id.get(region.slot & 0xFFFF)
        npages = region.memory_size >> PAGE_SHIFT
        if npages == 0:  # 13
            if old is None:
                raise Refused(errno.EINVAL, "memory_size 0 deletes a slot, and this slot does not exist")
            self._commit(space, old, None)
            return
        new = Memslot(region.slot, region.flags, region.guest_phys_addr >> PAGE_SHIFT, npages, region.userspace_addr)
        if old is None:
            if self.nr_memslot_pages + npages > _U64:  # 14
                raise Refused(errno.EINVAL, "memory_size makes the pages of all slots wrap")
        else:
            _check_modify(old, new)
            if new == old:  # 17
                return
        if old is None or new.base_gfn != old.base_gfn:
            other = space.overlap(new.base_gfn, npages, old)
            if other is not None:  # 18
                raise Refused(errno.EEXIST, f"guest_phys_addr overlaps another slot, {other.slot:#x}")
            if region.flags & KVM_MEM_GUEST_MEMFD:  # 19
                file, binding = self._bindings.look_up(region, self._vm_address)  # file: kept until it is bound
                new = new._replace(binding=binding)
            if new.base_gfn + npages - 1 > _MAX_GFN:  # 20
                raise Refused(errno.EINVAL, f"guest_phys_addr + memory_size is beyond 2^{MAXPHYADDR}")
            if new.binding and self._bindings.overlap(new.binding):  # 21
                raise Refused(errno.EEXIST, "guest_memfd_offset: pages of this file belong to another slot")
        self._commit(space, old, new)

    def _commit(self, space: AddressSpace, old: Memslot | None, new: Memslot | None) -> None:
        """kvm_set_memslot(). Only address space 0 is the engine's: no vCPU is ever in system management mode.

        What can fail comes first, and is undone if the engine has no memory.
        """
        known, bitmap = self.dirty.bitmap(old), self.dirty.prepare(old, new)
        before, after = _for_engine(old, known), _for_engine(new, bitmap)
        pages = self.nr_memslot_pages + (new.npages if new else 0) - (old.npages if old else 0)
        slot = (new or old).slot  # type: ignore[union-attr]
        key = slot & 0xFFFF
        try:
            if new is not None:
                space.by_id[key] = new
            if bitmap is not None:
                self.dirty.commit(slot, bitmap)
            result: int = library().ak_set_memslot(self._vm_address, before, after) if space is self.spaces[0] else 0
            if result:
                raise Refused(-result)
        except BaseException:
            if old is not None:
                space.by_id[key] = old
            else:
                space.by_id.pop(key, None)
            self.dirty.commit(slot, known)
            raise
        if new is None:
            del space.by_id[key]
        if bitmap is None:
            self.dirty.commit(slot, None)
        self.nr_memslot_pages = pages
        space.index(old, new)
        self._bindings.replace(old and old.binding, new and new.binding)


def check_region(region: Region, address_spaces: int, known_flags: int) -> None:
    """Check what does not depend on the slots there are: rows 3 to 12. Refused: EINVAL."""
    slot, flags, gpa, size, hva, _, offset = region
    if flags & ~known_flags:  # 3, 5
        raise Refused(errno.EINVAL, f"flags has unknown bits {flags & ~known_flags:#x}")
    if slot & 0xFFFF >= KVM_USER_MEM_SLOTS:  # 4
        raise Refused(errno.EINVAL, f"slot is not below {KVM_USER_MEM_SLOTS} (KVM_CAP_NR_MEMSLOTS)")
    if flags & KVM_MEM_GUEST_MEMFD and flags != KVM_MEM_GUEST_MEMFD:  # 5
        raise Refused(errno.EINVAL, f"flags: {flags:#x}; with KVM_MEM_GUEST_MEMFD there can be no other")
    if size % PAGE_SIZE:  # 6
        raise Refused(errno.EINVAL, "memory_size is not page aligned")
    if gpa % PAGE_SIZE:  # 7
        raise Refused(errno.EINVAL, "guest_phys_addr is not page aligned")
    if hva % PAGE_SIZE:  # 8
        raise Refused(errno.EINVAL, "userspace_addr is not page aligned")
    if hva + size > TASK_SIZE_MAX:  # 8: access_ok()
        raise Refused(errno.EINVAL, "userspace_addr + memory_size is beyond the user address space")
    if flags & KVM_MEM_GUEST_MEMFD and (offset % PAGE_SIZE or offset + size > _U64):  # 9
        raise Refused(errno.EINVAL, "guest_memfd_offset is not page aligned, or + memory_size wraps")
    if slot >> 16 >= address_spaces:  # 10
        raise Refused(errno.EINVAL, "slot names an address space (its upper 16 bits) that does not exist")
    if gpa + size > _U64:  # 11
        raise Refused(errno.EINVAL, "guest_phys_addr + memory_size wraps")
    if size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES:  # 12
        raise Refused(errno.EINVAL, "memory_size is more than 2^31 - 1 pages")


def _check_modify(old: Memslot, new: Memslot) -> None:
    """Rows 15 and 16: what may change in a slot is where it is in the guest, and dirty logging."""
    if new.flags & KVM_MEM_GUEST_MEMFD:
        raise Refused(errno.EINVAL, "the slot exists: one with KVM_MEM_GUEST_MEMFD can only be deleted")
    if new.userspace_addr != old.userspace_addr:
        raise Refused(errno.EINVAL, f"the slot exists: userspace_addr cannot change from {old.userspace_addr:#x}")
    if new.npages != old.npages:
        raise Refused(errno.EINVAL, f"the slot exists: memory_size cannot change from {old.npages << PAGE_SHIFT:#x}")
    if (new.flags ^ old.flags) & (KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD):
        raise Refused(errno.EINVAL, "the slot exists: KVM_MEM_READONLY and KVM_MEM_GUEST_MEMFD in flags cannot change")


def _for_engine(slot: Memslot | None, bitmap: DirtyBitmap | None) -> AkSlot | None:
    if slot is None:
        return None
    gmem = (slot.binding.address, slot.binding.offset, slot.binding.gmem_only) if slot.binding else (0, 0, False)
    address = bitmap.address if bitmap else None
    return AkSlot(slot.base_gfn, slot.npages, slot.userspace_addr, slot.flags, slot.slot, address, *gmem)
