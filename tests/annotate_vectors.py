"""AVX, AVX2, masks and XSAVE for the annotate layer's bed of a real kernel; the soft backend's engine has no AVX.

Vector registers have indices that reach all operand areas, and masks with some elements set.
"""

from __future__ import annotations

from random import Random
from typing import Final

from annotate_modes import PAGE
from anykvm.abi.structures import kvm_regs, kvm_xcrs
from anykvm.testing.assembler import assemble

VECTOR_MODES: Final = ("long", "compatibility", "pae")  # in 16-bit code QEMU's CPU has no VEX: #UD
CR4_OSXSAVE: Final = 1 << 18
_XCR0: Final = 7
_MXCSR: Final = 0x1F80
_AVX: Final = 576  # where KVM's CPUs have the upper halves of the YMM registers in an XSAVE area

# D is [RDI] and S is [RSI], V is [RDI + XMM1], W is [RDI + YMM1] in words of the mode.
SOURCES: Final = """
vmovdqu %ymm0, D | vmovdqu S, %ymm0 | vmovdqu %xmm0, D | vmovaps %ymm0, D | vmovaps %xmm0, D | vmovaps S, %ymm3
vmovupd %ymm0, D | vmovntdq %ymm0, D | vmovntps %xmm0, D | vmovntpd %ymm0, D | vmovntdqa S, %ymm3 | vlddqu S, %ymm3
vmovd %xmm0, D | vmovd S, %xmm3 | vmovq %xmm0, D | vmovq S, %xmm3 | vmovss %xmm0, D | vmovsd %xmm0, D
vmovss S, %xmm3 | vmovsd S, %xmm3 | vmovlps %xmm0, D | vmovhps %xmm0, D | vmovlpd %xmm0, D | vmovhpd %xmm0, D
vmovhps S, %xmm0, %xmm3 | vextractf128 $1, %ymm0, D | vextracti128 $1, %ymm0, D | vinsertf128 $1, S, %ymm0, %ymm3
vbroadcastss S, %ymm3 | vbroadcastsd S, %ymm3 | vbroadcastf128 S, %ymm3 | vpbroadcastb S, %ymm3
vpbroadcastw S, %xmm3 | vpbroadcastq S, %ymm3 | vpextrb $1, %xmm0, D | vpextrw $1, %xmm0, D | vpextrd $1, %xmm0, D
vextractps $1, %xmm0, D | vpinsrb $1, S, %xmm0, %xmm3 | vpinsrw $1, S, %xmm0, %xmm3 | vpinsrd $1, S, %xmm0, %xmm3
vinsertps $1, S, %xmm0, %xmm3 | vcvtps2ph $0, %ymm0, D | vcvtps2ph $0, %xmm0, D | vcvtph2ps S, %ymm3
vcvtph2ps S, %xmm3 | vcvtps2pd S, %ymm3 | vcvtpd2psy S, %xmm3 | vcvtdq2pd S, %ymm3 | vcvtdq2pd S, %xmm3
vaddps S, %ymm0, %ymm3 | vaddss S, %xmm0, %xmm3 | vaddsd S, %xmm0, %xmm3 | vpaddd S, %ymm0, %ymm3
vpshufd $1, S, %ymm3 | vpmovzxbw S, %ymm3 | vpmovzxbd S, %ymm3 | vpmovsxbq S, %xmm3 | vpmovzxdq S, %ymm3
vpsllw S, %ymm0, %ymm3 | vpermq $1, S, %ymm3 | vptest S, %ymm3 | vpcmpistri $1, S, %xmm3
vroundss $1, S, %xmm0, %xmm3 | vroundsd $1, S, %xmm0, %xmm3 | vsqrtss S, %xmm0, %xmm3 | vmovddup S, %xmm3
vmovddup S, %ymm3 | vmovshdup S, %ymm3 | vucomiss S, %xmm3 | vucomisd S, %xmm3 | vcvtsi2sd S, %xmm0, %xmm3
vcvttss2si S, %eax | vstmxcsr D | vldmxcsr S | vaesenc S, %xmm0, %xmm3 | vpclmulqdq $1, S, %xmm0, %xmm3
vfmadd231ps S, %ymm0, %ymm3 | vfmadd231sd S, %xmm0, %xmm3 | vblendvps %ymm2, S, %ymm0, %ymm3
vpalignr $1, S, %ymm0, %ymm3 | vmaskmovps %ymm0, %ymm2, D | vmaskmovps S, %ymm2, %ymm3 | vmaskmovpd %xmm0, %xmm2, D
vpmaskmovd %ymm0, %ymm2, D | vpmaskmovq %ymm0, %ymm2, D | vpmaskmovd S, %xmm2, %xmm3 | vpmaskmovq S, %ymm2, %ymm3
vgatherdps %xmm2, V, %xmm3 | vgatherdps %ymm2, W, %ymm3 | vgatherdpd %ymm2, V, %ymm3 | vgatherqps %xmm2, W, %xmm3
vgatherqpd %ymm2, W, %ymm3 | vpgatherdd %ymm2, W, %ymm3 | vpgatherdd %xmm2, V, %xmm3 | vpgatherdq %ymm2, V, %ymm3
vpgatherqd %xmm2, V, %xmm3 | vpgatherqq %ymm2, W, %ymm3 | vpgatherqq %xmm2, V, %xmm3 | andn S, %eax, %ecx
bextr %eax, S, %ecx | shlx %eax, S, %ecx | pdep S, %eax, %ecx | rorx $1, S, %ecx | mulx S, %eax, %ecx | blsr S, %eax
bzhi %eax, S, %ecx | adcx S, %eax | adox S, %eax | xsave D | xsaveopt D | xrstor S | xsave D | xrstor S | fxsave D
fxrstor S | maskmovdqu %xmm2, %xmm3 | maskmovq %mm2, %mm3 | pextrb $1, %xmm0, D | pextrw $1, %xmm0, D
pextrd $1, %xmm0, D | extractps $1, %xmm0, D | movntdqa S, %xmm3 | pmovzxbw S, %xmm3 | pmovsxbq S, %xmm3
roundss $1, S, %xmm3 | movq %mm0, D | movntq %mm0, D | punpcklbw S, %mm3 | cvtps2pi S, %mm3 | cvtdq2pd S, %xmm3
lddqu S, %xmm3
"""
LONG: Final = """
vpextrq $1, %xmm0, D | vpinsrq $1, S, %xmm0, %xmm3 | pextrq $1, %xmm0, D | xsave64 D | xrstor64 S | vmovdqu %ymm9, D
vcvtsi2sdq S, %xmm0, %xmm3 | vpgatherdd %ymm2, (%rdi, %ymm9, 1), %ymm3 | vmovdqu %ymm0, %fs:(%rdi)
vmovdqu %ymm0, (%edi)
"""


