"""From instruction bytes to the memory operands it names; what it touches without naming it is ``implicit``'s."""

from __future__ import annotations

import threading
from typing import Any, Final

import capstone
from capstone import x86_const as c

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.operand import Operand

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction."""

READ, WRITE = (Access.READ,), (Access.WRITE,)
UPDATE = (Access.READ, Access.WRITE)

_MODES: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_LOCK: Final = threading.Lock()  # a capstone handle is for one thread at a time
_ENGINES: Final[dict[int, Any]] = {}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operands that are addresses only.
_NOTHING: Final = _names(
    "lea nop invlpg invlpga prefetch prefetchw prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchwt1 "
    "clflush clflushopt clwb cldemote endbr64 endbr32 monitor monitorx ud0 ud1"
)
_X87_STORES: Final = _names(
    "fst fstp fist fistp fisttp fbstp fnstcw fstcw fnstsw fstsw fnstenv fstenv fnsave fsave fxsave "
    "fxsave64 stmxcsr sgdt sidt sldt str smsw xsave xsave64 xsaveopt xsaveopt64 xsavec xsavec64 movnti "
    "vstmxcsr"
)
_LOADS: Final = _names(
    "fxrstor fxrstor64 fldenv frstor fldcw ldmxcsr lgdt lidt lldt ltr lmsw xrstor xrstor64 bound bt cmp "
    "test lds les lfs lgs lss lar lsl verr verw vldmxcsr push call jmp ljmp lcall movbe"
)
_UPDATES: Final = _names(
    "arpl cmpxchg cmpxchg8b cmpxchg16b xadd xchg bts btr btc rol ror rcl rcr shl shr sal sar shld shrd"
)
# What capstone has no right size for.
_SIZES: Final = {
    **dict.fromkeys(("fxsave", "fxsave64", "fxrstor", "fxrstor64"), 512),
    **dict.fromkeys(_names("fnstcw fstcw fldcw fnstsw fstsw sldt str smsw lldt ltr lmsw lar lsl verr verw"), 2),
    **dict.fromkeys(("fbld", "fbstp"), 10),
    **dict.fromkeys(("stmxcsr", "ldmxcsr", "vstmxcsr", "vldmxcsr"), 4),
    "cmpxchg8b": 8,
    "cmpxchg16b": 16,
}
_FAR: Final = {3: "lcall", 5: "ljmp"}
_UNORDERED: Final = _names(
    "fxsave fxsave64 fxrstor fxrstor64 fnsave fsave frstor xsave xsave64 xrstor xrstor64 fbld fbstp"
)


def decode(cpu: Cpu, code: bytes) -> Any | None:
    """Decode the first instruction of ``code``, which stands at the vCPU's RIP; None if it is none, or is cut off."""
    with _LOCK:
        engine = _ENGINES.get(cpu.bits)
        if engine is None:
            engine = _ENGINES[cpu.bits] = capstone.Cs(capstone.CS_ARCH_X86, _MODES[cpu.bits])
            engine.detail = True
        return next(engine.disasm(code[:MAX_LENGTH], cpu.regs.rip, 1), None)


def text(insn: Any) -> str:
    """Give the instruction as assembler text."""
    return f"{insn.mnemonic} {insn.op_str}".strip()


def name(insn: Any) -> str:
    """Give the mnemonic without its prefixes."""
    if insn.opcode[0] == 0xFF and insn.modrm >> 3 & 7 in _FAR:
        return _FAR[insn.modrm >> 3 & 7]  # capstone calls them near in 64-bit code
    return str(insn.mnemonic.rsplit(" ", 1)[-1])


def locked(insn: Any) -> bool:
    """Whether it is one indivisible access: a LOCK prefix, or XCHG with memory."""
    return bool(insn.prefix[0] == c.X86_PREFIX_LOCK or insn.id == c.X86_INS_XCHG)


def operand_size(cpu: Cpu, insn: Any) -> int:
    """Bytes of the operand size, for an instruction without REX.W: 2 or 4."""
    return 2 if (insn.prefix[2] == 0x66) != (cpu.bits == 16) else 4


