"""Vector instructions that touch memory element by element: gathers, scatters, and all that a mask guards.

An element whose mask is clear is not accessed. Where a processor may still look at it (AMD's VMASKMOV, MASKMOVDQU with
nothing selected), or the mask cannot be read, its access is not ``certain``. Sources: Intel SDM volume 2, volume 1
chapter 15.6; AMD APM volume 4.
"""

from __future__ import annotations

import re
from typing import Any, Final

from anykvm.layers.annotate import decode as d
from anykvm.layers.annotate import tables
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import PAGE
from anykvm.layers.annotate.operand import Operand, Unknown

_VSIB: Final = re.compile(r"vp?(gather|scatter)(pf[01])?([dq])(d|q|ps|pd)")
_BYTES: Final = {"d": 4, "q": 8, "ps": 4, "pd": 8}
_MASKED: Final = {"vmaskmovps": 4, "vpmaskmovd": 4, "vmaskmovpd": 8, "vpmaskmovq": 8}
_PACKED: Final = re.compile(r"v(p?)(compress|expand)(b|w|d|q|ps|pd)")
_ELEMENTS: Final = {
    **{"vmovdqu8": 1, "vmovdqu16": 2, "vmovdqu32": 4, "vmovdqa32": 4, "vmovdqu64": 8, "vmovdqa64": 8},
    **{"vmovups": 4, "vmovaps": 4, "vmovupd": 8, "vmovapd": 8},
}


def accesses(cpu: Cpu, insn: d.Instruction) -> list[Operand] | None:
    """List the accesses of such an instruction, in order; None for another. Raises Unknown without its registers."""
    vsib = _VSIB.fullmatch(insn.name)
    if vsib is not None:
        return [] if vsib[2] else _vsib(cpu, insn, Access.READ if vsib[1] == "gather" else Access.WRITE, vsib)
    if insn.name in _MASKED:
        mask = _signs(cpu.extended.register(insn.register(insn.operands[1])), _MASKED[insn.name])
        return _named(cpu, insn, _MASKED[insn.name], mask)
    if insn.name in ("maskmovdqu", "maskmovq"):
        size = 16 if insn.name == "maskmovdqu" else 8
        mask = _signs(cpu.extended.register(insn.register(insn.operands[1])), 1)
        return selected(d.implied(cpu, insn, "di"), size, 1, mask, Access.WRITE)
    register = _opmask(insn)
    return _guarded(cpu, insn, register) if register else None


def _opmask(insn: d.Instruction) -> str:
    """The register that masks an EVEX instruction with a memory operand; empty for none."""
    if not insn.memory or insn.name.startswith("k"):
        return ""
    return next((name for name in map(insn.register, insn.operands[1:]) if re.fullmatch(r"k\d", name)), "")


def _vsib(cpu: Cpu, insn: d.Instruction, access: Access, kind: re.Match[str]) -> list[Operand]:
    """Each element has an address of its own; faults come in the order of the elements."""
    operand = insn.memory[0]
    name = insn.index(operand.mem)
    indices = cpu.extended.register(name)
    if indices is None:
        raise Unknown(f"its index register {name} cannot be read")
    step, size = _BYTES[kind[3]], _BYTES[kind[4]]
    data = insn.operands[0] if access is Access.READ else insn.operands[-1]
    count = min(len(indices) // step, data.size // size)
    register = _opmask(insn)
    if register:
        mask = _bits(cpu.extended.register(register))
    elif len(insn.operands) == 3:
        mask = _signs(cpu.extended.register(insn.register(insn.operands[2])), size)
    else:
        mask = None
    found = []
    for number in range(count):
        if mask is not None and not mask >> number & 1:
            continue
        index = int.from_bytes(indices[step * number : step * (number + 1)], "little", signed=True)
        at = d.address(cpu, insn, operand, index=index)
        found.append(Operand(at, size, access, "operand", number + 1, certain=mask is not None))
    return found


def _guarded(cpu: Cpu, insn: d.Instruction, register: str) -> list[Operand]:
    """EVEX with a mask. Where the size of its elements is not known here, a mixed mask says nothing for sure."""
    operand = insn.memory[0]
    mask = _bits(cpu.extended.register(register))
    size = tables.size_of(cpu, insn, operand)
    packed = _PACKED.fullmatch(insn.name)
    if packed is not None and mask is not None:
        element = {"b": 1, "w": 2, **_BYTES}[packed[3]]
        count = (mask & (1 << size // element) - 1).bit_count()
        return _named(cpu, insn, element, (1 << count) - 1, count * element)
    if insn.name.endswith(("ss", "sd")):
        return _named(cpu, insn, size, mask)
    if insn.name in _ELEMENTS:
        return _named(cpu, insn, _ELEMENTS[insn.name], mask)
    whole = (1 << 64) - 1
    known = mask == 0 or (mask is not None and mask & (1 << size) - 1 == (1 << size) - 1)
    return _named(cpu, insn, 1, (whole if mask else 0) if known else None)


def _named(cpu: Cpu, insn: d.Instruction, element: int, mask: int | None, size: int | None = None) -> list[Operand]:
    """The named operand, as far as the mask selects it."""
    operand: Any = insn.memory[0]
    at = d.address(cpu, insn, operand)
    size = tables.size_of(cpu, insn, operand) if size is None else size
    return [part for kind in tables.kinds(insn, operand) for part in selected(at, size, element, mask, kind)]


def selected(at: int, size: int, element: int, mask: int | None, access: Access) -> list[Operand]:
    """An access of ``size`` bytes of which ``mask`` selects elements: one for each page, the selected bytes or none."""
    found: list[Operand] = []
    start, end = at, at + size
    while start < end:
        stop = min(end, (start // PAGE + 1) * PAGE)
        first, last = (start - at) // element, (stop - 1 - at) // element
        chosen = [number for number in range(first, last + 1) if mask is not None and mask >> number & 1]
        low, high = start, stop
        if chosen:
            low, high = max(start, at + chosen[0] * element), min(stop, at + (chosen[-1] + 1) * element)
        found.append(Operand(low, high - low, access, "operand", len(found) + 1, certain=bool(chosen)))
        start = stop
    return found


def _signs(vector: bytes | None, element: int) -> int | None:
    """The elements' sign bits as a mask."""
    if vector is None:
        return None
    return sum((vector[at + element - 1] >> 7) << at // element for at in range(0, len(vector), element))


def _bits(register: bytes | None) -> int | None:
    return None if register is None else int.from_bytes(register, "little")
