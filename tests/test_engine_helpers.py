"""Instructions of which the engine's own helper is replaced, or that it translates beyond its bounds: compared with the
host's processor, which executes the same bytes, or with the manual's arithmetic."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import anykvm
from anykvm import Hlt
from anykvm.abi.structures import kvm_regs
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, DATA, STACK, Machine

BLOB, IN, OUT = 0x100000, 0x400000, 0x800000
FLAGS = 0x8D5  # O S Z A P C
ITEM = struct.Struct("<16s16sQQ")
ANSWER = struct.Struct("<QQ16s")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with anykvm.open("soft") as kvm, Machine(kvm, size=32 << 20) as made:
        yield made


def host_has(feature: str) -> bool:
    return f" {feature}" in next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line)


# -- string compares ---------------------------------------------------------------------------------------------------


def string_compares(kind: str, wide: bool) -> str:
    """One compare for each imm8, over `count` items: void f(const item *rdi, answer *rsi, long count rdx)."""
    one = "\n".join(
        f"""mov %r10, %rax; mov %r11, %rdx; xor %ecx, %ecx; movdqa %xmm3, %xmm0
        .byte 0x66; {".byte 0x48;" if wide else ""} .byte 0x0f, 0x3a, {kind}, 0xca, {imm}
        pushf; pop %rax; mov %rcx, (%rsi); mov %rax, 8(%rsi); movdqu %xmm0, 16(%rsi); add $32, %rsi"""
        for imm in range(256)
    )
    return f"""mov %rdx, %r9
    movdqu ones(%rip), %xmm3
    1: movdqu (%rdi), %xmm1; movdqu 16(%rdi), %xmm2; mov 32(%rdi), %r10; mov 40(%rdi), %r11
    {one}
    add $48, %rdi; dec %r9; jnz 1b
    ret
    ones: .quad 0x1122334455667788, 0x99aabbccddeeff00"""


def native(code: bytes, data: bytes, count: int, size: int) -> bytes:
    """What the host's processor answers."""
    with mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        source, out = ctypes.create_string_buffer(data), ctypes.create_string_buffer(size)
        at = ctypes.c_char.from_buffer(page)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)(ctypes.addressof(at))
        call(ctypes.addressof(source), ctypes.addressof(out), count)
        del at
        return out.raw


def in_guest(machine: Machine, code: bytes, data: bytes, count: int, size: int) -> bytes:
    machine.memory.write(BLOB, code)
    machine.memory.write(IN, data)
    machine.long_mode(f"mov ${BLOB}, %eax; call *%rax; hlt")
    machine.set_regs(rdi=IN, rsi=OUT, rdx=count)
    machine.run_to_halt()
    return machine.memory.read(OUT, size)


LENGTHS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFF0, 0xFFFFFFF8]
LENGTHS += [1 << 32, (1 << 32) + 3, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 1, (1 << 64) - 5]


def some_string(choose: random.Random) -> bytes:
    """Few different elements, so that there are matches, and ends at every place."""
    alphabet = choose.choice((b"ab", b"abc\0", b"\x7f\x80\xff\x01", b"\0\xff", b"aaab"))
    return bytes(choose.choice(alphabet) for _ in range(16))


def explicit_items(choose: random.Random) -> list[bytes]:
    """All pairs of lengths at the boundaries."""
    return [ITEM.pack(some_string(choose), some_string(choose), a, b) for a in LENGTHS for b in LENGTHS]


def implicit_items(choose: random.Random) -> list[bytes]:
    """An end at each place of either; the lengths in registers mean nothing."""
    found = []
    for first, second in itertools.product(range(17), repeat=2):
        strings = (bytearray(some_string(choose).replace(b"\0", b"a")) for _ in range(2))
        one, two = (s[:at] + b"\0" * (16 - at) for s, at in zip(strings, (first, second), strict=True))
        found.append(ITEM.pack(bytes(one), bytes(two), choose.choice(LENGTHS), choose.choice(LENGTHS)))
    return found


