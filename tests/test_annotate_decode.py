"""The annotate layer's decoding: all encodings against the assembler's own disassembler, and what it lists for some."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from annotate_encodings import evex, legacy, vex, xop
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_cpuid2, kvm_cpuid_entry2, kvm_regs, kvm_sregs, kvm_xcrs
from anykvm.layers.annotate import Access, decode, implicit, tables
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand, Unknown
from anykvm.testing.assembler import assemble

_ROOM = 32
_BEHIND = b"\x01" + bytes(12)
_SIZES = {"BYTE": 1, "WORD": 2, "DWORD": 4, "FWORD": 6, "QWORD": 8, "TBYTE": 10}
_SIZES |= {"XMMWORD": 16, "OWORD": 16, "YMMWORD": 32, "ZMMWORD": 64}
_ARCHITECTURE = {16: "i8086", 32: "i386", 64: "i386:x86-64"}
_PREFIXES = ("rex.W", "repz", "repnz", "data16", "fs", "addr16", "addr32", "data32")  # nothing but those
_LINE = re.compile(r"\s*([0-9a-f]+):\t([0-9a-f ]+)\t(.*)")
# Instructions that Capstone 5 does not know: nothing is said of them.
UNDECODED = tables.names(
    "aadd aand aor axor aesdec128kl aesdec256kl aesdecwide128kl aesdecwide256kl aesenc128kl aesenc256kl "
    "aesencwide128kl aesencwide256kl enqcmd enqcmds nop prefetch"
)


def disassembled(codes: list[bytes], bits: int, at: Path) -> Iterator[tuple[bytes, str, int]]:
    """Each with binutils' text and length, but for what is none."""
    at.write_bytes(b"".join((code + _BEHIND).ljust(_ROOM, b"\x90") for code in codes))
    command: list[str | Path] = [
        "objdump",
        "-D",
        "-z",
        "-b",
        "binary",
        "-m",
        _ARCHITECTURE[bits],
        "-M",
        "intel",
        "--insn-width=16",
        at,
    ]
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        found = _LINE.match(line)
        if found is None or int(found[1], 16) % _ROOM or found[3].endswith(_PREFIXES):
            continue
        if "(bad)" not in found[3] and "?" not in found[3]:
            yield codes[int(found[1], 16) // _ROOM], found[3], len(found[2].split())


def plain_cpu(bits: int) -> Cpu:
    """Enough of a vCPU to decode for."""
    return cast(Cpu, SimpleNamespace(bits=bits, regs=SimpleNamespace(rip=0x1000)))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_sizes_and_lengths_of_all_encodings(bits: int, tmp_path: Path) -> None:
    """Binutils says how large an operand is, and has nothing to do with Capstone."""
    cpu, wrong, unknown, compared = plain_cpu(bits), [], set(), 0
    for code, text, length in disassembled(list(legacy(bits))[::5], bits, tmp_path / "code"):
        size = re.search(r"(\w+) PTR", text)
        insn = decode.decode(cpu, code + _BEHIND)
        if insn is None:
            # 66, F2 or F3 in front of what has no such form is invalid, which binutils does not say.
            word = next(word for word in text.split() if word not in _PREFIXES)
            unknown |= {word} if "[" in text and code[0] not in (0x66, 0xF2, 0xF3) else set()
            continue
        ignored = bits == 64 and insn.prefixes.data and insn.name[0] in "cj"
        if insn.size != length and not ignored and insn.name not in ("ud0", "ud1"):
            # Near branches with 66 in 64-bit code: Intel ignores the prefix, and binutils has AMD's. UD has an operand.
            wrong.append(f"{code.hex()}: {insn.text} {insn.size} bytes; {text} {length}")
        if not insn.memory or size is None or size[1] not in _SIZES or not tables.known(insn):
            continue
        operand = insn.memory[0]
        if not tables.kinds(insn, operand) or (
            insn.prefixes.wide and insn.name in ("lcall", "ljmp", "lss", "lfs", "lgs")
        ):
            continue  # far pointers of 64 bits are Intel's, and binutils has AMD's
        compared += 1
        if tables.size_of(cpu, insn, operand) != _SIZES[size[1]]:
            wrong.append(f"{code.hex()}: {insn.text}; {text}")
    assert not wrong, "\n".join([str(len(wrong)), *wrong[:30]])
    assert unknown <= UNDECODED, unknown - UNDECODED
    assert compared > 2000, compared


@pytest.mark.parametrize("family", [legacy, vex, evex, xop])
def test_every_first_operand_is_in_the_tables(family: object) -> None:
    cpu, missing, found = plain_cpu(64), set(), set()
    for code in itertools.islice(family(64), 0, None, 7):  # type: ignore[operator]
        insn = decode.decode(cpu, code + _BEHIND)
        if insn is None or not insn.memory or (not insn.two_byte and insn.name[:-1] in implicit._STRINGS):
            continue
        found.add(insn.name)
        if insn.operands[0] is insn.memory[0] and not tables.known(insn):
            missing.add(insn.name)
    assert missing <= {"bndstx"} and len(found) > 50


class State:
    """A backend of one vCPU with vector registers, in Intel's layout of the XSAVE area."""

    name, profile = "device", "fake"
    OFFSETS = {2: (256, 576), 5: (64, 1088), 6: (512, 1152), 7: (1024, 1664)}

    def __init__(self) -> None:
        self.regs = kvm_regs(rip=0x1000, rflags=2, rdi=0x2000, rsi=0x3000, rbx=0x4000, rcx=0x5000, rax=0x10)
        self.area = bytearray(4096)
        self.area[512] = 0xE7
        self.fails: set[int] = set()

    def vector(self, number: int, value: bytes) -> None:
        """Set a register, of up to 64 bytes."""
        value = value.ljust(64, b"\0")
        for offset, piece in ((160 + 16 * number, value[:16]), (576 + 16 * number, value[16:32])):
            self.area[offset : offset + 16] = piece
        self.area[1152 + 32 * number : 1184 + 32 * number] = value[32:]

    def mask(self, number: int, value: int) -> None:
        """Set an opmask register."""
        self.area[1088 + 8 * number : 1096 + 8 * number] = value.to_bytes(8, "little")

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if request in self.fails:
            raise OSError(22, "no")
        if request == n.KVM_GET_REGS:
            ctypes.memmove(arg, ctypes.addressof(self.regs), ctypes.sizeof(self.regs))
        elif request == n.KVM_GET_SREGS:
            sregs = kvm_sregs.from_address(arg)
            sregs.cs.l, sregs.cr0, sregs.efer, sregs.fs.base = 1, 1, 1 << 10, 0x700000
        elif request == n.KVM_GET_XSAVE2:
            ctypes.memmove(arg, bytes(self.area), len(self.area))
        elif request == n.KVM_GET_XCRS:
            xcrs = kvm_xcrs.from_address(arg)
            xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, 0xE7
        elif request == n.KVM_GET_CPUID2:
            kvm_cpuid2.from_address(arg).nent = len(self.OFFSETS)
            entries = (kvm_cpuid_entry2 * len(self.OFFSETS)).from_address(arg + ctypes.sizeof(kvm_cpuid2))
            for entry, (index, (size, offset)) in zip(entries, self.OFFSETS.items(), strict=True):
                entry.function, entry.index, entry.eax, entry.ebx = 0xD, index, size, offset
        elif request != n.KVM_GET_VCPU_EVENTS:
            raise OSError(25, "not here")
        return 0


def listed(state: State, source: str) -> list[tuple[int, int, str]]:
    """What an instruction accesses: address, size and kind, with a question mark where that is not certain."""
    return [(op.linear, op.size, op.access.value + ("" if op.certain else "?")) for op in operands(state, source)]


def operands(state: State, source: str) -> list[Operand]:
    cpu = Cpu(state, 3)  # type: ignore[arg-type]
    insn = decode.decode(cpu, assemble(source, 0x1000))
    assert insn is not None
    return implicit.accesses(cpu, cast(GuestPhysical, None), insn)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("vmovdqu %ymm0, (%rdi)", [(0x2000, 32, "write")]),
        ("vextracti128 $1, %ymm0, (%rdi)", [(0x2000, 16, "write")]),
        ("vpextrb $1, %xmm0, (%rdi)", [(0x2000, 1, "write")]),
        ("pextrd $1, %xmm0, (%rdi)", [(0x2000, 4, "write")]),
        ("extractps $1, %xmm0, (%rdi)", [(0x2000, 4, "write")]),
        ("kmovq %k1, (%rdi)", [(0x2000, 8, "write")]),
        ("kmovq (%rsi), %k1", [(0x3000, 8, "read")]),
        ("vcvtps2ph $0, %ymm0, (%rdi)", [(0x2000, 16, "write")]),
        ("vmovdqu64 %zmm0, (%rdi)", [(0x2000, 64, "write")]),
        ("vpmovdb %zmm0, (%rdi)", [(0x2000, 16, "write")]),
        ("movdir64b (%rsi), %rdi", [(0x3000, 64, "read"), (0x2000, 64, "write")]),
        ("movdiri %eax, (%rdi)", [(0x2000, 4, "write")]),
        ("wrssq %rax, (%rdi)", [(0x2000, 8, "write")]),
        ("fs xlat", [(0x704010, 1, "read")]),
        ("fs lodsb", [(0x703000, 1, "read")]),
        ("clflush (%rsi)", [(0x3000, 1, "read?")]),
        ("clwb (%rsi)", [(0x3000, 1, "read?")]),
        ("monitor", [(0x10, 1, "read?")]),
        ("clzero", [(0, 64, "write")]),
        ("prefetchw (%rsi)", []),
        ("vaddps (%rsi), %zmm0, %zmm1", [(0x3000, 64, "read")]),
        ("vaddps (%rsi){1to16}, %zmm0, %zmm1", [(0x3000, 4, "read")]),
        (".byte 0x67, 0x63, 0x06", [(0x3000, 4, "read")]),
        (".byte 0x67, 0x48, 0x63, 0x46, 0x10", [(0x3010, 4, "read")]),
        (".byte 0xf2, 0x0f, 0xbc, 0x06", [(0x3000, 4, "read")]),
        (".byte 0x66, 0x48, 0x0f, 0xbd, 0x06", [(0x3000, 8, "read")]),
        (".byte 0xc4, 0xe3, 0xf9, 0x14, 0x07, 1", [(0x2000, 1, "write")]),
        ("comisd (%rsi), %xmm0", [(0x3000, 8, "read")]),
    ],
)
def test_what_is_listed(source: str, expected: list[tuple[int, int, str]]) -> None:
    assert listed(State(), source) == expected


