"""What registers hold before a case: values where signs, widths and memory begin and end."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from random import Random

from anykvm.abi.structures import kvm_debugregs, kvm_regs, kvm_sregs, kvm_xsave
from instruction_fuzz.modes import CODE, DATA, SIZE, STACK, Mode

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
BOUNDARIES = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000]
BOUNDARIES += [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 47) - 1, 1 << 47, (1 << 63) - 1, 1 << 63]
BOUNDARIES += [(1 << 64) - n for n in (1, 2, 8, 16, 128, 0x8000, 0x80000000)]
PLACES = [
    DATA,
    DATA + 0xFFD,
    DATA + 0x3F,
    SIZE - 1,
    SIZE - 8,
    SIZE,
    SIZE + 0x1000,
    STACK,
    CODE,
    0xFEE00000,
    0x7FFF00000000,
]
SELECTORS = [*range(0, 0xD8, 8), 0x1B, 0x23, 0x3B, 0x64, 0x67, 0xFFFF, 0xFFF8, 0x2B]
FLAGS = 0x8D5 | 1 << 10  # those of arithmetic, and DF
FLAGS_RARE = 1 << 8 | 1 << 9 | 1 << 14 | 1 << 18  # TF, IF, NT, AC

# zeros, subnormals, pseudo-subnormals, unnormals, infinities, NaNs, and where integers end
EXPONENTS = [0, 1, 0x3FFE, 0x3FFF, 0x400E, 0x401D, 0x401E, 0x403E, 0x403F, 0x7FFE, 0x7FFF]
SIGNIFICANDS = [0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, 3 << 62, (1 << 64) - 1]
DOUBLES = [0, 1 << 63, 1, 0x3FF0 << 48, 0xBFF0 << 48, 0x7FF0 << 48, 0xFFF0 << 48, 0x7FF8 << 48, (0x7FF0 << 48) + 1]
DOUBLES += [0x41DFFFFFFFC00000, 0x41E0000000000000, 0xC1E0000000000000, 0x43E0000000000000, 0x7FEFFFFFFFFFFFFF]
SINGLES = [
    0,
    1 << 31,
    1,
    0x3F800000,
    0xBF800000,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x7F800001,
    0x4F000000,
    0xCF000000,
]


EXTREMES = [0, 1, (1 << 64) - 1, 1 << 31, 1 << 63, 1 << 15, 1 << 7, (1 << 31) - 1, (1 << 63) - 1, 0xFFFFFFFF, DATA]
POOL = 509
"""How many sets of general registers there are; 61 of x87 and SSE state."""


def integer(random: Random) -> int:
    """A boundary, a place, a selector, or anything."""
    kind = random.random()
    if kind < 0.45:
        return random.choice(BOUNDARIES)
    if kind < 0.75:
        return random.choice(PLACES) + random.choice((0, 0, 0, 1, -1, -7))
    return random.choice(SELECTORS) if kind < 0.87 else random.getrandbits(64)


def registers(random: Random) -> kvm_regs:
    """General registers: each anything, or all of them from three values, so that extremes meet each other."""
    if random.random() < 0.5:
        few = random.sample(EXTREMES, 3)
        regs = kvm_regs(**{name: random.choice(few) for name in GENERAL})
    else:
        regs = kvm_regs(**{name: integer(random) & (1 << 64) - 1 for name in GENERAL})
    regs.rip = CODE
    regs.rsp = STACK if random.random() < 0.9 else integer(random) & (1 << 64) - 1
    regs.rflags = random.getrandbits(64) & FLAGS
    if random.random() < 0.1:
        regs.rflags |= random.getrandbits(64) & FLAGS_RARE
    return regs


def extended(random: Random) -> bytes:
    """An 80-bit number, of which not all are valid."""
    number = random.choice(SIGNIFICANDS) | (random.choice(EXPONENTS) | random.getrandbits(1) << 15) << 64
    return number.to_bytes(10, "little")


def vector(random: Random) -> bytes:
    """16 bytes of an XMM register."""
    kind = random.randrange(5)
    if kind == 0:
        return b"".join(random.choice(DOUBLES).to_bytes(8, "little") for _ in range(2))
    if kind == 1:
        return b"".join(random.choice(SINGLES).to_bytes(4, "little") for _ in range(4))
    if kind == 2:
        return b"".join(random.choice(BOUNDARIES).to_bytes(8, "little") for _ in range(2))
    return bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) * 16 if kind == 3 else random.randbytes(16)


def floating(random: Random) -> kvm_xsave:
    """x87 and SSE state, in all its modes. MXCSR mostly masks exceptions: with one unmasked, a guest is slow."""
    return xsave(
        fcw=random.choice((0x37F, 0x27F, 0x07F, 0x77F, 0xB7F, 0xF7F, 0x340, 0x000, 0xFFFF)),
        fsw=random.choice((0, 0x3800, 0x2000, 0x4700, 0xFFFF)),
        ftw=random.choice((0, 0xFF, 0x55, random.getrandbits(8))),
        mxcsr=random.choice((0x1F80, 0x1F80, 0x3F80, 0x5F80, 0x7F80, 0x9FC0, 0xFFFF, 0x1F00)),
        st=b"".join(extended(random).ljust(16, b"\0") for _ in range(8)),
        xmm=b"".join(vector(random) for _ in range(16)),
    )


def xsave(fcw: int, fsw: int, ftw: int, mxcsr: int, st: bytes, xmm: bytes) -> kvm_xsave:
    """An XSAVE area of x87 and SSE."""
    legacy = struct.pack("<HHBxHQQII", fcw, fsw, ftw, 0, 0, 0, mxcsr, 0xFFFF) + st + xmm
    return kvm_xsave.from_buffer_copy((legacy.ljust(512, b"\0") + struct.pack("<Q", 3)).ljust(4096, b"\0"))


INITIAL = xsave(0x37F, 0, 0, 0x1F80, bytes(128), bytes(256))


def extremes() -> Iterator[kvm_regs]:
    """RAX, RDX and all others each 0, -1 and the most negative number of each width."""
    for bits in (8, 16, 32, 64):
        for rax, rdx, rest in itertools.product((0, (1 << 64) - 1, 1 << (bits - 1)), repeat=3):
            regs = kvm_regs(**dict.fromkeys(GENERAL, rest))
            regs.rax, regs.rdx, regs.rip, regs.rsp = rax, rdx, CODE, STACK
            yield regs


Change = Callable[[kvm_sregs], None]


def _nothing(sregs: kvm_sregs) -> None:
    pass


def _tables(sregs: kvm_sregs, base: int, limit: int) -> None:
    for table in (sregs.gdt, sregs.idt, sregs.ldt, sregs.tr):
        table.base, table.limit = base, limit


def _segments(sregs: kvm_sregs, base: int, limit: int) -> None:
    for name in ("ds", "es", "fs", "gs"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.g = base, limit, int(limit > 0xFFFFF)


def _set(name: str, bits: int) -> Change:
    return lambda sregs: setattr(sregs, name, getattr(sregs, name) ^ bits)


CHANGES: tuple[Change, ...] = (
    *(_nothing,) * 6,
    _set("cr0", 1 << 2),  # EM
    _set("cr0", 1 << 3),  # TS
    _set("cr0", 1 << 5 | 1 << 18),  # NE, AM
    _set("cr0", 1 << 16),  # WP
    _set("cr4", 1 << 2 | 1 << 3),  # TSD, DE
    _set("cr4", 1 << 9 | 1 << 10),  # OSFXSR, OSXMMEXCPT
    _set("cr4", 1 << 16 | 1 << 18),  # FSGSBASE, OSXSAVE
    _set("efer", 1),  # SCE
    lambda sregs: _tables(sregs, 0, 0),
    lambda sregs: _tables(sregs, SIZE - 4, 0xFFFF),
    lambda sregs: _tables(sregs, 0xFFFFFFF8, 0xFFFF),
    lambda sregs: _tables(sregs, 0x7FFF00000000, 0xFFFFFFFF),
    lambda sregs: _segments(sregs, 0xFFFFFFFF, 0xFFFFFFFF),
    lambda sregs: _segments(sregs, (1 << 64) - 4096, 0),
    lambda sregs: setattr(sregs, "cr3", 0x123456000),
)
"""What may be different in the special registers. A KVM may refuse it."""
DR7 = (0x400, 0x400, 0x400, 0x4FF, 0xFFFF07FF, 0xDDDD07FF, 0x000F0402, 0xFFFFFFFF)


class Pools:
    """Sets of operands, made once: making them takes longer than executing them."""

    def __init__(self, seed: int) -> None:
        random = Random(f"operands {seed}")
        self.registers = [registers(random) for _ in range(POOL)]
        self.floating = [floating(random) for _ in range(61)]

        self.extremes = list(extremes())

    def pick(self, mode: Mode, number: int, extreme: bool = False) -> tuple[kvm_regs, kvm_xsave]:
        """The operands of a number, in a mode."""
        pool = self.extremes if extreme else self.registers
        regs = kvm_regs.from_buffer_copy(pool[number % len(pool)])
        regs.rflags |= mode.flags
        return regs, self.floating[number % len(self.floating)]

    def change(self, number: int, sregs: kvm_sregs, debugregs: kvm_debugregs) -> bool:
        """What a number changes of the mode's own registers. False: nothing."""
        CHANGES[number % len(CHANGES)](sregs)
        debugregs.dr7 = DR7[number // len(CHANGES) % len(DR7)]
        for index, place in enumerate((CODE, DATA, STACK - 8, DATA + 7)):
            debugregs.db[index] = place
        return CHANGES[number % len(CHANGES)] is not CHANGES[0] or debugregs.dr7 != DR7[0]