@pytest.mark.parametrize("wide", [False, True], ids=["w0", "w1"])
@pytest.mark.parametrize("name", ["pcmpestrm", "pcmpestri", "pcmpistrm", "pcmpistri"])
def test_string_compares_as_the_host_does(machine: Machine, name: str, wide: bool) -> None:
    if not host_has("sse4_2"):
        pytest.skip("NOT TESTED: string compares: this machine's processor has no SSE4.2")
    kind = {"pcmpestrm": "0x60", "pcmpestri": "0x61", "pcmpistrm": "0x62", "pcmpistri": "0x63"}[name]
    choose = random.Random(f"{name} {wide}")
    items = explicit_items(choose) if "e" in name[4] else implicit_items(choose)
    code, data, size = assemble(string_compares(kind, wide), BLOB), b"".join(items), ANSWER.size * 256 * len(items)
    want, got = native(code, data, len(items), size), in_guest(machine, code, data, len(items), size)
    for index, (one, two) in enumerate(zip(ANSWER.iter_unpack(want), ANSWER.iter_unpack(got), strict=True)):
        expected, answer = (f"{rcx:#x} {flags & FLAGS:#x} {xmm.hex()}" for rcx, flags, xmm in (one, two))
        assert expected == answer, f"{name} imm8={index % 256:#x} of {ITEM.unpack(items[index // 256])}"


@pytest.mark.parametrize("imm", [0x00, 0x08, 0x0C, 0x41])
def test_string_compare_of_memory(machine: Machine, imm: int) -> None:
    """A memory operand need not be aligned, and 32-bit lengths are what counts without REX.W."""
    machine.memory.write(DATA + 3, b"abcdabcdabcdabcd")
    machine.long_mode(f"movdqu {DATA + 3:#x}, %xmm1; pcmpestri ${imm}, {DATA + 3:#x}, %xmm1; hlt")
    machine.set_regs(rax=0xFFFFFFFF_80000000, rdx=0x1_80000000)
    machine.run_to_halt()
    # both lengths saturate: each element is in the set, equal to its own, the string begins at 0
    assert machine.vcpu.get_regs().rcx == (7 if imm == 0x41 else 0)


# -- division ----------------------------------------------------------------------------------------------------------

DIVIDE_ERROR = 0x9000


def boundaries(bits: int) -> list[int]:
    """Where signs and widths change."""
    half, top, all_ones = bits // 2, 1 << (bits - 1), (1 << bits) - 1
    return [0, 1, 2, 7, (1 << half) - 1, 1 << half, top - 1, top, top + 1, all_ones - 1, all_ones]


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def quotient_and_remainder(high: int, low: int, divisor: int, bits: int, is_signed: bool) -> tuple[int, int] | None:
    """SDM vol. 2, DIV and IDIV; None: #DE."""
    dividend, mask = high << bits | low, (1 << bits) - 1
    if is_signed:
        dividend, divisor = signed(dividend, 2 * bits), signed(divisor, bits)
    if divisor == 0:
        return None
    quotient = abs(dividend) // abs(divisor) * (1 if (dividend < 0) == (divisor < 0) else -1)
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, mask)
    return (quotient & mask, (dividend - quotient * divisor) & mask) if least <= quotient <= most else None


OPERANDS = {8: "%bl", 16: "%bx", 32: "%ebx", 64: "%rbx"}


def operands_in(machine: Machine, bits: int, high: int, low: int, divisor: int, code: int) -> None:
    ax, dx = (high << 8 | low, 0) if bits == 8 else (low, high)
    machine.vcpu.set_regs(kvm_regs(rax=ax, rdx=dx, rbx=divisor, rip=code, rsp=STACK, rflags=2))


def result_of(regs: kvm_regs, bits: int) -> tuple[int, int]:
    mask = (1 << bits) - 1
    return (regs.rax & 0xFF, regs.rax >> 8 & 0xFF) if bits == 8 else (regs.rax & mask, regs.rdx & mask)


