"""All that an instruction touches: named operands, the stack, string operands; descriptors are ``segments``'s."""

from __future__ import annotations

from typing import Any, Final

from anykvm.layers.annotate import decode as d
from anykvm.layers.annotate import elements, segments, tables, xsave
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import RFLAGS_OF, Cpu
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand, Unknown, pop, push
from anykvm.layers.annotate.reading import read

READ, WRITE = Access.READ, Access.WRITE
_STRINGS: Final = {
    # name without its size: (reads [rsi], reads [rdi], writes [rdi])
    "movs": (True, False, True),
    "cmps": (True, True, False),
    "scas": (False, True, False),
    "lods": (True, False, False),
    "stos": (False, False, True),
    "ins": (False, False, True),
    "outs": (True, False, False),
}
_WIDTHS: Final = {"b": 1, "w": 2, "d": 4, "q": 8}
_SOFTWARE: Final = {"int3": 3, "into": 4, "int1": 1}
_LINE: Final = 64
_BIT_STRINGS: Final = frozenset(("bt", "bts", "btr", "btc"))
_NESTED: Final = frozenset(("vmrun", "vmload", "vmsave", "vmlaunch", "vmresume", "invlpga", "skinit", "rsm"))


def software_interrupt(cpu: Cpu, insn: d.Instruction) -> int | None:
    """The vector an instruction asks for, or None."""
    if insn.name == "int":
        return (insn.immediate(insn.operands[0]) or 0) & 0xFF
    if insn.name == "into" and not cpu.regs.rflags & RFLAGS_OF:
        return None
    return _SOFTWARE.get(insn.name)


def accesses(cpu: Cpu, memory: GuestPhysical, insn: d.Instruction) -> list[Operand]:
    """List every data access of the instruction in the order it is made, named operands included.

    Where one depends on what another brings, as a descriptor on its selector, that is read from ``memory``; what cannot
    be known there ends the list. Raises Unknown where it is not known what the instruction touches.
    """
    string = _string(cpu, insn)
    if string is not None:
        return string if insn.name[:-1] not in ("ins", "outs") else _permission(cpu, memory, cpu.get("dx")) + string
    if insn.name in _NESTED or not tables.known(insn):
        raise Unknown(f"what {insn.name} touches is not known here")
    if insn.name in ("in", "out"):
        port = insn.immediate(insn.operands[insn.name == "in"])
        return _permission(cpu, memory, cpu.get("dx") if port is None else port & 0xFF)
    if insn.name in ("xlatb", "xlat"):
        return [Operand(d.implied(cpu, insn, "bx", cpu.get("al")), 1, READ, "operand")]
    if insn.name == "clzero":
        return [Operand(d.implied(cpu, insn, "ax") & -_LINE, _LINE, WRITE, "operand")]
    if insn.name in ("monitor", "monitorx"):
        return [Operand(d.implied(cpu, insn, "ax"), 1, READ, "operand", certain=False)]  # as a load, on hardware
    vector = elements.accesses(cpu, insn)
    if vector is not None:
        return vector
    if insn.name in xsave.NAMES:
        area = xsave.accesses(cpu, memory, insn.name, d.address(cpu, insn, insn.memory[0]))
        if area is None:
            raise Unknown(f"the parts of the area that {insn.name} touches: XCR0 cannot be read")
        return area
    return _stack(cpu, insn) + segments.loads(cpu, memory, insn, insn.name)


def _string(cpu: Cpu, insn: d.Instruction) -> list[Operand] | None:
    kind = _STRINGS.get(insn.name[:-1])
    if kind is None or insn.two_byte:
        return None
    bits = d.address_bits(cpu, insn)
    if insn.prefixes.repeat and not cpu.regs.rcx & (1 << bits) - 1:
        return []  # repeated no times
    size = _WIDTHS[insn.name[-1]]
    source = d.implied(cpu, insn, "si")
    target = cpu.linear("es", cpu.regs.rdi, bits)
    reads_source, reads_target, writes_target = kind
    found = []
    if reads_source:
        found.append(Operand(source, size, READ, "operand", 1))
    if reads_target:
        found.append(Operand(target, size, READ, "operand", 1))
    if writes_target:
        found.append(Operand(target, size, WRITE, "operand", 2))
    return found


