"""What instructions do to the memory operand they name, and how many bytes of it: reviewed tables, by mnemonic.

Capstone's access flags are wrong for most stores of SSE4, AVX and AVX-512, for TEST, and for the x87, and not used.
Intel's operand order decides instead: memory that is not the first operand is read, and memory that is the first is
what ``_FIRST`` says, which has every mnemonic with such an operand that Capstone 5 knows (tests/test_annotate_decode.py
generates all encodings and compares). Sources: Intel SDM volume 2, AMD APM volumes 3 to 5, by instruction.
"""

from __future__ import annotations

from typing import Any, Final

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.decode import Instruction

NOTHING: Final[tuple[Access, ...]] = ()
READ, WRITE = (Access.READ,), (Access.WRITE,)
UPDATE = (Access.READ, Access.WRITE)


def names(text: str) -> frozenset[str]:
    """Split a list of mnemonics."""
    return frozenset(text.split())


# Addresses only: hints, and instructions that do not touch what they name.
_ADDRESS_ONLY: Final = names(
    "lea nop invlpg invlpga prefetch prefetchw prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchwt1 cldemote "
    "endbr64 endbr32 ud0 ud1 bndmk bndcl bndcu bndcn"
)
CACHE: Final = names("clflush clflushopt clwb")
"""A byte of the line is checked like a load (SDM, CLFLUSH; APM volume 3, CLFLUSH); emulated CPUs do not."""
_FIRST_READ: Final = names(
    "bound bt call cmp div fadd fbld fcom fcomp fdiv fdivr fiadd ficom ficomp fidiv fidivr fild fimul fisub fisubr "
    "fld fldcw fldenv fmul frstor fsub fsubr fxrstor fxrstor64 idiv imul jmp lcall ldmxcsr lgdt lidt ljmp lldt lmsw "
    "ltr mul ptwrite push test verr verw vldmxcsr vmclear vmptrld vmxon xrstor xrstor64 xrstors xrstors64"
)
_FIRST_UPDATE: Final = names(
    "adc add and arpl btc btr bts clrssbsy cmpxchg cmpxchg16b cmpxchg8b dec inc neg not or rcl rcr rol ror rstorssp "
    "sal sar sbb shl shld shr shrd sub xadd xchg xor"
)
_FIRST_WRITE: Final = names(
    "bndmov extractps fbstp fist fistp fisttp fnsave fnstcw fnstenv fnstsw fst fstp fxsave fxsave64 kmovb kmovd kmovq "
    "kmovw mov movabs movapd movaps movbe movd movdiri movdqa movdqu movhpd movhps movlpd movlps movntdq movnti "
    "movntpd movntps movntq movntsd movntss movq movsd movss movupd movups pextrb pextrd pextrq pextrw pop seta setae "
    "setb setbe sete setg setge setl setle setne setno setnp setns seto setp sets sgdt sidt sldt smsw stmxcsr str "
    "vcompresspd vcompressps vcvtps2ph vextractf128 vextractf32x4 vextractf32x8 vextractf64x2 vextractf64x4 "
    "vextracti128 vextracti32x4 vextracti32x8 vextracti64x2 vextracti64x4 vextractps vmaskmovpd vmaskmovps vmovapd "
    "vmovaps vmovd vmovdqa vmovdqa32 vmovdqa64 vmovdqu vmovdqu16 vmovdqu32 vmovdqu64 vmovdqu8 vmovhpd vmovhps vmovlpd "
    "vmovlps vmovntdq vmovntpd vmovntps vmovq vmovsd vmovss vmovupd vmovups vmptrst vmread vpcompressb vpcompressd "
    "vpcompressq vpcompressw vpextrb vpextrd vpextrq vpextrw vpmaskmovd vpmaskmovq vpmovdb vpmovdw vpmovqb vpmovqd "
    "vpmovqw vpmovsdb vpmovsdw vpmovsqb vpmovsqd vpmovsqw vpmovswb vpmovusdb vpmovusdw vpmovusqb vpmovusqd vpmovusqw "
    "vpmovuswb vpmovwb vpscatterdd vpscatterdq vpscatterqd vpscatterqq vscatterdpd vscatterdps vscatterqpd "
    "vscatterqps vstmxcsr wrssd wrssq wrussd wrussq xsave xsave64 xsavec xsavec64 xsaveopt xsaveopt64 xsaves xsaves64"
)
_FIRST: Final = {
    **dict.fromkeys(_ADDRESS_ONLY, NOTHING),
    **dict.fromkeys(_FIRST_READ | CACHE, READ),
    **dict.fromkeys(_FIRST_UPDATE, UPDATE),
    **dict.fromkeys(_FIRST_WRITE, WRITE),
}
_UNKNOWN: Final = names("bndstx bndldx")  # they walk a table of their own; MPX is gone
# Where Capstone has no size, or a wrong one.
_SIZES: Final = {
    **dict.fromkeys(names("fxsave fxsave64 fxrstor fxrstor64"), 512),
    **dict.fromkeys(names("fnstcw fldcw fnstsw sldt str smsw lldt ltr lmsw lar lsl verr verw"), 2),
    **dict.fromkeys(names("fbld fbstp"), 10),
    **dict.fromkeys(names("stmxcsr ldmxcsr vstmxcsr vldmxcsr"), 4),
    **dict.fromkeys(names("cmpxchg8b comisd rstorssp clrssbsy vmclear vmptrld vmptrst vmxon"), 8),
    **dict.fromkeys(names("cmpxchg16b invept invvpid invpcid"), 16),
    **dict.fromkeys(CACHE, 1),
    "movsxd": 4,
}
_UNORDERED: Final = names("fxsave fxsave64 fxrstor fxrstor64 fnsave frstor fbld fbstp")


def known(insn: Instruction) -> bool:
    """Whether it is known what the instruction does to its memory operands."""
    if insn.name in _UNKNOWN:
        return False
    first = insn.operands[:1]
    return not first or first[0] not in insn.memory or insn.name in _FIRST


def kinds(insn: Instruction, operand: Any) -> tuple[Access, ...]:
    """How an operand is accessed, in order; nothing for one that is an address only."""
    if operand is insn.operands[0]:
        return _FIRST[insn.name]
    return NOTHING if insn.name in _ADDRESS_ONLY else READ


def ordered(insn: Instruction) -> bool:
    """Whether the bytes of an operand are touched from the lowest on."""
    return insn.name not in _UNORDERED


def size_of(cpu: Cpu, insn: Instruction, operand: Any) -> int:
    """Bytes of a memory operand."""
    mnemonic = insn.name
    size = insn.prefixes.operand_size(cpu.bits)
    if mnemonic in _SIZES:
        return _SIZES[mnemonic]
    if mnemonic in ("lgdt", "lidt", "sgdt", "sidt"):
        return 10 if cpu.bits == 64 else 6
    if mnemonic in ("fnstenv", "fldenv"):
        return 14 if size == 2 else 28
    if mnemonic in ("fnsave", "frstor"):
        return 94 if size == 2 else 108
    if mnemonic in ("lcall", "ljmp", "lss", "lds", "les", "lfs", "lgs"):
        return size + 2
    if mnemonic == "bound":
        return 2 * size
    if mnemonic in ("vgf2p8affineqb", "vgf2p8affineinvqb") and operand.size == 1:
        return 8  # broadcast
    if mnemonic in ("vpextrq", "vpinsrq") and cpu.bits != 64:
        return 4  # W is ignored
    if mnemonic in ("call", "jmp") and size == 2:
        return 2  # AMD's; Intel ignores the prefix in 64-bit code
    return int(operand.size) or 1
