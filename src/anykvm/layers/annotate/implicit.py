"""What instructions touch without naming it: the stack and string operands; descriptors are ``segments``'s."""

from __future__ import annotations

from typing import Any, Final

from capstone import x86_const as c

from anykvm.layers.annotate import decode as d
from anykvm.layers.annotate import segments
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import RFLAGS_OF, Cpu
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand, pop, push
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


def software_interrupt(cpu: Cpu, insn: Any) -> int | None:
    """The vector an instruction asks for, or None."""
    mnemonic = d.name(insn)
    if mnemonic == "int":
        return int(insn.operands[0].imm) & 0xFF
    if mnemonic == "into" and not cpu.regs.rflags & RFLAGS_OF:
        return None
    return _SOFTWARE.get(mnemonic)


def accesses(cpu: Cpu, memory: GuestPhysical, insn: Any) -> list[Operand]:
    """List every data access of the instruction in the order it is made, named operands included.

    Where one depends on what another brings, as a descriptor on its selector, that is read from ``memory``; what cannot
    be known ends the list.
    """
    mnemonic = d.name(insn)
    string = _string(cpu, insn, mnemonic)
    if string is not None:
        return string if mnemonic[:-1] not in ("ins", "outs") else _permission(cpu, memory, cpu.get("dx")) + string
    if mnemonic in ("in", "out"):
        port = insn.operands[mnemonic == "in"]
        return _permission(cpu, memory, int(port.imm) & 0xFF if port.type == c.X86_OP_IMM else cpu.get("dx"))
    if mnemonic in ("xlatb", "xlat"):
        named = d.memory_operands(insn)
        segment = d.segment_of(insn, named[0].mem) if named else "ds"
        base = {16: "bx", 32: "ebx", 64: "rbx"}[insn.addr_size * 8]
        return [Operand(cpu.linear(segment, cpu.get(base) + cpu.get("al"), insn.addr_size * 8), 1, READ, "operand")]
    if mnemonic in ("maskmovdqu", "maskmovq"):
        register = {16: "di", 32: "edi", 64: "rdi"}[insn.addr_size * 8]
        at = cpu.linear("ds", cpu.get(register), insn.addr_size * 8)
        return [Operand(at, 16 if mnemonic == "maskmovdqu" else 8, WRITE, "operand", ordered=False)]
    return _stack(cpu, insn, mnemonic) + segments.loads(cpu, memory, insn, mnemonic)


def _string(cpu: Cpu, insn: Any, mnemonic: str) -> list[Operand] | None:
    kind = _STRINGS.get(mnemonic[:-1])
    if kind is None or _is_sse(insn):
        return None
    bits = insn.addr_size * 8
    if insn.prefix[0] in (0xF2, 0xF3) and not cpu.regs.rcx & (1 << bits) - 1:
        return []  # repeated no times
    size = _WIDTHS[mnemonic[-1]]
    segment = {0x2E: "cs", 0x36: "ss", 0x26: "es", 0x64: "fs", 0x65: "gs"}.get(insn.prefix[1], "ds")
    source = cpu.linear(segment, cpu.regs.rsi, bits)
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


def _is_sse(insn: Any) -> bool:
    """MOVSD and CMPSD are also names of SSE instructions, which have a two-byte opcode."""
    return bool(insn.opcode[0] == 0x0F)


def _stack_size(cpu: Cpu, insn: Any) -> int:
    """Bytes of a push or pop."""
    if cpu.bits == 64:
        return 2 if insn.prefix[2] == 0x66 else 8
    return d.operand_size(cpu, insn)


def _stack(cpu: Cpu, insn: Any, mnemonic: str) -> list[Operand]:
    """Instructions with a stack operand, and all that have only named ones."""
    size = _stack_size(cpu, insn)
    if mnemonic.startswith("pop") and mnemonic != "popcnt":
        if mnemonic.startswith(("popa",)):
            return [Operand(cpu.stack(0), 8 * size, READ, "stack", 1, ordered=False)]
        return pop(cpu, 1, size) + [op._replace(step=5) for op in d.explicit(cpu, insn, size)]
    if mnemonic.startswith("pusha"):
        return [Operand(cpu.stack(-8 * size), 8 * size, WRITE, "stack", 1, ordered=False)]
    named = d.explicit(cpu, insn)
    if mnemonic.startswith("push") or mnemonic == "call":
        return named + push(cpu, 1, size)
    if mnemonic == "ret":
        return pop(cpu, 1, size)
    if mnemonic in segments.FAR_RETURNS:
        return []  # all of it is there
    if mnemonic == "leave":
        bits = cpu.stack_bits
        return [Operand(cpu.linear("ss", cpu.regs.rbp, bits), size, READ, "stack", 1)]
    if mnemonic == "enter":
        return _enter(cpu, insn, size)
    return named


def _enter(cpu: Cpu, insn: Any, size: int) -> list[Operand]:
    level = int(insn.operands[1].imm) & 31
    found = push(cpu, 1, size, step=1)
    for index in range(1, level):
        at = cpu.linear("ss", cpu.regs.rbp - size * index, cpu.stack_bits)
        found.append(Operand(at, size, READ, "stack", 2 * index))
        found.append(Operand(cpu.stack(-size * (index + 1)), size, WRITE, "stack", 2 * index + 1))
    if level:
        found.append(Operand(cpu.stack(-size * (level + 1)), size, WRITE, "stack", 2 * level))
    return found
