"""Prefixes, and an instruction written so that Capstone decodes it right.

Capstone 5 does not decode 66-prefixed SSE in 16-bit code, or takes it for the MMX instruction without the prefix; it
lets a prefix that the processor ignores (F2, F3, or 66 beside REX.W) change an operand's size. So the prefixes are read
here, the ignored ones left out, and 16-bit code is handed over as the 32-bit code that means the same. Sources: Intel
SDM volume 2, 2.1 and appendix A; AMD APM volume 3, 1.2.
"""

from __future__ import annotations

from typing import Final, NamedTuple

LOCK, REPNE, REPE, DATA, ADDRESS = 0xF0, 0xF2, 0xF3, 0x66, 0x67
_SEGMENTS: Final = {0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x26: "es", 0x64: "fs", 0x65: "gs"}
_BYTES: Final = {name: byte for byte, name in _SEGMENTS.items()}
_REX_W: Final = 8
_STRINGS: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))
_PAUSE: Final = 0x90
_ONE_BYTE, _0F, _0F38, _0F3A, _VECTOR = range(5)
# Opcodes behind 0F that 66, F2 and F3 make different instructions of.
_CHOSEN: Final = frozenset(
    (0x01, 0x09, *range(0x10, 0x18), *range(0x1A, 0x20), *range(0x28, 0x30), *range(0x50, 0x80), 0xAE)
    + (0xC2, *range(0xC3, 0xC8), *range(0xD0, 0x100))
)
_COUNTS: Final = frozenset((0xB8, 0xBC, 0xBD))  # POPCNT, TZCNT, LZCNT: F3 makes others of them, F2 and 66 do not
_BRANCHES: Final = {_ONE_BYTE: (0xE8, 0xE9), _0F: tuple(range(0x80, 0x90))}  # relative ones
_MOVBE: Final = frozenset((0xF0, 0xF1))  # of 0F 38, and CRC32 with F2


class Prefixes(NamedTuple):
    """The prefixes that count, of one instruction."""

    lock: bool
    repeat: int
    """REPNE, REPE, the last one of them, or 0."""
    segment: str
    """The override in force, or empty."""
    data: bool
    """66, whether it counts or not: see ``operand_size``."""
    address: bool
    """67."""
    rex: int
    """The REX prefix; 0 without."""
    length: int
    """Bytes of all prefixes."""

    @property
    def wide(self) -> bool:
        """REX.W."""
        return bool(self.rex & _REX_W)

    def operand_size(self, bits: int) -> int:
        """Bytes of the operand size in code of ``bits``: 2, 4 or 8."""
        return 8 if self.wide else 2 if self.data != (bits == 16) else 4

    def address_bits(self, bits: int) -> int:
        """Bits of the address size in code of ``bits``."""
        return {64: 32, 32: 16, 16: 32}[bits] if self.address else bits


def parse(code: bytes, bits: int) -> Prefixes:
    """Read the prefixes of the instruction that ``code`` begins with."""
    lock = data = address = False
    repeat, segment, rex, length = 0, "", 0, 0
    for length, byte in enumerate(code):  # noqa: B007, it is where the loop ended
        if bits == 64 and byte & 0xF0 == 0x40:
            rex = byte
            continue
        if byte == LOCK:
            lock = True
        elif byte in (REPNE, REPE):
            repeat = byte
        elif byte == DATA:
            data = True
        elif byte == ADDRESS:
            address = True
        elif byte in _SEGMENTS:
            if bits != 64 or byte in (0x64, 0x65):  # the others are ignored there
                segment = _SEGMENTS[byte]
        else:
            break
        rex = 0  # counts only in front of the opcode
    return Prefixes(lock, repeat, segment, data, address, rex, length)


def plain(code: bytes, bits: int, found: Prefixes) -> tuple[bytes, int, int]:
    """Write the instruction again for Capstone: its bytes, how many more they are than in ``code``, the mode's bits."""
    body = code[found.length :]
    table, opcode = _opcode(body, bits)
    if opcode in _BRANCHES.get(table, ()) and bits != 64 and found.operand_size(bits) == 2:
        return body, -found.length, 16  # in 32-bit code Capstone reads a displacement of 32 bits behind 66
    repeat, data = found.repeat, found.data
    if table is _ONE_BYTE:
        repeat = repeat if opcode in _STRINGS or opcode == _PAUSE else 0
    elif table is _0F and opcode not in _CHOSEN:
        repeat = repeat if opcode in _COUNTS and repeat == REPE else 0
    if table is _ONE_BYTE or (table is _0F and opcode not in _CHOSEN) or (table is _0F38 and opcode in _MOVBE):
        data = found.operand_size(bits) == 2  # as a prefix of 32-bit code
    prefixes = [
        *([_BYTES[found.segment]] if found.segment else []),
        *([LOCK] if found.lock else []),
        *([ADDRESS] if found.address != (bits == 16) else []),
        *([DATA] if data else []),
        *([repeat] if repeat else []),  # behind the others: Capstone wants it so
        *([found.rex] if found.rex else []),
    ]
    return bytes(prefixes) + body, len(prefixes) - found.length, 64 if bits == 64 else 32


def _opcode(body: bytes, bits: int) -> tuple[int, int]:
    """The opcode table and the opcode; for VEX, EVEX and XOP the table alone."""
    first, second, third = (body + bytes(3))[:3]
    vector = bits == 64 or second >= 0xC0  # else it is LES, LDS or BOUND
    if (first in (0xC4, 0xC5, 0x62) and vector) or (first == 0x8F and second & 0x1F >= 8):
        return _VECTOR, 0
    if first != 0x0F:
        return _ONE_BYTE, first
    if second == 0x38:
        return _0F38, third
    if second == 0x3A:
        return _0F3A, third
    return _0F, second
