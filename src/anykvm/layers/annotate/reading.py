"""Reading guest memory by linear address, as the processor would for itself."""

from __future__ import annotations

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import PAGE, GuestPhysical
from anykvm.layers.annotate.walk import walk


def read(cpu: Cpu, memory: GuestPhysical, linear: int, size: int, *, system: bool = True) -> int | None:
    """Read a little-endian number page by page, through the host's protection; None where it cannot be read.

    ``system``: the processor's own access, whatever the privilege level.
    """
    data = b""
    while size:
        here = min(size, PAGE - linear % PAGE)
        gpa = walk(cpu, memory, linear, Access.READ, system).gpa
        piece = None if gpa is None else memory.peek(gpa, here)
        if piece is None:
            return None
        data += piece
        linear, size = linear + here, size - here
    return int.from_bytes(data, "little")
