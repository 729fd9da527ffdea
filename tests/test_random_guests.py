"""Random bytes as guest code, in every mode and ring: whatever a guest does, its vCPU stops or a signal stops it; the
process lives, and nothing but its memslots is reachable."""

from __future__ import annotations

import random
import signal

import pytest

import anykvm
from anykvm import InternalError, Intr, MemoryFault, Shutdown
from anykvm.testing.machine import CODE, HANDLERS, Machine

REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10")
IRET = {"long": bytes.fromhex("48cf"), "legacy": b"\xcf"}


@pytest.fixture
def ticking(alarms: list[int]) -> None:
    """SIGALRM every 20 ms: no guest runs longer between two exits."""
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)


def legacy(machine: Machine, protected: bool) -> None:
    """Real or flat 32-bit protected mode."""
    sregs = machine.vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = 0x11 if protected else 0x10, 0, 0
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.l, segment.db = 0, 0, int(protected)
        if not protected:
            segment.limit, segment.selector = 0xFFFF, 0
    machine.vcpu.set_sregs(sregs)


def value(choose: random.Random) -> int:
    """Small, somewhere in memory, somewhere near it, or anything."""
    return choose.choice((0, 1, choose.getrandbits(64), choose.randrange(1 << 22), choose.randrange(1 << 25)))


def one(machine: Machine, choose: random.Random) -> None:
    mode = choose.choice(("ring 0", "ring 3", "real", "protected"))
    machine.long_mode("hlt", cpl=3 if mode == "ring 3" else 0)
    if choose.random() < 0.5:
        for vector in range(32):
            machine.memory.write(HANDLERS + vector * 64, IRET["long" if mode.startswith("ring") else "legacy"])
    if not mode.startswith("ring"):
        legacy(machine, mode == "protected")
    machine.memory.write(CODE, choose.randbytes(512))
    stack = choose.choice((0x70000, 0x3FF000, choose.getrandbits(64)))
    machine.set_regs(rip=CODE, rsp=stack, **{name: value(choose) for name in REGISTERS})
    for _ in range(40):
        if isinstance(machine.vcpu.run(), Intr | MemoryFault | Shutdown | InternalError):
            break
    events = machine.vcpu.get_vcpu_events()
    events.exception.injected = events.exception.pending = events.interrupt.injected = events.nmi.masked = 0
    machine.vcpu.set_vcpu_events(events)


@pytest.mark.parametrize("seed", [2, 7, *range(100, 106)])
def test_random_code(seed: int, ticking: None) -> None:
    choose = random.Random(seed)
    with anykvm.open("soft") as kvm, Machine(kvm) as machine:
        for _ in range(25):
            one(machine, choose)