def templates(bits: int) -> list[tuple[str, bytes]]:
    """Assemble each instruction, with its text."""
    di, si = {64: ("rdi", "rsi"), 32: ("edi", "esi"), 16: ("di", "si")}[bits]
    index = "rdi" if bits == 64 else "edi"  # 16-bit addresses have no vector index
    words = {"D": f"(%{di})", "S": f"(%{si})", "V": f"(%{index}, %xmm1, 1)", "W": f"(%{index}, %ymm1, 1)"}
    text = SOURCES + (LONG if bits == 64 else "")
    sources = [source.strip() for line in text.split("\n") if line for source in line.split("|")]
    made = [" ".join(_operand(word, words) for word in source.split()) for source in sources]
    program = "\n".join(f".balign 32\n{source}\n.byte 0x0f, 0x0b, 0xde, 0xad" for source in made)
    code = assemble(program, 0, bits)
    pieces = (code[32 * number : 32 * number + 32] for number in range(len(made)))
    return [(source, piece[: piece.index(b"\x0f\x0b\xde\xad")]) for source, piece in zip(made, pieces, strict=True)]


def _operand(word: str, words: dict[str, str]) -> str:
    bare = word.rstrip(",")
    return words[bare] + word[len(bare) :] if bare in words else word


def xcrs() -> kvm_xcrs:
    """XCR0 with x87, SSE and AVX."""
    found = kvm_xcrs(nr_xcrs=1)
    found.xcrs[0].value = _XCR0
    return found


def state(random: Random, before: bytes) -> bytes:
    """An XSAVE area for KVM_SET_XSAVE: ``before`` with other MMX and vector registers."""
    area = bytearray(before)
    for number in range(16):
        value = _vector(random, number)
        area[160 + 16 * number : 176 + 16 * number] = value[:16]
        area[_AVX + 16 * number : _AVX + 16 * number + 16] = value[16:]
    for number in range(8):
        area[32 + 16 * number : 40 + 16 * number] = random.randbytes(8)
    area[24:28] = _MXCSR.to_bytes(4, "little")  # QEMU's CPU loads any, which KVM then refuses
    area[512:576] = _XCR0.to_bytes(64, "little")
    return bytes(area)


def _vector(random: Random, number: int) -> bytes:
    """A register's value: XMM1 and XMM9 are indices, XMM2 a mask, others anything."""
    if number in (1, 9):
        spread = (0, 0, PAGE, -PAGE, 64, random.randrange(-PAGE, PAGE))
        size = random.choice((4, 8))
        return b"".join(random.choice(spread).to_bytes(size, "little", signed=True) for _ in range(32 // size))
    if number == 2:
        size = random.choice((1, 4, 8))
        return b"".join(bytes(size - 1) + bytes((random.choice((0, 0x80, 0xFF)),)) for _ in range(32 // size))
    return random.randbytes(32)


def place(random: Random, mnemonic: str, regs: kvm_regs) -> None:
    """Align the operands; EDX:EAX is what XSAVE and XRSTOR are asked for."""
    full = mnemonic.startswith(("xsave", "xrstor"))
    align = 64 if full else 32 if random.random() < 0.5 else 1
    for name in ("rsi", "rdi"):
        value = getattr(regs, name)
        if full:
            value = (value & -PAGE) + random.choice((0xE00, 0xE40, 0xC80, 0xD00, 0xF00, 0x100))
        setattr(regs, name, value & -align)
    regs.rax, regs.rdx = random.choice((7, 3, 1, 6, 7, 7)), 0


def saved(random: Random) -> bytes:
    """An area that XRSTOR and FXRSTOR accept, with some of the state."""
    area = bytearray(1024)
    area[24:28] = _MXCSR.to_bytes(4, "little")
    area[512] = random.choice((7, 3, 2, 1, 4, 0))
    return bytes(area)
