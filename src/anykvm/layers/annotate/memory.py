"""Guest-physical memory as the layer knows it: the memslots that passed through, and what the host has behind them."""

from __future__ import annotations

from typing import Final, NamedTuple

from anykvm.abi.constants import KVM_MEM_READONLY
from anykvm.layers.annotate.hostmap import HostMap

PAGE: Final = 4096


class Slot(NamedTuple):
    """A memslot of address space 0, or of the one in its upper 16 bits."""

    slot: int
    flags: int
    gpa: int
    size: int
    hva: int

    @property
    def read_only(self) -> bool:
        """KVM_MEM_READONLY: writes are device accesses, and table entries in it are not written."""
        return bool(self.flags & KVM_MEM_READONLY)


class GuestPhysical:
    """One VM's memory during one explanation."""

    def __init__(self, slots: tuple[Slot, ...], host: HostMap) -> None:
        """See it through these slots."""
        self._slots = slots
        self.host = host

    def slot(self, gpa: int) -> Slot | None:
        """Find the memslot of an address."""
        for slot in self._slots:
            if slot.gpa <= gpa < slot.gpa + slot.size and not slot.slot >> 16:
                return slot
        return None

    def peek(self, gpa: int, size: int) -> bytes | None:
        """Read within one page, through any protection; None if it cannot be."""
        slot = self.slot(gpa)
        return None if slot is None else self.host.peek(slot.hva + gpa - slot.gpa, size)
