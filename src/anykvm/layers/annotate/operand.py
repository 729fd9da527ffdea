"""One access an instruction makes, by linear address."""

from __future__ import annotations

from typing import NamedTuple

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu


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
    certain: bool = True
    """False: whether it is made depends on what cannot be known, or on the processor."""


class Unknown(Exception):
    """What an instruction touches cannot be known; the text says what and why, as a sentence's end."""


def push(cpu: Cpu, count: int, size: int, first: int = 0, step: int = 3) -> list[Operand]:
    """``count`` pushes of ``size`` bytes, one after the other, below SP + ``first``."""
    places = (cpu.stack(first - size * (index + 1)) for index in range(count))
    return [Operand(at, size, Access.WRITE, "stack", step + index) for index, at in enumerate(places)]


def pop(cpu: Cpu, count: int, size: int, first: int = 0, step: int = 1) -> list[Operand]:
    """``count`` pops, one after the other, from SP + ``first`` on."""
    places = (cpu.stack(first + size * index) for index in range(count))
    return [Operand(at, size, Access.READ, "stack", step + index) for index, at in enumerate(places)]