def segment_of(insn: Any, memory: Any) -> str:
    """Name the segment of a memory operand."""
    if memory.segment:
        return str(insn.reg_name(memory.segment))
    base = insn.reg_name(memory.base) if memory.base else ""
    return "ss" if base in ("rsp", "esp", "rbp", "ebp", "sp", "bp") else "ds"


def address(cpu: Cpu, insn: Any, operand: Any, shift: int = 0) -> int:
    """Linear address of a memory operand; ``shift`` is added to a base of SP: POP has popped before it."""
    memory = operand.mem
    offset = memory.disp
    if memory.base:
        base = insn.reg_name(memory.base)
        offset += cpu.regs.rip + insn.size if base in ("rip", "eip") else cpu.get(base)
        if base in ("rsp", "esp"):
            offset += shift
    if memory.index:
        offset += cpu.get(insn.reg_name(memory.index)) * memory.scale
    return cpu.linear(segment_of(insn, memory), offset, insn.addr_size * 8)


def memory_operands(insn: Any) -> list[Any]:
    """The operands that are memory."""
    return [operand for operand in insn.operands if operand.type == c.X86_OP_MEM]


def kinds(insn: Any, operand: Any) -> tuple[Access, ...]:
    """How an operand is accessed, in order; nothing for one that is an address only."""
    mnemonic = name(insn)
    if mnemonic in _NOTHING:
        return ()
    if mnemonic in _X87_STORES:
        return WRITE
    if mnemonic in _LOADS:
        return WRITE if mnemonic == "movbe" and operand is insn.operands[0] else READ
    if mnemonic in _UPDATES or operand.access == capstone.CS_AC_READ | capstone.CS_AC_WRITE:
        return UPDATE
    if mnemonic.startswith("f"):
        return READ  # x87: the stores are listed above
    if operand.access == capstone.CS_AC_WRITE or (mnemonic.startswith(("mov", "set")) and operand is insn.operands[0]):
        return WRITE
    return READ


def size_of(cpu: Cpu, insn: Any, operand: Any) -> int:
    """Bytes of a memory operand."""
    mnemonic = name(insn)
    if mnemonic in _SIZES:
        return _SIZES[mnemonic]
    if mnemonic in ("lgdt", "lidt", "sgdt", "sidt"):
        return 10 if cpu.bits == 64 else 6
    if mnemonic in ("fnstenv", "fstenv", "fldenv"):
        return 14 if operand_size(cpu, insn) == 2 else 28
    if mnemonic in ("fnsave", "fsave", "frstor"):
        return 94 if operand_size(cpu, insn) == 2 else 108
    if mnemonic in ("lcall", "ljmp", "lss", "lds", "les", "lfs", "lgs"):
        return (8 if insn.rex & 8 else operand_size(cpu, insn)) + 2
    if mnemonic == "bound":
        return 2 * operand_size(cpu, insn)
    return int(operand.size) or 1


def explicit(cpu: Cpu, insn: Any, shift: int = 0) -> list[Operand]:
    """List the accesses to named operands: what is read first, then what is written."""
    found: list[Operand] = []
    mnemonic = name(insn)
    for operand in memory_operands(insn):
        at, size = address(cpu, insn, operand, shift), size_of(cpu, insn, operand)
        if mnemonic in ("bt", "bts", "btr", "btc") and insn.operands[1].type == c.X86_OP_REG:
            at = _bit_string(cpu, insn, operand, size)
        ordered = mnemonic not in _UNORDERED
        for access in kinds(insn, operand):
            step = 1 if access is Access.READ else 2
            found.append(Operand(at, size, access, "operand", step, ordered=ordered))
    return sorted(found, key=lambda operand: operand.step)


def _bit_string(cpu: Cpu, insn: Any, operand: Any, size: int) -> int:
    """BT and its kin with a register reach beyond the operand: the register counts bits, and is signed."""
    register = insn.reg_name(insn.operands[1].reg)
    bits = cpu.width(register)
    value = cpu.get(register)
    value -= (value >> bits - 1) << bits
    memory = operand.mem
    offset = address(cpu, insn, operand)
    step = (value >> {2: 4, 4: 5, 8: 6}[size]) * size
    base = cpu.linear(segment_of(insn, memory), 0, insn.addr_size * 8)
    return cpu.linear(segment_of(insn, memory), offset - base + step, insn.addr_size * 8)
