"""Dirty tracking: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS, and what enables them.

What a VM's slots log into lives here, what is logged in ``engine/dirty.c``. Sources: kvm_main.c:
kvm_get_dirty_log_protect(), kvm_clear_dirty_log_protect(), kvm_vm_ioctl_enable_dirty_log_ring(); ABI.md 4.6.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_clear_dirty_log, kvm_dirty_gfn, kvm_dirty_log, kvm_enable_cap
from anykvm.backends.soft.capabilities import (
    KVM_DIRTY_RING_MAX_BYTES,
    KVM_USER_MEM_SLOTS,
    check_extension,
)
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.engine.values import AK_DIRTY_RING_RESERVED
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.usercopy import copy_from_user
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.backends.soft.memslots import Memslot
    from anykvm.backends.soft.vm import Vm

PAGES_PER_WORD: Final = 64
"""A bitmap is made of 64-bit words; KVM_CLEAR_DIRTY_LOG's ranges too, except at the end of the slot."""
ENTRY_SIZE: Final = ctypes.sizeof(kvm_dirty_gfn)
RING_OFFSET: Final = c.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
"""Where in a vCPU's file its ring is, in bytes."""
_U32: Final = 0xFFFFFFFF


class DirtyBitmap:
    """kvm_memory_slot.dirty_bitmap: memory the engine marks pages in; lives as long as this object."""

    def __init__(self, npages: int, *, all_set: bool) -> None:
        """A bit for each of ``npages``, all clear or all set. Refused: ENOMEM."""
        words = -(-npages // PAGES_PER_WORD)
        try:
            self._words = bytearray(words * 8)
            if all_set:
                self._words[: npages // 8] = b"\xff" * (npages // 8)
                if npages % 8:
                    self._words[npages // 8] = (1 << npages % 8) - 1
        except MemoryError:
            raise Refused(errno.ENOMEM, "no memory for a dirty bitmap") from None
        self._pin = (ctypes.c_uint8 * 1).from_buffer(self._words)  # while it exists the bytearray cannot move

    @property
    def address(self) -> int:
        """Of the first word."""
        return ctypes.addressof(self._pin)


class DirtyLog:
    """What a VM logs dirty pages with. The caller holds the VM's lock around every method."""

    def __init__(self) -> None:
        """Bitmaps, cleared by reading them."""
        self.manual_protect = 0
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_INITIALLY_SET."""
        self.ring_size = 0
        """Bytes of each vCPU's ring; 0: bitmaps are used."""
        self._bitmaps: dict[int, DirtyBitmap] = {}  # by address space << 16 | id

    def bitmap(self, slot: Memslot | None) -> DirtyBitmap | None:
        """Find the bitmap of a slot; None: it is not logged."""
        return None if slot is None else self._bitmaps.get(slot.slot)

    def prepare(self, old: Memslot | None, new: Memslot | None) -> DirtyBitmap | None:
        """kvm_prepare_memory_region(): the bitmap for ``new``, which keeps one that ``old`` has. Refused: ENOMEM.

        With rings a page is first logged when it is first written, whatever KVM_DIRTY_LOG_INITIALLY_SET says.
        """
        if new is None or not new.flags & c.KVM_MEM_LOG_DIRTY_PAGES:
            return None
        all_set = bool(self.manual_protect & c.KVM_DIRTY_LOG_INITIALLY_SET) and not self.ring_size
        return self.bitmap(old) or DirtyBitmap(new.npages, all_set=all_set)

    def commit(self, slot: int, bitmap: DirtyBitmap | None) -> None:
        """kvm_commit_memory_region(): the engine uses ``bitmap`` for this slot now, and no other."""
        if bitmap is None:
            self._bitmaps.pop(slot, None)
        else:
            self._bitmaps[slot] = bitmap


def _logged(vm: Vm, slot: int) -> tuple[Memslot | None, DirtyBitmap | None]:
    """Find the slot of a log ioctl. Refused: ENXIO, EINVAL."""
    if vm.memslots.dirty.ring_size:
        raise Refused(errno.ENXIO, "the VM has dirty rings instead of bitmaps")
    if slot >> 16 >= len(vm.memslots.spaces) or slot & 0xFFFF >= KVM_USER_MEM_SLOTS:
        raise Refused(errno.EINVAL, f"slot: {slot:#x} cannot exist")
    found = vm.memslots.spaces[slot >> 16].by_id.get(slot & 0xFFFF)
    return found, vm.memslots.dirty.bitmap(found)


def _present(slot: Memslot | None, bitmap: DirtyBitmap | None, name: int) -> tuple[Memslot, DirtyBitmap]:
    if slot is None or bitmap is None:
        raise Refused(errno.ENOENT, f"slot {name:#x}: the slot does not exist or has no KVM_MEM_LOG_DIRTY_PAGES")
    return slot, bitmap


def _get_dirty_log(vm: Vm, arg: int) -> int:
    """A bitmap that cannot be copied out (EFAULT) is lost, as in the kernel: its pages are protected again by then."""
    log = copy_from_user(kvm_dirty_log, arg)
    slot, bitmap = _present(*_logged(vm, log.slot), log.slot)
    keep = bool(vm.memslots.dirty.manual_protect)
    result: int = library().ak_get_dirty_log(vm.address, bitmap.address, slot.npages, log.dirty_bitmap, keep)
    if result:
        raise Refused(-result, "" if -result == errno.ENOMEM else f"dirty_bitmap: cannot write {log.dirty_bitmap:#x}")
    return 0


def _clear_dirty_log(vm: Vm, arg: int) -> int:
    log = copy_from_user(kvm_clear_dirty_log, arg)
    found, bitmap = _logged(vm, log.slot)
    first, count = log.first_page, log.num_pages
    if first % PAGES_PER_WORD:
        raise Refused(errno.EINVAL, f"first_page: {first} is not a multiple of {PAGES_PER_WORD}")
    slot, bitmap = _present(found, bitmap, log.slot)
    left = slot.npages - first
    if left < 0 or count > left:
        raise Refused(errno.EINVAL, f"first_page + num_pages is beyond the slot's {slot.npages} pages")
    if count < left and count % PAGES_PER_WORD:
        raise Refused(errno.EINVAL, f"num_pages: {count} is no multiple of {PAGES_PER_WORD}, nor the slot's end")
    result: int = library().ak_clear_dirty_log(vm.address, bitmap.address, first, count, log.dirty_bitmap)
    if result:
        raise Refused(-result, "" if -result == errno.ENOMEM else f"dirty_bitmap: cannot read {log.dirty_bitmap:#x}")
    return 0


def _reset_dirty_rings(vm: Vm, arg: int) -> int:
    if not vm.memslots.dirty.ring_size:
        raise Refused(errno.EINVAL, "the VM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)")
    count: int = library().ak_reset_dirty_rings(vm.address)
    return count


def _enable_manual_protect(vm: Vm, cap: kvm_enable_cap) -> int:
    enable = c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    if cap.flags:
        raise Refused(errno.EINVAL, f"flags: {cap.flags:#x}, not 0")
    options: int = cap.args[0]
    if options & ~(enable | (c.KVM_DIRTY_LOG_INITIALLY_SET if options & enable else 0)):
        raise Refused(errno.EINVAL, f"args[0]: {options:#x} is not 0, 1 or 3")
    vm.memslots.dirty.manual_protect = options
    return 0


def _enable_ring(vm: Vm, cap: kvm_enable_cap) -> int:
    """kvm_vm_ioctl_enable_dirty_log_ring(): args[0], as a 32-bit number, is the bytes of each ring; flags is unused."""
    size = cap.args[0] & _U32
    if not size or size & (size - 1):
        raise Refused(errno.EINVAL, f"args[0]: {size:#x} is not a power of two")
    if size < max(PAGE_SIZE, AK_DIRTY_RING_RESERVED * ENTRY_SIZE):
        raise Refused(errno.EINVAL, f"args[0]: {size} bytes are less than a page")
    if size > KVM_DIRTY_RING_MAX_BYTES:
        raise Refused(errno.E2BIG, f"args[0]: {size:#x} bytes are more than KVM_CAP_DIRTY_LOG_RING says")
    if vm.memslots.dirty.ring_size:
        raise Refused(errno.EINVAL, "the VM has dirty rings already")
    if vm.vcpus:
        raise Refused(errno.EINVAL, "the VM has vCPUs already")
    vm.memslots.dirty.ring_size = size
    return 0


_CAPABILITIES: Final[dict[int, Callable[[Vm, kvm_enable_cap], int]]] = {
    c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: _enable_manual_protect,
    c.KVM_CAP_DIRTY_LOG_RING: _enable_ring,
    c.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: _enable_ring,
}


def enabler(vm: Vm, capability: int) -> Callable[[Vm, kvm_enable_cap], int] | None:
    """kvm_vm_ioctl_enable_cap_generic(): what KVM_ENABLE_CAP does for a capability of dirty tracking; None: none."""
    return _CAPABILITIES.get(capability) if check_extension(vm.profile, capability) else None


HANDLERS: Final[dict[int, Callable[[Vm, int], int]]] = {
    n.KVM_GET_DIRTY_LOG: _get_dirty_log,
    n.KVM_CLEAR_DIRTY_LOG: _clear_dirty_log,
    n.KVM_RESET_DIRTY_RINGS: _reset_dirty_rings,
}
"""The VM ioctls of this module."""
