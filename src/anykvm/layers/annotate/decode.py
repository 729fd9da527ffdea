"""From instruction bytes to an instruction with addresses; what it does at them is ``tables``'s and ``implicit``'s."""

from __future__ import annotations

import threading
from typing import Any, Final

import capstone
from capstone import x86_const as c

from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.prefixes import ADDRESS, Prefixes, parse, plain

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction."""

_MODES: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_LOCK: Final = threading.Lock()  # a capstone handle is for one thread at a time
_ENGINES: Final[dict[int, Any]] = {}
_FAR: Final = {3: "lcall", 5: "ljmp"}
_MOVSXD, _MOV = 0x63, 0x8B
# Of VEX: they ignore W, and Capstone knows only those with W clear.
_W_IGNORED: Final = frozenset(
    ("vpackusdw", "vpcmpestri", "vpcmpestrm", "vpcmpistri", "vpcmpistrm")
    + ("vpextrb", "vpextrw", "vphsubd", "vpinsrb", "vpinsrw")
)


class Instruction:
    """A decoded instruction as it stands in the guest."""

    def __init__(self, insn: Any, prefixes: Prefixes, size: int, mnemonic: str) -> None:
        """Wrap Capstone's ``insn``, of other bytes that mean the same; ``size`` is that of the guest's."""
        self.insn = insn
        self.prefixes = prefixes
        self.size = size
        self.name = mnemonic
        """The mnemonic without its prefixes."""
        self.operands: list[Any] = insn.operands
        """Capstone's."""
        self.text = f"{insn.mnemonic} {insn.op_str}".strip()
        """As assembler text, in Intel's syntax."""

    @property
    def memory(self) -> list[Any]:
        """The operands that are memory, strings and XLAT included where Capstone lists them."""
        return [operand for operand in self.operands if operand.type == c.X86_OP_MEM]

    @property
    def two_byte(self) -> bool:
        """Whether the opcode is behind 0F: MOVSD and CMPSD of SSE, not the string instructions."""
        return bool(self.insn.opcode[0] == 0x0F)

    @property
    def locked(self) -> bool:
        """Whether it is one indivisible access: a LOCK prefix, or XCHG with memory."""
        return self.prefixes.lock or bool(self.insn.id == c.X86_INS_XCHG)

    def register(self, operand: Any) -> str:
        """Name a register operand; empty for another kind."""
        return str(self.insn.reg_name(operand.reg)) if operand.type == c.X86_OP_REG else ""

    def immediate(self, operand: Any) -> int | None:
        """The value of an immediate operand; None for another kind."""
        return int(operand.imm) if operand.type == c.X86_OP_IMM else None

    def base(self, memory: Any) -> str:
        """Name the base register of a memory operand; empty without one."""
        return str(self.insn.reg_name(memory.base)) if memory.base else ""

    def index(self, memory: Any) -> str:
        """Name the index register of a memory operand; empty without one."""
        return str(self.insn.reg_name(memory.index)) if memory.index else ""


def decode(cpu: Cpu, code: bytes) -> Instruction | None:
    """Decode the first instruction of ``code``, which stands at the vCPU's RIP; None if it is none, or is cut off."""
    code = code[:MAX_LENGTH]
    prefixes = parse(code, cpu.bits)
    written, more, bits = plain(code, cpu.bits, prefixes)
    insn = _capstone(bits, written, cpu.regs.rip)
    if insn is not None:
        return Instruction(insn, prefixes, insn.size - more, _name(insn))
    return _movsxd(cpu, code, prefixes) or _without_w(cpu, code, prefixes)


def _capstone(bits: int, code: bytes, rip: int) -> Any | None:
    with _LOCK:
        engine = _ENGINES.get(bits)
        if engine is None:
            engine = _ENGINES[bits] = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
            engine.detail = True
        return next(engine.disasm(code, rip, 1), None)


def _name(insn: Any) -> str:
    if insn.opcode[0] == 0xFF and insn.modrm >> 3 & 7 in _FAR:
        return _FAR[insn.modrm >> 3 & 7]  # capstone calls them near in 64-bit code
    return str(insn.mnemonic.rsplit(" ", 1)[-1])


def _movsxd(cpu: Cpu, code: bytes, prefixes: Prefixes) -> Instruction | None:
    """67 63 /r in 64-bit code, which Capstone does not know: decoded as the MOV with the same operands."""
    at = prefixes.length
    if cpu.bits != 64 or code[at : at + 1] != bytes((_MOVSXD,)):
        return None
    other = bytes((ADDRESS, prefixes.rex or 0x40, _MOV)) + code[at + 1 :]
    insn = _capstone(64, other, cpu.regs.rip)
    if insn is None:
        return None
    found = Instruction(insn, prefixes, insn.size - 3 + at + 1, "movsxd")
    found.text = f"movsxd {insn.op_str.replace('qword', 'dword')}"
    return found


def _without_w(cpu: Cpu, code: bytes, prefixes: Prefixes) -> Instruction | None:
    """An instruction of ``_W_IGNORED`` with W set."""
    at = prefixes.length
    if len(code) < at + 3 or code[at] != 0xC4 or not code[at + 2] & 0x80:
        return None
    other = code[: at + 2] + bytes((code[at + 2] & 0x7F,)) + code[at + 3 :]
    written, more, bits = plain(other, cpu.bits, prefixes)
    insn = _capstone(bits, written, cpu.regs.rip)
    if insn is None or insn.mnemonic not in _W_IGNORED:
        return None
    return Instruction(insn, prefixes, insn.size - more, insn.mnemonic)


def segment_of(insn: Instruction, memory: Any) -> str:
    """Name the segment of a memory operand."""
    if insn.prefixes.segment:
        return insn.prefixes.segment
    return "ss" if insn.base(memory) in ("rsp", "esp", "rbp", "ebp", "sp", "bp") else "ds"


def address_bits(cpu: Cpu, insn: Instruction) -> int:
    """Bits of the instruction's address size."""
    return insn.prefixes.address_bits(cpu.bits)


def address(cpu: Cpu, insn: Instruction, operand: Any, shift: int = 0, index: int | None = None) -> int:
    """Linear address of a memory operand.

    ``shift`` is added to a base of SP: POP has popped before it. ``index`` stands for the index register's value where
    that is a vector's element.
    """
    memory = operand.mem
    offset = int(memory.disp)
    base = insn.base(memory)
    if base:
        offset += cpu.regs.rip + insn.size if base in ("rip", "eip") else cpu.get(base)
        if base in ("rsp", "esp"):
            offset += shift
    if memory.index:
        offset += (cpu.get(insn.index(memory)) if index is None else index) * memory.scale
    return cpu.linear(segment_of(insn, memory), offset, address_bits(cpu, insn))


def implied(cpu: Cpu, insn: Instruction, register: str, add: int = 0) -> int:
    """Linear address of an operand at DS:``register`` (``ax``: of the address size), which an override moves."""
    bits = address_bits(cpu, insn)
    name = {16: register, 32: f"e{register}", 64: f"r{register}"}[bits]
    return cpu.linear(insn.prefixes.segment or "ds", cpu.get(name) + add, bits)