def divide_everything(machine: Machine, bits: int, name: str, code: int, handler: int) -> int:
    """All of them; returns how many were #DE."""
    faults = 0
    for high, low, divisor in itertools.product(boundaries(bits), repeat=3):
        operands_in(machine, bits, high, low, divisor, code)
        sregs = None if faults else machine.vcpu.get_sregs()
        assert machine.vcpu.run() == Hlt()
        regs = machine.vcpu.get_regs()
        want = quotient_and_remainder(high, low, divisor, bits, name == "idiv")
        got = None if regs.rip == handler + 1 else result_of(regs, bits)
        assert got == want, f"{name} {bits} bits: {high:#x}:{low:#x} / {divisor:#x}, rip {regs.rip:#x}"
        faults += want is None
        if want is None and sregs is not None:
            assert machine.vcpu.get_sregs().cs.selector == sregs.cs.selector
    return faults


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("name", ["div", "idiv"])
def test_division_at_the_boundaries(machine: Machine, name: str, bits: int) -> None:
    machine.long_mode(f"{name} {OPERANDS[bits]}; hlt")
    machine.gate(0, DIVIDE_ERROR)
    machine.memory.write(DIVIDE_ERROR, b"\xf4")
    assert divide_everything(machine, bits, name, CODE, DIVIDE_ERROR) > 100


