"""A case by its number. They are walked in a fixed order that jumps, so that a few of them cover all evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from instruction_fuzz.modes import MODES

MAPS = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
PREFIXES = (b"", b"\x66", b"\xf2", b"\xf3", b"\x66\xf2", b"\x67", b"\xf0", b"\x64\x66\x67")
REXES = (0, 0x40, 0x48, 0x44, 0x4F, 0x4D)
IMMEDIATES = (0x00, 0x01, 0x07, 0x0F, 0x10, 0x1F, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xF4, 0xFE, 0xFF)
ADDRESSES = (
    b"\x03",
    b"\x06",
    b"\x44\x8b\x10",
    b"\x85\x00\x00\x06\x00",
    b"\x04\x25\x00\x00\x06\x00",
)  # ModRM less its reg
SPACE = len(MODES) * len(MAPS) * 256 * len(PREFIXES) * len(REXES) * 8 * (1 + len(ADDRESSES))
STRIDE = next(n for n in range(int(SPACE * 0.6180339887), SPACE) if math.gcd(n, SPACE) == 1)
PAGE_OF_CODE = 4000


@dataclass(frozen=True)
class Case:
    """Code to execute in a mode."""

    number: int
    mode: str
    code: bytes
    kind: str
    """"one" instruction, a "page" of it, or "random" bytes."""


def one_instruction(index: int, wide: bool, random: Random) -> tuple[bytes, int]:
    """The form of an index; returns it, and what is left of the index."""
    index, opcode = divmod(index, 256)
    index, opcode_map = divmod(index, len(MAPS))
    index, prefix = divmod(index, len(PREFIXES))
    index, rex = divmod(index, len(REXES))
    index, reg = divmod(index, 8)
    index, address = divmod(index, 1 + len(ADDRESSES))
    if address == len(ADDRESSES):
        modrm = bytes([0xC0 | reg << 3 | random.randrange(8)])
    else:
        modrm = bytes([ADDRESSES[address][0] | reg << 3]) + ADDRESSES[address][1:]
    start = PREFIXES[prefix] + (bytes([REXES[rex]]) if wide and REXES[rex] else b"")
    if random.random() < 0.03:  # VEX: R, X, B and map; W, vvvv, L, pp
        vex = bytes([0xC4, random.getrandbits(3) << 5 | random.randrange(1, 4), random.getrandbits(8)])
        return start[:1] * (random.random() < 0.1) + vex + bytes([opcode]) + modrm + immediate(random), index
    return start + MAPS[opcode_map] + bytes([opcode]) + modrm + immediate(random), index


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
    if kind < 0.02:
        return Case(number, chosen.name, code * (PAGE_OF_CODE // len(code)), "page")
    if kind < 0.10:
        return Case(number, chosen.name, random.randbytes(random.choice((15, 40, 200))), "random")
    return Case(number, chosen.name, code, "one")