def _permission(cpu: Cpu, memory: GuestPhysical, port: int) -> list[Operand]:
    """What says whether a port may be used: the I/O permission bitmap in the TSS, where IOPL does not say so."""
    level = cpu.regs.rflags >> 12 & 3
    if not cpu.protected or (cpu.cpl <= level and not cpu.v86) or cpu.sregs.tr.limit < 0x67:
        return []
    at = cpu.system(cpu.sregs.tr.base, 0x66)
    found = [Operand(at, 2, READ, "tss", 0, system=True)]
    offset = read(cpu, memory, at, 2)
    if offset is None or offset + port // 8 + 1 > cpu.sregs.tr.limit:
        return found
    return [*found, Operand(cpu.system(cpu.sregs.tr.base, offset + port // 8), 2, READ, "tss", 0, system=True)]


def _named(cpu: Cpu, insn: d.Instruction, shift: int = 0) -> list[Operand]:
    """List the accesses to named operands: what is read first, then what is written."""
    found: list[Operand] = []
    for operand in insn.memory:
        at, size = d.address(cpu, insn, operand, shift), tables.size_of(cpu, insn, operand)
        if insn.name in _BIT_STRINGS and (register := insn.register(insn.operands[1])):
            at = _bit_string(cpu, insn, operand, size, register)
        for access in tables.kinds(insn, operand):
            step = 1 if access is READ else 2
            certain = insn.name not in tables.CACHE
            found.append(Operand(at, size, access, "operand", step, ordered=tables.ordered(insn), certain=certain))
    if insn.name == "movdir64b":
        register = insn.register(insn.operands[0])
        at = cpu.linear("es", cpu.get(register), d.address_bits(cpu, insn))
        found.append(Operand(at, _LINE, WRITE, "operand", 2))
    return sorted(found, key=lambda operand: operand.step)


def _bit_string(cpu: Cpu, insn: d.Instruction, operand: Any, size: int, register: str) -> int:
    """BT and its kin with a register reach beyond the operand: the register counts bits, and is signed."""
    bits = cpu.width(register)
    value = cpu.get(register)
    value -= (value >> bits - 1) << bits
    offset = d.address(cpu, insn, operand)
    step = (value >> {2: 4, 4: 5, 8: 6}[size]) * size
    segment, address = d.segment_of(insn, operand.mem), d.address_bits(cpu, insn)
    base = cpu.linear(segment, 0, address)
    return cpu.linear(segment, offset - base + step, address)


def _stack_size(cpu: Cpu, insn: d.Instruction) -> int:
    """Bytes of a push or pop."""
    size = insn.prefixes.operand_size(cpu.bits)
    return 8 if cpu.bits == 64 and size == 4 else size


def _stack(cpu: Cpu, insn: d.Instruction) -> list[Operand]:
    """Instructions with a stack operand, and all that have only named ones."""
    size, mnemonic = _stack_size(cpu, insn), insn.name
    if mnemonic.startswith("pop") and mnemonic != "popcnt":
        if mnemonic.startswith("popa"):
            return [Operand(cpu.stack(0), 8 * size, READ, "stack", 1, ordered=False)]
        return pop(cpu, 1, size) + [op._replace(step=5) for op in _named(cpu, insn, size)]
    if mnemonic.startswith("pusha"):
        return [Operand(cpu.stack(-8 * size), 8 * size, WRITE, "stack", 1, ordered=False)]
    named = _named(cpu, insn)
    if mnemonic.startswith("push") or mnemonic == "call":
        return named + push(cpu, 1, size)
    if mnemonic == "ret":
        return pop(cpu, 1, size)
    if mnemonic in segments.FAR_RETURNS:
        return []  # all of it is there
    if mnemonic == "leave":
        return [Operand(cpu.linear("ss", cpu.regs.rbp, cpu.stack_bits), size, READ, "stack", 1)]
    if mnemonic == "enter":
        return _enter(cpu, insn, size)
    return named


def _enter(cpu: Cpu, insn: d.Instruction, size: int) -> list[Operand]:
    level = (insn.immediate(insn.operands[1]) or 0) & 31
    found = push(cpu, 1, size, step=1)
    for index in range(1, level):
        at = cpu.linear("ss", cpu.regs.rbp - size * index, cpu.stack_bits)
        found.append(Operand(at, size, READ, "stack", 2 * index))
        found.append(Operand(cpu.stack(-size * (index + 1)), size, WRITE, "stack", 2 * index + 1))
    if level:
        found.append(Operand(cpu.stack(-size * (level + 1)), size, WRITE, "stack", 2 * level))
    return found
