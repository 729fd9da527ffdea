"""Every encoding of a memory operand, generated: what the annotate layer's decoding is checked with.

ModRM says [RDI], [EDI] or [DI], in VEX and EVEX also [RDI+RCX]; an immediate is to be put behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

REGISTER: Final = {16: 5, 32: 7, 64: 7}
"""ModRM.rm of [DI], [EDI], [RDI]."""
PREFIXES: Final = (b"", b"\x66", b"\xf2", b"\xf3", b"\x67", b"\x64", b"\x66\xf2", b"\x66\xf3")
_ESCAPES: Final = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
_PREFIX_BYTES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_VECTOR_BYTES: Final = frozenset((0xC4, 0xC5, 0x62))


def legacy(bits: int, prefixes: tuple[bytes, ...] = PREFIXES) -> Iterator[bytes]:
    """One-byte opcodes and those behind 0F, 0F 38 and 0F 3A, with each prefix, with and without REX.W."""
    for escape in _ESCAPES:
        for opcode in range(256):
            if escape == b"" and (opcode == 0x0F or opcode in _PREFIX_BYTES | _VECTOR_BYTES):
                continue
            if (escape == b"" and bits == 64 and opcode & 0xF0 == 0x40) or (
                escape == b"\x0f" and opcode in (0x38, 0x3A)
            ):
                continue
            for prefix in prefixes:
                for rex in (b"", b"\x48") if bits == 64 else (b"",):
                    for reg in range(8):
                        yield prefix + rex + escape + bytes((opcode, reg << 3 | _rm(bits, prefix)))


def _rm(bits: int, prefix: bytes) -> int:
    """ModRM.rm for the address size that the prefix makes."""
    if bits == 64 or b"\x67" not in prefix:
        return REGISTER[bits]
    return REGISTER[48 - bits]


def vex(bits: int) -> Iterator[bytes]:
    """VEX, three bytes long, maps 1 to 3."""
    for opmap in (1, 2, 3):
        for low in range(16):  # W, L and the two bits that stand for a prefix
            for vvvv in (0xF, 0xD):
                middle = (low & 8) << 4 | vvvv << 3 | low & 7
                for opcode in range(256):
                    for reg in range(8):
                        yield from _memory(bits, bytes((0xC4, 0xE0 | opmap, middle, opcode)), reg)


def evex(bits: int) -> Iterator[bytes]:
    """EVEX, maps 1 to 3, without and with a mask, without and with broadcast."""
    for opmap in (1, 2, 3):
        for low in range(8):  # W and the two bits
            for length in (0, 1, 2):
                for mask in (0, 1, 0x11):
                    second, third = (low & 4) << 5 | 0x7C | low & 3, length << 5 | 8 | mask
                    for opcode in range(256):
                        yield from _memory(bits, bytes((0x62, 0xF0 | opmap, second, third, opcode)), 1)


def xop(bits: int) -> Iterator[bytes]:
    """XOP, maps 8 to 10."""
    for opmap in (8, 9, 10):
        for low in (0, 4, 0x80, 0x84):
            for opcode in range(256):
                for reg in range(8):
                    yield from _memory(bits, bytes((0x8F, 0xE0 | opmap, low | 0x78, opcode)), reg)


def _memory(bits: int, head: bytes, reg: int) -> Iterator[bytes]:
    yield head + bytes((reg << 3 | REGISTER[bits],))
    if bits != 16:
        yield head + bytes((reg << 3 | 4, 0x0F))  # a vector's index, where there is one
