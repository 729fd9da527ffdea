"""LOCK before every opcode: what may have it, and #UD for the rest (APM vol. 3, 1.2.5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "guest_exceptions"
_LOCK: Final = 0xF0
_ESCAPE: Final = 0x0F
_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, *range(0x40, 0x50)))
_MEMORY: Final = 7
"""ModRM of [rdi]."""
_REGISTER: Final = 0xC7
_REPORT: Final = bytes.fromhex("9090909090909090e610f4")  # immediates, or NOPs; out 0x10, al; hlt
_UNDEFINED: Final = 6


@scenario("lock_one_byte", area=AREA, timeout=60)
def lock_one_byte(lab: Lab) -> None:
    """LOCK before the opcodes of one byte."""
    _record(lab, b"", [opcode for opcode in range(256) if opcode not in _PREFIXES and opcode != _ESCAPE])


@scenario("lock_two_bytes", area=AREA, timeout=60)
def lock_two_bytes(lab: Lab) -> None:
    """LOCK before the opcodes behind 0F, but for those of three bytes.

    Nor MOV to CR0: that is AMD's MOV to CR8, which KVM intercepts and emulates in vain without decode assists.
    """
    _record(lab, bytes((_ESCAPE,)), [opcode for opcode in range(256) if opcode not in (0x22, 0x38, 0x3A)])


@scenario("lock_other_forms", area=AREA)
def lock_other_forms(lab: Lab) -> None:
    """LOCK before opcodes of three bytes and VEX, with other prefixes, over the end of a page, and twice."""
    m, memory = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, memory)
    for name, text in (
        ("movbe", "f00f38f007"),
        ("pshufb", "f00f380007"),
        ("palignr", "f0660f3a0f0701"),
        ("vzeroupper", "f0c5f877"),
        ("andn", "f0c4e278f207"),
        ("add_16", "f0660107"),
        ("66_lock_add", "66f00107"),
        ("repne_lock_add", "f2f00107"),
        ("rex_lock_add", "48f00107"),
        ("lock_rex_add", "f0480107"),
        ("lock_lock_add", "f0f00107"),
        ("lock_lock_mov", "f0f08907"),
        ("lock_insb", "f06c"),
        ("lock_rep_outsb", "f0f36e"),
        ("lock_int1", "f0f1"),
        ("lock_vmmcall", "f00f01d9"),
        ("cmpxchg16b", "f0480fc70f"),
    ):
        lab.note(name, seen=_seen(m, bytes.fromhex(text)))
    for before in (1, 2, 3):
        for name, text in (("mov", "f08907"), ("add", "f00107")):
            m.drain()
            m.memory.put(layout.CODE + PAGE - before, bytes.fromhex(text) + _REPORT)
            m.registers(rdi=TEST, rip=layout.CODE + PAGE - before)
            lab.note(f"{name}_{before}_before_the_end", seen=_run(m))


def _record(lab: Lab, escape: bytes, opcodes: list[int]) -> None:
    m, memory = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, memory)
    lab.note("memory", allowed=list(_allowed(m, escape, opcodes, _MEMORY, range(8))))
    lab.note("registers", allowed=list(_allowed(m, escape, opcodes, _REGISTER, (0, 1, 5))))


def _allowed(m: Machine, escape: bytes, opcodes: list[int], modrm: int, fields: Iterable[int]) -> Iterator[str]:
    """Give what is not #UD, as ``opcode/fields outcome``."""
    for opcode in opcodes:
        outcomes: dict[str, str] = {}
        for field in fields:
            seen = _seen(m, bytes((_LOCK, *escape, opcode, modrm | field << 3)))
            outcomes[seen] = outcomes.get(seen, "") + str(field)
        yield from (f"{opcode:02x}/{which} {seen}" for seen, which in outcomes.items() if seen != "#UD")


def _seen(m: Machine, code: bytes) -> str:
    m.at(code + _REPORT, TEST)
    return _run(m)


def _run(m: Machine) -> str:
    outcome = attempt(lambda: m.vcpu.ioctl(n.KVM_RUN))
    run = m.run_page
    if outcome.failed or run.exit_reason != c.KVM_EXIT_IO:
        return f"errno {outcome.errno}, exit {run.exit_reason}"
    if run.io.port != layout.EXCEPTION_PORT:
        return "done"
    vector = m.pio_data(1)[0]
    return "#UD" if vector == _UNDEFINED else f"#{vector}"