def test_a_gather_reads_what_its_index_and_mask_say() -> None:
    state = State()
    state.vector(1, b"".join(value.to_bytes(4, "little", signed=True) for value in (0x10000, -8, 4, 8)))
    state.vector(2, bytes.fromhex("000000ff00000080ffffff7fffffff7f"))
    assert listed(state, "vpgatherdd %xmm2, 4(%rdi,%xmm1,4), %xmm0") == [(0x42004, 4, "read"), (0x1FE4, 4, "read")]
    assert listed(state, "vgatherdpd %ymm3, (%rdi,%xmm1,1), %ymm0") == []
    state.mask(1, 0b0110)
    assert listed(state, "vpscatterdd %zmm0, (%rdi,%zmm1,1){%k1}") == [(0x1FF8, 4, "write"), (0x2004, 4, "write")]
    state.fails = {n.KVM_GET_XSAVE2, n.KVM_GET_XSAVE, n.KVM_GET_FPU}
    with pytest.raises(Unknown, match="index register xmm1"):
        listed(state, "vpgatherdd %xmm2, (%rdi,%xmm1,4), %xmm0")


def test_a_mask_selects() -> None:
    state = State()
    state.regs.rdi = 0x2FF8
    state.vector(2, bytes.fromhex("00000000 00000000 00000080 00000000"))
    store = "vpmaskmovd %xmm0, %xmm2, (%rdi)"
    assert listed(state, store) == [(0x2FF8, 8, "write?"), (0x3000, 4, "write")]
    assert listed(state, "vmovups %zmm0, (%rdi){%k1}") == [(0x2FF8, 8, "write?"), (0x3000, 56, "write?")]
    state.mask(1, 0b110)
    assert listed(state, "vmovups %zmm0, (%rdi){%k1}") == [(0x2FFC, 4, "write"), (0x3000, 4, "write")]
    assert listed(state, "vpaddd (%rdi), %zmm0, %zmm1{%k1}") == [(0x2FF8, 8, "read?"), (0x3000, 56, "read?")]
    assert listed(state, "vpcompressd %zmm0, (%rdi){%k1}") == [(0x2FF8, 8, "write")]
    assert listed(state, "vmovss %xmm0, (%rdi){%k1}") == [(0x2FF8, 4, "write?")]
    state.mask(1, (1 << 64) - 1)
    assert listed(state, "vpaddd (%rdi), %zmm0, %zmm1{%k1}") == [(0x2FF8, 8, "read"), (0x3000, 56, "read")]
    state.fails = {n.KVM_GET_CPUID2}
    assert {kind for *_, kind in listed(state, "vpcompressd %zmm0, (%rdi){%k1}")} == {"write?"}


