"""The memory of a VM: memslots, dirty tracking, memory attributes, guest_memfd."""

from __future__ import annotations

import ctypes
import errno as _errno
from typing import NamedTuple, Protocol

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.abi.constants import KVM_CAP_DIRTY_LOG_RING
from anykvm.abi.limits import KVM_MEM_MAX_NR_PAGES
from anykvm.api.enable import enable_cap
from anykvm.api.handle import Handle
from anykvm.api.region import why_region_refused
from anykvm.host import libc
from anykvm.host.atomic import atomically_or_here
from anykvm.host.ranges import PAGE_SIZE


class HostMemory(Protocol):
    """Host memory that ``Vm.map`` takes: ``GuestMemory``, or another object that knows where it is."""

    @property
    def address(self) -> int:
        """Host virtual address of the first byte."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...


class Slot(NamedTuple):
    """A memslot as it was last set through this API."""

    guest_phys_addr: int
    memory_size: int
    memory: HostMemory | None
    """The memory behind it, kept alive for as long as the slot exists."""


class VmMemory(Handle):
    """The memory ioctls of ``Vm``."""

    _slots: dict[int, Slot]
    _free_from = 0  # no slot below is free
    dirty_ring_size = 0
    """Bytes of each vCPU's dirty ring, if ``enable_dirty_ring`` chose it."""

    def map(self, memory: HostMemory, guest_phys_addr: int, slot: int | None = None, flags: int = 0) -> int:
        """Put all of ``memory`` at a guest-physical address; returns the slot, the lowest free one if not given.

        The VM keeps ``memory`` alive, but does not close it. Raises OSError as ``set_user_memory_region``.
        """
        return atomically_or_here(self._map, memory, guest_phys_addr, slot, flags)

    def _map(self, memory: HostMemory, guest_phys_addr: int, slot: int | None, flags: int) -> int:
        if slot is None:
            slot = self._free_from
            while slot in self._slots:
                slot += 1
            self._free_from = slot
        self.set_user_memory_region(slot, guest_phys_addr, memory.size, memory.address, flags)
        self._slots[slot] = Slot(guest_phys_addr, memory.size, memory)
        return slot

    def unmap(self, slot: int) -> None:
        """Delete a slot. Raises OSError: EINVAL if it does not exist."""
        self.set_user_memory_region(slot, 0, 0, 0)

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move or delete (``memory_size`` 0) a memslot.

        ``userspace_addr`` need not be mapped: what the host has there when the guest touches it decides.
        ``flags`` is KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY.
        Raises OSError: EINVAL for unaligned or impossible fields, EEXIST for an overlap with another slot.
        """
        fields = {
            "slot": slot,
            "guest_phys_addr": guest_phys_addr,
            "memory_size": memory_size,
            "userspace_addr": userspace_addr,
            "flags": flags,
        }
        self._set_region(n.KVM_SET_USER_MEMORY_REGION, s.kvm_userspace_memory_region(**fields), fields)

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: as the first, with private memory from a guest_memfd.

        Raises OSError: as ``set_user_memory_region``; EBADF for a descriptor that is not open, EEXIST when its range is
        bound to another slot.
        """
        fields = {
            "slot": slot,
            "guest_phys_addr": guest_phys_addr,
            "memory_size": memory_size,
            "userspace_addr": userspace_addr,
            "flags": flags,
            "guest_memfd": guest_memfd,
            "guest_memfd_offset": guest_memfd_offset,
        }
        self._set_region(n.KVM_SET_USER_MEMORY_REGION2, s.kvm_userspace_memory_region2(**fields), fields)

    def _set_region(self, request: int, region: ctypes.Structure, fields: dict[str, int]) -> None:
        atomically_or_here(self._set_region_and_note, request, region, fields)

    def _set_region_and_note(self, request: int, region: ctypes.Structure, fields: dict[str, int]) -> None:
        slot, size = fields["slot"], fields["memory_size"]
        self._call(request, region, fields, lambda errno: why_region_refused(errno, fields, self._slots))
        old = self._slots.pop(slot, None)
        if not size:
            self._free_from = min(self._free_from, slot)
        else:
            self._slots[slot] = Slot(fields["guest_phys_addr"], size, old.memory if old else None)

    def get_dirty_log(self, slot: int, pages: int | None = None) -> bytes:
        """KVM_GET_DIRTY_LOG: a bitmap of the slot's pages, bit 0 of byte 0 the first.

        ``pages`` is needed only for a slot that was not set through this object.
        The pages written since the last call; with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled, since they were cleared
        by ``clear_dirty_log``. Read the pages after it: what the guest writes from then on is in the next bitmap. User
        space's own writes are in none.
        Raises OSError: ENOENT for a slot that is absent or not logged, ENXIO with a dirty ring instead of bitmaps;
        ValueError for more pages than a slot can have.
        """
        bitmap = self._bitmap(slot, pages)
        log = s.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        self._call(n.KVM_GET_DIRTY_LOG, log, {"slot": slot}, _why_log)
        return bytes(bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG: forget the pages set in ``bitmap``, whose bit 0 is ``first_page``.

        Raises OSError: EINVAL unless both numbers are multiples of 64 within the slot (``num_pages`` may reach its
        end), ENOENT and ENXIO as ``get_dirty_log``; ValueError for more pages than a slot can have.
        """
        size = _bitmap_size(num_pages)
        data = (ctypes.c_uint8 * size).from_buffer_copy(bytes(bitmap[:size]).ljust(size, b"\0"))
        log = s.kvm_clear_dirty_log(
            slot=slot, first_page=first_page, num_pages=num_pages, dirty_bitmap=ctypes.addressof(data)
        )
        shown = {"slot": slot, "first_page": first_page, "num_pages": num_pages}
        self._call(n.KVM_CLEAR_DIRTY_LOG, log, shown, _why_log)

    def _bitmap(self, slot: int, pages: int | None) -> ctypes.Array[ctypes.c_uint8]:
        if pages is None:
            known = self._slots.get(slot)
            pages = known.memory_size // PAGE_SIZE if known else 0
        return (ctypes.c_uint8 * _bitmap_size(pages))()

    def enable_dirty_ring(self, size: int) -> None:
        """KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING): log to a ring of ``size`` bytes a vCPU instead of to bitmaps.

        ``size`` is a power of two, 16 bytes an entry; KVM keeps 64 entries and more in reserve. See ``DirtyRing``.
        Raises OSError: EINVAL for a size that is too small or no power of two, when a vCPU exists, or the second time;
        E2BIG over what ``check_extension(KVM_CAP_DIRTY_LOG_RING)`` says.
        """
        atomically_or_here(self._enable_dirty_ring, size)

    def _enable_dirty_ring(self, size: int) -> None:
        enable_cap(self, KVM_CAP_DIRTY_LOG_RING, (size,), 0)
        self.dirty_ring_size = size

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: take back harvested entries; returns how many.

        From then on the next write to each of their pages is told again (``DirtyRing``).
        Raises OSError: EINVAL, the VM has no dirty rings.
        """
        return self._call(n.KVM_RESET_DIRTY_RINGS)

    def set_memory_attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES of a guest-physical range: 0 or KVM_MEMORY_ATTRIBUTE_PRIVATE.

        Raises OSError: EINVAL for an empty or unaligned range, or attributes this VM lacks; ENOMEM.
        """
        fields = {"address": address, "size": size, "attributes": attributes, "flags": flags}

        def why(errno: int) -> str | None:
            broken = [name for name in ("address", "size") if fields[name] % PAGE_SIZE]
            if errno != _errno.EINVAL:
                return None
            if broken:
                return f"{broken[0]} is not page aligned"
            if not size:
                return "size is 0"
            return "flags is not 0" if flags else "this VM does not have these attributes"

        self._call(n.KVM_SET_MEMORY_ATTRIBUTES, s.kvm_memory_attributes(**fields), fields, why)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD: a file of ``size`` bytes for guest memory; returns its descriptor.

        The caller closes it; the slots bound to it then lose their memory. ``flags`` is GUEST_MEMFD_FLAG_*.
        Raises OSError: EINVAL for a size that is 0 or not page aligned or for unknown flags.
        """
        fields = {"size": size, "flags": flags}

        def why(errno: int) -> str | None:
            bad_size = size <= 0 or size % PAGE_SIZE
            return ("size is 0 or not page aligned" if bad_size else None) if errno == _errno.EINVAL else None

        return self._call(n.KVM_CREATE_GUEST_MEMFD, s.kvm_create_guest_memfd(**fields), fields, why)

    def discard_guest_memfd(self, fd: int, offset: int, size: int) -> None:
        """Give pages of a guest_memfd back, in bytes: they are zero when next used, for every guest at once.

        fallocate(2) with FALLOC_FL_PUNCH_HOLE. A VMM does it to private memory that the guest has made shared.
        Raises OSError: EINVAL for a range that is empty or not page aligned.
        """
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise OSError(_errno.EINVAL, f"discard_guest_memfd(offset={offset:#x}, size={size:#x}): not page aligned")
        libc.fallocate(fd, libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE, offset, size)

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: collect writes to a range in the vCPU's ring."""
        self._zone(n.KVM_REGISTER_COALESCED_MMIO, addr, size, pio)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: undo the above."""
        self._zone(n.KVM_UNREGISTER_COALESCED_MMIO, addr, size, pio)

    def _zone(self, request: int, addr: int, size: int, pio: bool) -> None:
        zone = s.kvm_coalesced_mmio_zone(addr=addr, size=size, pio=int(pio))
        self._call(request, zone, {"addr": addr, "size": size, "pio": int(pio)})


def _bitmap_size(pages: int) -> int:
    """Bytes of a slot's bitmap, which is made of 64-bit words."""
    if not 0 <= pages <= KVM_MEM_MAX_NR_PAGES:
        raise ValueError(f"{pages} pages: a slot has from 0 to {KVM_MEM_MAX_NR_PAGES}")
    return (pages + 63) // 64 * 8


def _why_log(errno: int) -> str | None:
    if errno == _errno.ENOENT:
        return "the slot does not exist or has no KVM_MEM_LOG_DIRTY_PAGES"
    return "a dirty ring is used instead" if errno == _errno.ENXIO else None
