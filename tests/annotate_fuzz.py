"""Generated opcodes in the annotate layer's bed: every legacy encoding with ModRM, whether the engine knows it or not.

The truth is the engine's, as in the rest of the bed.
"""

from __future__ import annotations

from collections.abc import Iterator

from annotate_bed import REFUSALS, Bed, Result
from annotate_encodings import PREFIXES, legacy
from annotate_modes import MODES, PAGE, Mode
from anykvm.abi.constants import KVM_VCPUEVENT_VALID_SHADOW
from anykvm.abi.structures import kvm_regs, kvm_sregs, kvm_vcpu_events

_BEHIND = (b"\1\0\0\0", b"\x40\0\0\0", b"\3\0\0\0")
_GROUPS = {
    b"": {
        *range(0x80, 0x84),
        0x8F,
        0xC0,
        0xC1,
        0xC6,
        0xC7,
        *range(0xD0, 0xD4),
        *range(0xD8, 0xE0),
        0xF6,
        0xF7,
        0xFE,
        0xFF,
    },
    b"\x0f": {0x00, 0x01, 0x0D, 0x18, 0xAE, 0xBA, 0xC7},
}
# 66 beside F2 or F3 in front of SSE: the engine takes it for that with 66, processors for that with F2 or F3.
_ONE_PREFIX = tuple(prefix for prefix in PREFIXES if len(prefix) < 2)


def encodings(bits: int) -> Iterator[bytes]:
    """Each defined opcode once with every prefix; groups with every ModRM.reg."""
    for code in legacy(bits, _ONE_PREFIX):
        body = code.lstrip(b"\x48\x64\x66\x67\xf2\xf3") if bits == 64 else code.lstrip(b"\x64\x66\x67\xf2\xf3")
        escape, opcode, reg = body[:-2], body[-2], body[-1] >> 3
        each = opcode in _GROUPS.get(escape, ()) or reg == (opcode * 5 + len(code)) % 8
        if each and not _undefined(code[0], escape, opcode, reg):
            yield code


def _undefined(prefix: int, escape: bytes, opcode: int, reg: int) -> bool:
    """Encodings no manual has: they raise #UD, though the engine accesses their operand; and what it does wrong."""
    chosen = prefix in (0x66, 0xF2, 0xF3)
    if not escape:
        # IRET is in the bed's own cases; of RFLAGS with VM the engine's goes to virtual-8086 mode from any ring.
        return (opcode == 0x8F and reg != 0) or (opcode == 0xFF and reg == 7) or opcode == 0xCF
    if escape != b"\x0f":
        return False
    if opcode == 0xAE:
        return prefix in (0xF2, 0xF3)
    return (opcode == 0xBA and reg < 4) or (opcode in (0x79, 0xC3) and chosen) or opcode in (0x0F, 0xF7)


class Fuzz(Bed):
    """The bed with generated opcodes: pages of operands and the stack alone are refused, and nothing is delivered."""

    def __init__(self, seed: int, mode: Mode) -> None:
        super().__init__(seed, mode)
        rm = {64: (6, 7, 3), 32: (6, 7, 3), 16: (4, 5, 7)}[mode.bits]
        self.templates = []
        for code in encodings(mode.bits):
            other = self.random.choice(rm) if b"\x67" not in code[:1] or mode.bits == 64 else code[-1] & 7
            made = code[:-1] + bytes((code[-1] & 0x38 | other,)) + self.random.choice(_BEHIND)
            self.templates.append((made.hex(), made))
        self.random.shuffle(self.templates)
        self._next = 0

    def prepare(self) -> str:
        """The next encoding."""
        everything, self.templates = self.templates, [self.templates[self._next % len(self.templates)]]
        self._next += 1
        try:
            return super().prepare()
        finally:
            self.templates = everything

    def offset(self) -> int:
        r = self.random
        return r.choice((0xFC0, 0xFF0, 0xFF8, 0x100, 0x800)) if r.random() < 0.7 else r.randrange(64, PAGE)

    def registers(self, source: str, mnemonic: str, sregs: kvm_sregs, at: int) -> kvm_regs:
        regs = super().registers(source, mnemonic, sregs, at)
        if self.random.random() < 0.5:  # SSE wants its operands aligned
            for name in ("rsi", "rdi", "rbx"):
                setattr(regs, name, getattr(regs, name) & -16)
        return regs

    def events(self) -> kvm_vcpu_events:
        return kvm_vcpu_events(flags=KVM_VCPUEVENT_VALID_SHADOW)

    def choose(self) -> None:
        r = self.random
        pages = [self.page[area, number] for area in ("source", "target", "base", "stack") for number in (0, 1)]
        for page in r.sample(pages, r.choice((1, 2, 4, 8))):
            self.refuse(page, r.choice(REFUSALS))


def run(count: int, seed: int, mode: str) -> Result:
    """Run ``count`` encodings, or all once if 0."""
    result = Result()
    with Fuzz(seed, MODES[mode]) as bed:
        for _ in range(count or len(bed.templates)):
            bed.once(result)
        return result
