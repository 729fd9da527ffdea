"""From a seed to a sequence of steps. It depends on the seed alone, never on what a step gave.

What is left out, because the soft backend is known not to have it (README, status table) or because the machine and
not KVM decides it, is said at ``LEFT_OUT``; the generator makes nothing of that kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from anykvm.conformance.sequences import generate_guest as guest
from anykvm.conformance.sequences import generate_memory as memory
from anykvm.conformance.sequences import generate_state as state
from anykvm.conformance.sequences.choose import Choose
from anykvm.conformance.sequences.step import Step

SETUPS: Final = {"plain": 6.0, "manual": 1.0, "initially_set": 1.0, "ring": 1.0}
"""How a machine is made, and how often."""

_Maker = Callable[[Choose], list[Step]]

_SLOTS: Final[dict[_Maker, float]] = {
    memory.slot: 5,
    memory.odd_slot: 3,
    memory.delete: 1.5,
    memory.change_slot: 2,
    memory.host_change: 1,
}
_HOST: Final[dict[_Maker, float]] = {
    memory.host_change: 5,
    memory.slot: 1,
    memory.delete: 0.5,
    memory.pre_fault: 0.7,
}
_DIRTY: Final[dict[_Maker, float]] = {
    memory.logged_slot: 2,
    memory.dirty_log: 5,
    memory.change_slot: 1,
    memory.host_change: 1,
    memory.pre_fault: 0.3,
}
_GMEM: Final[dict[_Maker, float]] = {
    memory.gmem: 5,
    memory.gmem_slot: 4,
    memory.delete: 1,
    memory.pre_fault: 1,
    memory.host_change: 1,
}
_STATE: Final[dict[_Maker, float]] = {
    state.structure: 6,
    state.msrs: 3,
    state.cpuid: 1,
    state.translate: 1,
    state.vm_numbers: 1.5,
    state.refused: 1,
}
_EVENTS: Final[dict[_Maker, float]] = {
    state.events: 4,
    state.inject: 3,
    guest.registers: 1,
    state.signal_mask: 1,
}
_PAGING: Final[dict[_Maker, float]] = {
    memory.page_table_entry: 5,
    memory.host_change: 1,
    memory.slot: 1,
    state.translate: 1,
}
_NOTHING: Final[dict[_Maker, float]] = {memory.host_change: 1, memory.slot: 1, guest.registers: 1}


class _Theme(NamedTuple):
    """What a sequence is mostly about."""

    weight: float
    makers: dict[_Maker, float]
    groups: dict[str, float]
    """Of guest code."""
    guests: float
    """How often a step is guest code."""


_MEMORY_CODE: Final = {
    "moves": 4.0,
    "arithmetic": 2.0,
    "locked": 2.0,
    "stack": 1.0,
    "string": 2.0,
    "jumps": 1.0,
    "memory_only": 1.0,
}
_EMULATED: Final = {**_MEMORY_CODE, "string": 5.0, "ports": 5.0, "vector": 2.0, "arithmetic": 4.0}
THEMES: Final = {
    "slots": _Theme(2, _SLOTS, _MEMORY_CODE, 0.3),
    "host": _Theme(3, _HOST, {**_MEMORY_CODE, "ports": 1, "vector": 1}, 0.55),
    "dirty": _Theme(2, _DIRTY, {**_MEMORY_CODE, "ports": 0.5}, 0.45),
    "gmem": _Theme(2, _GMEM, {**_MEMORY_CODE, "ports": 0.5}, 0.4),
    "state": _Theme(2, _STATE, {"system": 3, "moves": 1, "memory_only": 1}, 0.25),
    "events": _Theme(1.5, _EVENTS, {"system": 3, "moves": 1, "ports": 1, "memory_only": 1}, 0.5),
    "emulator": _Theme(3, _NOTHING, _EMULATED, 0.8),
    "modes": _Theme(1, _NOTHING, {"protected": 1, "real": 1, "moves": 0.3}, 0.75),
    "paging": _Theme(1.5, _PAGING, {**_MEMORY_CODE, "ports": 0.5}, 0.5),
    "system": _Theme(1, _NOTHING, {"system": 4, "moves": 1}, 0.75),
}
"""Themes by name."""

LEFT_OUT: Final = {
    # what the soft backend is known not to have, or to do otherwise
    "an in-kernel irqchip, SMM, nested virtualization, guest debugging, other CPU features": "not offered",
    "a vCPU id between 1,023 and 16,383, a TSC frequency": "limits that differ by design",
    "code beyond a segment's limit": "the soft backend does not check limits",
    "host mappings that may be written or executed, not read": "an x86 page table cannot say so",
    "raw reads, seeks, mappings and unaligned holes of a guest_memfd": "the soft backend's is a memfd",
    "CMPS with a device": "KVM reads RSI's first, the engine RDI's",
    "SCAS with a device": "KVM writes the flags back when it ends, the engine after each item",
    "PUSHA and far pointers with a device, 16 bytes over a page": "KVM accesses a device in other portions",
    "the upper halves of registers in 32-bit code": "the engine takes them for 0",
    "CMPXCHG16B, SGDT, SIDT, LGDT, LIDT, SLDT, STR with a device": "KVM reads first, and other sizes",
    "a jump, by a device's answer, to an address that is not canonical": "KVM's emulator refuses, a processor jumps",
    "an exception of a vector that is none (31)": "the processor's own check: KVM_EXIT_FAIL_ENTRY",
    # what the kernel or its machine does by itself
    "registers set between a device read and its completion": "7.3 loses what was read",
    "CALL through a device whose offset in its page is the stack's": "7.3 pushes the return address into the device "
    "(emulator_can_use_gpa())",
    "exceptions of 32-bit code": "the handlers are 64-bit code, run as 16-bit code above 64 KiB",
    "an exception on a stack that is a device": "7.3 tries for ever once it knows the page (npf_interception())",
    "EFER.LME in real mode": "the oracle's emulated processor does not come back from the guest",
    "the exception and interrupt numbers of events that are over": "stale fields of the kernel's",
    "a software interrupt that is injected": "a stale svm->next_rip decides; the scenario regression_soft_interrupt",
    "CR2 after another exception than #PF, XSETBV before CR4.OSXSAVE, a guest's LSTAR that is not canonical": "the "
    "emulated processor of the oracle",
    "flags that an instruction leaves undefined": "a processor's, or its emulator's",
    "MSRs and host addresses with bits 47 to 56": "the host's 57-bit addresses decide",
    "CR4.MCE as the guest reads it": "it is the host's",
    "a private memory type of VM": "Debian builds its kernels without it",
}
"""What no sequence has, and why."""


class Sequence(NamedTuple):
    """What a seed stands for."""

    seed: int
    theme: str
    setup: str
    steps: list[Step]


def generate(seed: int) -> Sequence:
    """Make the sequence of a seed.

    >>> generate(3) == generate(3), generate(3) == generate(4)
    (True, False)
    """
    choose = Choose(seed)
    name = choose.weighted({name: theme.weight for name, theme in THEMES.items()})
    theme = THEMES[name]
    setup = choose.weighted(SETUPS if name in ("dirty", "slots") else {"plain": 1.0})
    # Something to work with, in most sequences.
    steps = memory.first_slots(choose) if choose.chance(0.9) else []
    for _ in range(choose.between(5, 12)):
        if choose.chance(theme.guests):
            steps += guest.guest(choose, theme.groups, flush=name == "paging")
        else:
            steps += choose.weighted(theme.makers)(choose)
    return Sequence(seed, name, setup, steps)