def test_maskmov_has_its_mask_from_the_registers() -> None:
    state = State()
    state.regs.rdi = 0x2FF8
    state.vector(2, bytes(9) + b"\x80")
    assert listed(state, "maskmovdqu %xmm2, %xmm1") == [(0x2FF8, 8, "write?"), (0x3001, 1, "write")]
    assert listed(state, "fs maskmovdqu %xmm2, %xmm1")[1] == (0x703001, 1, "write")
    state.regs.rdi = 0x2000
    state.area[3] = 6 << 3  # the top of stack is register 6, so MM1 is ST(3)
    state.area[32 + 3 * 16 : 40 + 3 * 16] = bytes.fromhex("0000800000000000")
    assert listed(state, "maskmovq %mm1, %mm0") == [(0x2002, 1, "write")]
    state.area[512] = 0  # all components in their initial state
    assert listed(state, "maskmovdqu %xmm2, %xmm1") == [(0x2000, 16, "write?")]


def test_xsave_touches_what_is_asked_for() -> None:
    state = State()
    state.regs.rax, state.regs.rdx = 7, 0
    parts = {op.linear - 0x2000: op.size for op in operands(state, "xsave (%rdi)") if op.certain}
    assert parts == {0: 24, 32: 128, 24: 8, 160: 256, 576: 256, 512: 8}
    state.regs.rax = 0x24
    parts = {op.linear - 0x2000: op.size for op in operands(state, "xsavec (%rdi)") if op.certain}
    assert parts == {24: 8, 576: 256, 832: 64, 512: 64}
    assert all(op.access is Access.WRITE and not op.ordered for op in operands(state, "xsaves (%rdi)"))
    state.fails = {n.KVM_GET_XCRS}
    with pytest.raises(Unknown, match="XCR0"):
        operands(state, "xsave (%rdi)")


@pytest.mark.parametrize("source", ["vmload", "bndstx %bnd0, (%rdi)"])
def test_what_is_not_known_is_said(source: str) -> None:
    with pytest.raises(Unknown, match="is not known here"):
        listed(State(), source)
