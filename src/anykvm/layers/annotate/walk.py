"""The guest's page tables, walked in software without touching an accessed bit. Source: Intel SDM 3A chapter 4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from anykvm.layers.annotate import cpu as x
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import GuestPhysical

_P, _W, _U, _PS, _NX = 1, 2, 4, 0x80, 1 << 63
_ADDR: Final = 0x000FFFFFFFFFF000
_LEVELS: Final = ("PTE", "PDE", "PDPTE", "PML4E", "PML5E")


class Entry(NamedTuple):
    """A page table's entry."""

    level: str
    """As Intel's manuals name it: ``PML5E``, ``PML4E``, ``PDPTE``, ``PDE``, ``PTE``."""
    gpa: int
    size: int
    """Bytes."""
    value: int | None
    """What it holds; None if it cannot be read."""


@dataclass(slots=True)
class Walk:
    """What a walk met."""

    entries: list[Entry] = field(default_factory=list)
    """Each table entry it came to, top down."""
    gpa: int | None = None
    """Where the linear address is; None if the walk ended before."""
    fault: bool = False
    """It ends in a guest exception: #PF, or #GP for an address that is not canonical."""


def walk(cpu: Cpu, memory: GuestPhysical, linear: int, access: Access, system: bool = False) -> Walk:
    """Translate ``linear`` for an access; ``system``: the processor's own, as to a descriptor table, whatever the CPL.

    A walk that ends with neither ``gpa`` nor ``fault`` met an entry that cannot be read, the last of ``entries``.
    """
    found = Walk()
    if not cpu.paging_levels:
        found.gpa = linear & 0xFFFFFFFF
        return found
    levels = cpu.paging_levels
    pae = levels > 2
    if cpu.long:
        top = linear >> (11 + 9 * levels)
        if top and top != (1 << 64 - 11 - 9 * levels) - 1:
            found.fault = True
            return found
    else:
        linear &= 0xFFFFFFFF
    _tables(cpu, memory, linear, (access, system), (levels, pae), found)
    return found


def _tables(
    cpu: Cpu, memory: GuestPhysical, linear: int, how: tuple[Access, bool], shape: tuple[int, bool], found: Walk
) -> None:
    levels, pae = shape
    size, bits = (8, 9) if pae else (4, 10)
    table = cpu.sregs.cr3 & (_ADDR if cpu.long else 0xFFFFFFE0 if pae else 0xFFFFF000)
    rights = _W | _U
    nx = False
    for level in range(levels - 1, -1, -1):
        shift = 12 + bits * level
        pdpte = pae and not cpu.long and level == 2
        at = table + (linear >> shift & (3 if pdpte else (1 << bits) - 1)) * size
        data = memory.peek(at, size)
        if data is None:
            found.entries.append(Entry(_LEVELS[level], at, size, None))
            found.fault = memory.slot(at) is None  # KVM makes a #PF of a table without a memslot
            return
        entry = int.from_bytes(data, "little")
        found.entries.append(Entry(_LEVELS[level], at, size, entry))
        if not entry & _P:
            found.fault = True
            return
        if not pdpte:
            rights &= entry
            nx = nx or bool(pae and cpu.sregs.efer & x.EFER_NX and entry & _NX)
        large = bool(level and entry & _PS and not pdpte and (pae or cpu.sregs.cr4 & x.CR4_PSE))
        if level and not large:
            table = entry & (_ADDR if pae else 0xFFFFF000)
            continue
        if not _permitted(cpu, how, rights, nx):
            found.fault = True
            return
        base = entry & (_ADDR if pae else 0xFFFFF000)
        if large and not pae:  # PSE-36: bits 13 to 20 are address bits 32 to 39
            base = entry & 0xFFC00000 | (entry & 0x1FE000) << 19
        within = (1 << shift) - 1
        found.gpa = base & ~within | linear & within
        return


def _permitted(cpu: Cpu, how: tuple[Access, bool], rights: int, nx: bool) -> bool:
    access, system = how
    user = cpu.cpl == 3 and not system
    cr4 = cpu.sregs.cr4
    if user and not rights & _U:
        return False
    if not user and rights & _U:
        if access is Access.EXEC and cr4 & x.CR4_SMEP:
            return False
        if access is not Access.EXEC and cr4 & x.CR4_SMAP and (system or not cpu.regs.rflags & x.RFLAGS_AC):
            return False
    if access is Access.WRITE and not rights & _W and (user or cpu.sregs.cr0 & x.CR0_WP):
        return False
    return not (access is Access.EXEC and nx)
