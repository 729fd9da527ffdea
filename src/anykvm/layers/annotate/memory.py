"""Guest-physical memory as the layer knows it: the memslots that passed through, and what the host has behind them."""

from __future__ import annotations

from anykvm.layers.annotate.hostmap import HostMap
from anykvm.layers.shadow import PAGE as PAGE
from anykvm.layers.shadow import Slot as Slot


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