@pytest.mark.parametrize("protected", [False, True], ids=["real", "protected"])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("name", ["div", "idiv"])
def test_division_in_legacy_modes(machine: Machine, name: str, bits: int, protected: bool) -> None:
    machine.long_mode("hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = 0x11 if protected else 0x10, 0, 0
    for segment in ("cs", "ds", "es", "fs", "gs", "ss"):
        each = getattr(sregs, segment)
        each.base, each.l, each.db = 0, 0, int(protected)
        if not protected:
            each.limit, each.selector = 0xFFFF, 0
    sregs.idt.base, sregs.idt.limit = (0x5000, 0xFFF) if protected else (0, 0x3FF)
    if protected:
        machine.quads(0x4008, 0x00CF9B000000FFFF)  # its handlers are 32-bit code
        machine.quads(0x5000, 0x00008E0000080000 | DIVIDE_ERROR)
    else:
        machine.memory.write(0, struct.pack("<HH", DIVIDE_ERROR, 0))
    machine.memory.write(DIVIDE_ERROR, b"\xf4")
    machine.memory.write(CODE, assemble(f"{name} {OPERANDS[bits]}; hlt", CODE, 32 if protected else 16))
    machine.vcpu.set_sregs(sregs)
    for high, low, divisor in itertools.product(boundaries(bits)[4:], repeat=3):
        machine.vcpu.set_sregs(sregs)
        operands_in(machine, bits, high, low, divisor, CODE)
        machine.set_regs(rsp=0x7000)
        assert machine.vcpu.run() == Hlt()
        want = quotient_and_remainder(high, low, divisor, bits, name == "idiv")
        regs = machine.vcpu.get_regs()
        got = None if regs.rip == DIVIDE_ERROR + 1 else result_of(regs, bits)
        assert got == want, f"{name} {bits} bits: {high:#x}:{low:#x} / {divisor:#x}, rip {regs.rip:#x}"


def test_division_that_faults_changes_nothing(machine: Machine) -> None:
    """#DE is a fault: RIP and operands are as before, at any CPL."""
    for cpl in (0, 3):
        machine.long_mode("idivl (%rsi); hlt", cpl=cpl)
        machine.memory.write(DATA, struct.pack("<i", -1))
        machine.set_regs(rax=0, rdx=0xFFFFFFFF_80000000, rsi=DATA)
        trap = machine.trap()
        assert (trap.vector, trap.error, trap.rip) == (0, 0, CODE)
        assert machine.vcpu.get_regs().rdx == 0xFFFFFFFF_80000000


def test_aam_by_zero(machine: Machine) -> None:
    """The other division: by an immediate."""
    machine.vcpu.set_real_mode(CODE)
    machine.memory.write(0, struct.pack("<HH", DIVIDE_ERROR, 0))
    machine.memory.write(DIVIDE_ERROR, b"\xf4")
    machine.memory.write(CODE, bytes.fromhex("d400f4"))
    machine.set_regs(rsp=0x7000, rax=0x1234)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rip == DIVIDE_ERROR + 1


# -- registers that are not there --------------------------------------------------------------------------------------

SSSE3_MMX = [0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x1C, 0x1D, 0x1E]


def mmx_form(opcode: int | None, rex: int, modrm: int) -> bytes:
    """An SSSE3 instruction on MMX registers; None: PALIGNR."""
    prefix = bytes([rex]) if rex else b""
    return prefix + (bytes([0x0F, 0x3A, 0x0F, modrm, 3]) if opcode is None else bytes([0x0F, 0x38, opcode, modrm]))


@pytest.mark.parametrize("rex", [0x44, 0x45, 0x4C, 0x4F])
def test_rex_r_names_no_ninth_mmx_register(machine: Machine, rex: int) -> None:
    """REX.R before SSSE3's MMX forms is ignored. The engine wrote beyond its registers: rounding mode, MXCSR, XMM0."""
    for opcode, register in itertools.product([*SSSE3_MMX, None], range(8)):
        states = []
        for prefix in (0, rex):
            machine.long_mode("hlt")
            machine.memory.write(CODE, mmx_form(opcode, prefix, 0xC0 | register << 3 | (register + 1) % 8) + b"\xf4")
            fpu = machine.vcpu.get_fpu()
            ctypes.memset(ctypes.addressof(fpu), 0, ctypes.sizeof(fpu))
            fpu.fcw, fpu.mxcsr = 0x37F, 0x1F80
            for i in range(8):
                ctypes.memmove(fpu.fpr[i], bytes(range(i * 0x21 & 0xFF, (i * 0x21 & 0xFF) + 8)) + b"\xff\xff", 10)
                ctypes.memmove(fpu.xmm[i], bytes([0xA0 + i]) * 16, 16)
            machine.vcpu.set_fpu(fpu)
            machine.run_to_halt()
            after = machine.vcpu.get_fpu()
            after.last_ip = 0
            states.append(bytes(after))
        assert states[0] == states[1], f"opcode {opcode}, mm{register}"


# -- long blocks -------------------------------------------------------------------------------------------------------

REPEATED = {
    "pshufd": "660f70c01b",
    "pshufw": "0f70c01b",
    "shufpd": "660fc6c001",
    "palignr": "660f3a0fc003",
    "insertps": "660f3a21c1ff",
    "pcmpistri": "660f3a63c100",
    "roundsd": "660f3a0bc000",
    "fld": "d9c0",
    "fxch": "d9c9",
    "fnop": "d9d0",
    "fadd": "d8c1",
    "bt": "0fa3c0",
    "rol by cl": "48d3c0",
    "rcl by cl": "48d3d0",
    "shld": "480fa5c0",
    "cmpxchg": "480fb1c0",
    "lock cmpxchg": "f0480fb10c24",
    "mov from ds": "8cd8",
    "bsf": "480fbcc0",
    "cmov": "480f44c1",
}


@pytest.mark.parametrize("code", REPEATED.values(), ids=REPEATED.keys())
def test_a_page_of_one_instruction(machine: Machine, code: str) -> None:
    """Translating a long block leaves temporaries behind; the engine did not look whether it had room for them."""
    machine.long_mode("hlt")
    one = bytes.fromhex(code)
    count = 8000 // len(one)
    machine.memory.write(BLOB, one * count + b"\xf4")
    machine.set_regs(rip=BLOB)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rip == BLOB + len(one) * count + 1
