"""Loading segment registers: the selector, wherever it comes from, then the descriptor it selects."""

from __future__ import annotations

from typing import Final

from anykvm.layers.annotate import decode as d
from anykvm.layers.annotate import tables
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import RFLAGS_NT, RFLAGS_VM, Cpu
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand, pop, push
from anykvm.layers.annotate.reading import read

READ, WRITE = Access.READ, Access.WRITE
FAR_RETURNS: Final = frozenset(("retf", "retfq", "iret", "iretd", "iretq"))
_FAR_TRANSFERS: Final = frozenset(("lcall", "ljmp"))
_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs")
_FAR_POINTERS: Final = frozenset(("lds", "les", "lss", "lfs", "lgs"))
_FROM_OPERAND: Final = frozenset(("lldt", "ltr", "lar", "lsl", "verr", "verw"))
_ACCESSED: Final = 1 << 40
_CODE_OR_DATA: Final = 1 << 44
_PRESENT: Final = 1 << 47
_STEP: Final = 20
"""Behind whatever brought the selector."""


def descriptor(cpu: Cpu, selector: int, size: int = 8, step: int = 4) -> list[Operand]:
    """The read of a descriptor; nothing for a null selector or one beyond its table."""
    if selector & 0xFFFC == 0:
        return []
    base, limit = (
        (cpu.sregs.ldt.base, cpu.sregs.ldt.limit) if selector & 4 else (cpu.sregs.gdt.base, cpu.sregs.gdt.limit)
    )
    if (selector & ~7) + 7 > limit:
        return []
    return [Operand(cpu.system(base, selector & ~7), size, READ, "descriptor", step, system=True)]


def loads(cpu: Cpu, memory: GuestPhysical, insn: d.Instruction, mnemonic: str) -> list[Operand]:
    """List what an instruction touches because it loads segment registers, or asks about a selector."""
    if mnemonic in FAR_RETURNS:
        return _far_return(cpu, memory, insn, mnemonic)
    if mnemonic in _FAR_TRANSFERS:
        return _far_transfer(cpu, memory, insn, mnemonic)
    selector = None if _real(cpu) else _selector(cpu, memory, insn, mnemonic)
    if selector is None:
        return []
    if mnemonic in _FROM_OPERAND:
        found = descriptor(cpu, selector, 16 if cpu.long and mnemonic in ("ltr", "lldt") else 8, _STEP)
        return found + _marked(cpu, memory, found, 1 << 41) if mnemonic == "ltr" else found  # it is busy then
    found = descriptor(cpu, selector, step=_STEP)
    return found + _marked(cpu, memory, found, _ACCESSED)


def _marked(cpu: Cpu, memory: GuestPhysical, found: list[Operand], bit: int) -> list[Operand]:
    """The write that sets a bit of a descriptor's type, if the bit is clear and the descriptor is one to be loaded."""
    value = read(cpu, memory, found[0].linear, 8) if found else None
    if value is None or value & bit or not value & _PRESENT or bool(value & _CODE_OR_DATA) != (bit == _ACCESSED):
        return []
    return [Operand(found[0].linear + 4, 4, WRITE, "descriptor", found[0].step + 1, system=True)]


def _selector(cpu: Cpu, memory: GuestPhysical, insn: d.Instruction, mnemonic: str) -> int | None:
    """The selector an instruction loads or asks about; None if it does not, or it cannot be known."""
    if mnemonic in _FAR_POINTERS:
        operand = insn.memory[0]
        at = d.address(cpu, insn, operand) + tables.size_of(cpu, insn, operand) - 2
        return read(cpu, memory, at, 2, system=False)
    operands = insn.operands
    if mnemonic == "pop" and insn.register(operands[0]) in _SEGMENTS:
        return read(cpu, memory, cpu.stack(0), 2, system=False)
    if mnemonic == "mov":
        if insn.register(operands[0]) not in _SEGMENTS:
            return None
    elif mnemonic not in _FROM_OPERAND:
        return None
    source = operands[-1]
    if register := insn.register(source):
        return cpu.get(register) & 0xFFFF
    return read(cpu, memory, d.address(cpu, insn, source), 2, system=False)


def _real(cpu: Cpu) -> bool:
    """Whether a selector is not looked up."""
    return not cpu.protected or cpu.v86


def _far_transfer(cpu: Cpu, memory: GuestPhysical, insn: d.Instruction, mnemonic: str) -> list[Operand]:
    """JMP and CALL to another segment. Through a gate or a TSS they touch more, which is not known here."""
    size = insn.prefixes.operand_size(cpu.bits)
    selector = insn.immediate(insn.operands[0])
    if selector is None:
        at = d.address(cpu, insn, insn.memory[0])
        selector = read(cpu, memory, at + size, 2, system=False)
    if selector is None:
        return []
    found = [] if _real(cpu) else descriptor(cpu, selector & 0xFFFF, step=_STEP)
    if mnemonic == "lcall" and (_real(cpu) or _is_code(cpu, memory, found)):
        found += push(cpu, 2, size, step=_STEP + 1)
    return found


def _is_code(cpu: Cpu, memory: GuestPhysical, found: list[Operand]) -> bool:
    """Whether a descriptor is of a code segment that is present."""
    value = read(cpu, memory, found[0].linear, 8) if found else None
    return value is not None and value & _PRESENT != 0 and value >> 43 & 3 == 3


def _far_return(cpu: Cpu, memory: GuestPhysical, insn: d.Instruction, mnemonic: str) -> list[Operand]:
    """RETF and IRET: what they pop, and the descriptors of CS and, to another privilege level, of SS."""
    size = insn.prefixes.operand_size(cpu.bits)
    interrupt = mnemonic.startswith("iret")
    count = 3 if interrupt else 2
    if interrupt and not _real(cpu) and not cpu.long and cpu.regs.rflags & RFLAGS_NT:
        return []  # to another task
    found = pop(cpu, count, size)
    selector = read(cpu, memory, cpu.stack(size), 2, system=False)
    if _real(cpu) or selector is None:
        return found
    flags = read(cpu, memory, cpu.stack(2 * size), size, system=False) if interrupt else 0
    if flags is None:
        return found
    if interrupt and flags & RFLAGS_VM and not cpu.long and cpu.cpl == 0 and size > 2:
        return found + pop(cpu, 6, size, 3 * size, _STEP)
    target = descriptor(cpu, selector, step=_STEP)
    if not _is_code(cpu, memory, target):
        return found + target
    outer = selector & 3 > cpu.cpl
    if not outer and not (interrupt and cpu.bits == 64):
        return found + target
    extra = (insn.immediate(insn.operands[0]) or 0) if not interrupt and insn.operands else 0
    # The processor's manual does not say whether the stack pointer or the descriptor comes first.
    found += target + [op._replace(step=_STEP) for op in pop(cpu, 2, size, count * size + extra)]
    stack = read(cpu, memory, cpu.stack((count + 1) * size + extra), 2, system=False)
    return found if stack is None else found + descriptor(cpu, stack, step=_STEP + 1)
