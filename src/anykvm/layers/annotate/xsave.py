"""The memory of XSAVE, XRSTOR and their kin: what of the area they touch. Source: Intel SDM volume 1, chapter 13."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.extended import AVX, HEADER, LEGACY, SSE, X87
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand
from anykvm.layers.annotate.reading import read
from anykvm.layers.annotate.tables import names

_SAVES: Final = names("xsave xsave64 xsaveopt xsaveopt64")
_COMPACT_SAVES: Final = names("xsavec xsavec64 xsaves xsaves64")
_RESTORES: Final = names("xrstor xrstor64 xrstors xrstors64")
NAMES: Final = _SAVES | _COMPACT_SAVES | _RESTORES
_SUPERVISOR: Final = names("xsaves xsaves64 xrstors xrstors64")
_COMPACTED: Final = 1 << 63
# x87 without and with its registers, MXCSR, the XMM registers.
_X87_PARTS: Final = ((0, 24), (32, 128))
_MXCSR: Final = (24, 8)
_XMM: Final = (160, 256)


class Area(NamedTuple):
    """What is asked for, and where it is."""

    wanted: int
    """The requested components (RFBM), a bit each."""
    present: int
    """Those that have a place in the compacted format."""
    compacted: bool


def accesses(cpu: Cpu, memory: GuestPhysical, name: str, at: int) -> list[Operand] | None:
    """List the accesses of one such instruction to the area at linear address ``at``; None if XCR0 cannot be had.

    Nothing orders them: XRSTOR needs the header to know its components, but may look at the rest before. A component in
    its initial state, which XSAVEC, XSAVES and XSAVEOPT need not write, counts as written.
    """
    xcr0 = cpu.extended.xcr0
    if xcr0 is None:
        return None
    enabled = xcr0 | (cpu.extended.xss if name in _SUPERVISOR else 0)
    wanted = (cpu.get("edx") << 32 | cpu.get("eax")) & enabled
    if name in _RESTORES:
        access, parts = Access.READ, _restored(cpu, memory, at, wanted)
    else:
        compacted = name in _COMPACT_SAVES
        access, parts = Access.WRITE, [*_parts(cpu, Area(wanted, wanted, compacted))]
        parts.append((LEGACY, HEADER if compacted else 8))
    found = [Operand(at + offset, size, access, "operand", 1, ordered=False) for offset, size in parts]
    # A processor may look at all of the legacy part, whatever of it is asked for; QEMU's CPU does.
    return [*found, Operand(at, LEGACY, access, "operand", 1, ordered=False, certain=False)]


def _restored(cpu: Cpu, memory: GuestPhysical, at: int, wanted: int) -> list[tuple[int, int]]:
    """What XRSTOR reads: the header, and what that says is there."""
    header = (LEGACY, HEADER)
    state, format = (read(cpu, memory, at + LEGACY + offset, 8, system=False) for offset in (0, 8))
    if state is None or format is None:
        return [header]
    area = Area(wanted & state, format & ~_COMPACTED, bool(format & _COMPACTED))
    parts = [header, *_parts(cpu, area)]
    if wanted & (1 << SSE | 1 << AVX) and _MXCSR not in parts and not area.compacted:
        parts.append(_MXCSR)  # loaded even if the state in memory is the initial one
    return parts


def _parts(cpu: Cpu, area: Area) -> Iterator[tuple[int, int]]:
    """Offset and size of each part, but for the header."""
    if area.wanted >> X87 & 1:
        yield from _X87_PARTS
    if area.wanted & (1 << SSE | 1 << AVX):
        yield _MXCSR
    if area.wanted >> SSE & 1:
        yield _XMM
    place = LEGACY + HEADER
    for number, component in sorted(cpu.extended.components.items()):
        if area.compacted:
            if not area.present >> number & 1:
                continue
            place = -(-place // 64) * 64 if component.aligned else place
        if area.wanted >> number & 1:
            yield (place if area.compacted else component.offset), component.size
        place += component.size
