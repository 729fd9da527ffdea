"""Which pages of which guest_memfd belong to which memslot. Source: guest_memfd.c:kvm_gmem_bind()."""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.guest_memfd import GuestMemfd

if TYPE_CHECKING:
    from anykvm.backends.soft.memslots import Region


class Binding(NamedTuple):
    """A slot's pages of a guest_memfd. It does not keep the file."""

    serial: int
    """The file's."""
    offset: int
    size: int
    address: int
    """Of the engine's struct ak_gmem; valid while the file is."""
    gmem_only: bool
    """KVM_MEMSLOT_GMEM_ONLY: shared accesses use the file too."""


class Bindings:
    """The bindings of a VM's slots. The caller holds the VM's lock around every method."""

    def __init__(self) -> None:
        """None."""
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # serial -> (offset, end), sorted; no two overlap

    def look_up(self, region: Region, vm_address: int) -> tuple[GuestMemfd, Binding]:
        """Find the file and pages that a slot to be names.

        Refused: EBADF (no open descriptor), EINVAL (no guest_memfd, another VM's, or the file is too short).
        """
        try:
            file = FILES.get(region.guest_memfd)
        except Refused as refused:
            code = errno.EINVAL if refused.errno == errno.ENOTTY else refused.errno
            raise Refused(code, f"guest_memfd: {region.guest_memfd} is not a guest_memfd") from None
        if not isinstance(file, GuestMemfd) or file.vm.address != vm_address:
            raise Refused(errno.EINVAL, f"guest_memfd: {region.guest_memfd} is not a guest_memfd of this VM")
        if region.guest_memfd_offset + region.memory_size > file.size:
            raise Refused(errno.EINVAL, f"guest_memfd_offset + memory_size is beyond the file's {file.size:#x} bytes")
        return file, Binding(file.serial, region.guest_memfd_offset, region.memory_size, file.address, file.mappable)

    def overlap(self, binding: Binding) -> bool:
        """Say whether a page of it belongs to a slot already."""
        ranges = self._ranges.get(binding.serial, [])
        at = bisect_left(ranges, (binding.offset + binding.size, 0)) - 1
        return at >= 0 and ranges[at][1] > binding.offset

    def replace(self, old: Binding | None, new: Binding | None) -> None:
        """Take ``old`` out and put ``new`` in; either may be None."""
        if old is not None:
            ranges = self._ranges[old.serial]
            del ranges[bisect_left(ranges, (old.offset, 0))]
            if not ranges:
                del self._ranges[old.serial]
        if new is not None:
            ranges = self._ranges.setdefault(new.serial, [])
            ranges.insert(bisect_left(ranges, (new.offset, 0)), (new.offset, new.offset + new.size))
