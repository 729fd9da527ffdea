"""DirtyRing: the ring in which KVM tells user space the pages a vCPU has written."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from anykvm.abi import constants as c
from anykvm.api.pages import map_pages
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu

_ENTRY: Final = struct.Struct("@IIQ")  # struct kvm_dirty_gfn; the flags are read first, as one word
_WORDS: Final = _ENTRY.size // 4


class DirtyPage(NamedTuple):
    """A page the guest wrote: an entry of a dirty ring."""

    slot: int
    """Address space << 16 | slot number."""
    offset: int
    """Page of the slot, from 0."""


class DirtyRing:
    """The dirty ring of one vCPU, mapped. Source: api.rst 8.29, KVM_CAP_DIRTY_LOG_RING; ABI.md 4.6.

    ``Vm.enable_dirty_ring`` comes first, before the first vCPU; then slots with KVM_MEM_LOG_DIRTY_PAGES are logged
    here and KVM_GET_DIRTY_LOG is gone. The order that misses nothing: ``harvest`` the rings of all vCPUs, then
    ``Vm.reset_dirty_rings``, and only then read the pages. A write between the harvest and the reset is not told again.
    The vCPUs may run meanwhile. One object a vCPU: it remembers how far it has read.

    >>> import anykvm
    >>> from anykvm.abi import KVM_MEM_LOG_DIRTY_PAGES
    >>> with anykvm.open() as kvm, kvm.create_vm() as vm, anykvm.GuestMemory(8192) as memory:
    ...     memory[0:6] = bytes.fromhex("c606001005f4")  # movb $5, 0x1000; hlt
    ...     vm.enable_dirty_ring(4096)
    ...     slot = vm.map(memory, 0, flags=KVM_MEM_LOG_DIRTY_PAGES)
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.set_real_mode(0)
    ...     ring = DirtyRing(vcpu)
    ...     vcpu.run(), ring.harvest(), vm.reset_dirty_rings(), ring.harvest()
    (Hlt(), [DirtyPage(slot=0, offset=1)], 1, [])
    """

    def __init__(self, vcpu: Vcpu, size: int | None = None) -> None:
        """Map the ring of ``vcpu``: ``size`` bytes, which is known if ``Vm.enable_dirty_ring`` chose it.

        Raises ValueError for a VM without rings; OSError as ``Backend.mmap``.
        """
        size = vcpu.vm.dirty_ring_size if size is None else size
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError("the VM has no dirty rings: Vm.enable_dirty_ring comes before the first vCPU")
        pages = map_pages(vcpu.backend, vcpu.fileno(), size, c.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE)
        self._bytes = memoryview(pages).cast("B")
        self._words = self._bytes.cast("I")
        self._entries = size // _ENTRY.size
        self._next = 0

    def harvest(self, limit: int | None = None) -> list[DirtyPage]:
        """Take the entries there are, at most ``limit``, oldest first, and release them to ``Vm.reset_dirty_rings``.

        A page is in it once until it is reset, and may be in the rings of several vCPUs.
        """
        found: list[DirtyPage] = []
        at, entries = self._next, self._entries
        for _ in range(entries if limit is None else min(limit, entries)):
            flags, slot, offset = _ENTRY.unpack_from(self._bytes, at * _ENTRY.size)
            if flags & c.KVM_DIRTY_GFN_F_MASK != c.KVM_DIRTY_GFN_F_DIRTY:
                break  # not written yet, or harvested and not yet reset
            self._words[at * _WORDS] = c.KVM_DIRTY_GFN_F_RESET
            found.append(DirtyPage(slot, offset))
            at = (at + 1) % entries
        self._next = at
        return found

    def __len__(self) -> int:
        """Give how many entries there is room for; the vCPU stops (``DirtyRingFull``) before all are used."""
        return self._entries
