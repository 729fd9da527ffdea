"""One access an instruction makes, by linear address."""

from __future__ import annotations

from typing import NamedTuple

from anykvm.layers.annotate.access import Access


class Operand(NamedTuple):
    """An access to ``size`` bytes. An instruction is a list of them, in the order it makes them."""

    linear: int
    size: int
    access: Access
    role: str
    step: int = 0
    """Accesses of the same step have no order among themselves: the next step needs what this one brought."""
    system: bool = False
    """Made by the processor for itself, whatever the privilege level."""
    ordered: bool = True
    """Its bytes are touched from the lowest on."""
