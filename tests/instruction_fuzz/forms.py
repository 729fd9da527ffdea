"""A case by its number. They are walked in a fixed order that jumps, so that a few of them cover all evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from instruction_fuzz.modes import MODES

MAPS = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
PREFIXES = (b"", b"\x66", b"\xf2", b"\xf3", b"\x66\xf2", b"\x67", b"\xf0", b"\x64\x66\x67")
REXES = (0, 0x40, 0x48, 0x44, 0x4F, 0x4D)
IMMEDIATES = (0x00, 0x01, 0x07, 0x0F, 0x10, 0x1F, 0x20, 0x3F, 0x40, 0x80, 0xF4, 0xFE, 0xFF)
# and not 7F, which is a jump where no immediate is wanted
ADDRESSES = (
    b"\x03",
    b"\x06",
    b"\x44\x8b\x10",
    b"\x85\x00\x00\x06\x00",
    b"\x04\x25\x00\x00\x06\x00",
)  # ModRM less its reg
SPACE = len(MODES) * len(MAPS) * 256 * len(PREFIXES) * len(REXES) * 8 * 2 * len(ADDRESSES)
STRIDE = next(n for n in range(int(SPACE * 0.6180339887), SPACE) if math.gcd(n, SPACE) == 1)
PAGE_OF_CODE = 4000


@dataclass(frozen=True)
class Case:
    """Code to execute in a mode."""

    number: int
    mode: str
    code: bytes
    kind: str
    """"one" instruction, a "page" of it, "random" bytes, or one on "registers" that meet all extremes."""
    copies: int = 1


def one_instruction(index: int, wide: bool, random: Random) -> tuple[bytes, int]:
    """The form of an index; returns it, and what is left of the index."""
    index, opcode = divmod(index, 256)
    index, opcode_map = divmod(index, len(MAPS))
    index, prefix = divmod(index, len(PREFIXES))
    index, rex = divmod(index, len(REXES))
    index, reg = divmod(index, 8)
    index, address = divmod(index, 2 * len(ADDRESSES))
    if address >= len(ADDRESSES):
        modrm = bytes([0xC0 | reg << 3 | random.randrange(8)])
    else:
        modrm = bytes([ADDRESSES[address][0] | reg << 3]) + ADDRESSES[address][1:]
    start = PREFIXES[prefix] + (bytes([REXES[rex]]) if wide and REXES[rex] else b"")
    if random.random() < 0.03:  # VEX: R, X, B and map; W, vvvv, L, pp
        vex = bytes([0xC4, random.getrandbits(3) << 5 | random.randrange(1, 4), random.getrandbits(8)])
        return start[:1] * (random.random() < 0.1) + vex + bytes([opcode]) + modrm + immediate(random), index
    return start + MAPS[opcode_map] + bytes([opcode]) + modrm + immediate(random), index


def on_registers(wide: bool, random: Random) -> bytes:
    """An instruction of the common forms, on registers."""
    prefix = random.choice((b"", b"", b"\x66", b"\xf2", b"\xf3"))
    rex = b"\x48" if wide and random.random() < 0.4 else b""
    modrm = 0xC0 | random.getrandbits(6)
    return prefix + rex + random.choice(MAPS) + bytes([random.getrandbits(8), modrm]) + immediate(random)


_LEGACY = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
_GO_ELSEWHERE = {*range(0x6C, 0x80), 0x9A, 0x9D, *range(0xA4, 0xA8), *range(0xAA, 0xB0), 0xC2, 0xC3, *range(0xCA, 0xD0)}
_GO_ELSEWHERE |= {*range(0xE0, 0xE4), *range(0xE8, 0xEC), 0xF1, 0xF4, 0xFF}


def may_stay(code: bytes, bits: int) -> bool:
    """Whether an instruction may be where its guest is for ever: a jump, a return, or one that is repeated."""
    code = code.lstrip(_LEGACY)
    if bits == 64 and code[:1] and code[0] & 0xF0 == 0x40:
        code = code[1:]
    if code[:1] == b"\x0f":
        return code[1:2] == b"" or code[1] in {0x05, 0x07, 0x0B, 0x34, 0x35, 0xAA, *range(0x80, 0x90)}
    return code == b"" or code[0] in _GO_ELSEWHERE


def immediate(random: Random) -> bytes:
    """What comes behind ModRM: an immediate of one byte or more, or further instructions."""
    return bytes([random.choice(IMMEDIATES)]) + random.choice((b"", bytes([random.choice(IMMEDIATES)]) * 3))


def case(number: int, seed: int = 0) -> Case:
    """The case of a number, from 0 on; the seed shifts where the walk begins."""
    random = Random(f"{seed} {number}")
    index, mode = divmod((number * STRIDE + seed * 7919) % SPACE, len(MODES))
    chosen = MODES[mode]
    code, _ = one_instruction(index, chosen.bits == 64, random)
    kind = random.random()
    if kind < 0.05:
        code = code[: random.choice((2, 3, 4, 5, 5, 6, len(code)))]
        copies = PAGE_OF_CODE // len(code)
        return Case(number, chosen.name, code * copies, "page", copies)
    if kind < 0.10:
        return Case(number, chosen.name, random.randbytes(random.choice((15, 40, 200))), "random")
    if kind < 0.13:
        return Case(number, chosen.name, on_registers(chosen.bits == 64, random), "registers")
    return Case(number, chosen.name, code, "one")
