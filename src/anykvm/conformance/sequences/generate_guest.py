"""Generated guest code: which program, on which addresses, and the KVM_RUNs that follow."""

from __future__ import annotations

from typing import Any, Final

from anykvm.conformance.host import PAGE
from anykvm.conformance.layout import TEST
from anykvm.conformance.sequences.choose import Choose
from anykvm.conformance.sequences.generate_memory import APIC, FAR, HIGH
from anykvm.conformance.sequences.guest_programs import GROUPS, MODES
from anykvm.conformance.sequences.step import Step, step
from anykvm.conformance.sequences.world import FREE

SCRATCH: Final = 0x28000
"""In slot 0, for what nobody looks at."""
HOLE: Final = 0x20000000
"""Where no slot ever is."""
_SYNCED: Final[list[list[Any]]] = [
    ["regs.rax", 0x77],
    ["regs.rcx", 2],
    ["sregs.cr4", 0x80000620],
    ["sregs.cr2", 5],
    ["events.flags", 1 << 30],
    ["sregs.efer", 0x100],
    ["regs.rdi", TEST],
]
"""What is changed in ``kvm_run.s``, when it is."""
_CARRY: Final = 1
_INTERRUPTS: Final = 0x200
_ALWAYS: Final = 2


def address(choose: Choose) -> int:
    """An address that a guest may find something at, or nothing, or the boundary between."""
    page = choose.weighted(
        {TEST: 10, FAR: 0.7, HOLE: 1.5, APIC: 0.3, HIGH - PAGE: 0.2, FREE: 1.5, HIGH: 0.2, 1 << 47: 0.2}
    )
    if page == TEST:
        page += choose.weighted({0: 3, 1: 2, 3: 2, 4: 1, 7: 2, 8: 2, 9: 1, 11: 1, 12: 1, 15: 1, 16: 1, 19: 1}) * PAGE
    return page + choose.weighted(
        {0: 5, 8: 2, 0x40: 1, 0xFF8: 2, 0xFFC: 1.5, 0xFFF: 1.5, 0xFF0: 1, 1: 1, 3: 0.5, 0xFFA: 1}
    )


def guest(choose: Choose, groups: dict[str, float], *, flush: bool) -> list[Step]:
    """A program of one of the groups, and its runs."""
    group = choose.weighted(groups)
    assembly = choose.of(list(GROUPS[group]))
    rflags = _ALWAYS | choose.weighted({0: 8, _CARRY: 1, _INTERRUPTS: 1})
    args: dict[str, Any] = dict(group=group, asm=assembly, rdi=address(choose), rsi=address(choose))
    if group == "jumps":
        args["rdi"] &= ~7  # an address in parts of two answers would not be canonical, and fail otherwise than natively
        if args["rdi"] & 0xFFF == 0xFF8:  # where in its page the stack's top is: KVM takes it for the device's
            args["rdi"] -= 8
    if group == "stack" and HIGH <= args["rdi"] < HIGH + PAGE:
        args["rdi"] = TEST  # the #PF there would be delivered on the stack below, which is a device
    if "scas" in assembly:
        args["rdi"] = FREE + 0x100
    if group == "vector" and args["rdi"] & 0xFFF > 0xFF0:
        args["rdi"] -= 0x20
    if group == "memory_only":
        args["rdi"], args["rsi"] = (FREE + choose.of([0x100, 0x1FF8, 0x1FFC, 0x1001]) for _ in range(2))
    args["rcx"] = choose.weighted({1: 2, 2: 3, 3: 2, 5: 1, 0: 0.5, 9: 1, 17: 1})
    args["rax"] = choose.of([0x41, 0, TEST, choose.bits(64)])
    if group == "jumps":
        args["rax"] = SCRATCH  # zeros are ADD [RAX], AL: never into themselves
    if group in MODES:
        args["rdi"], args["rsi"] = args["rdi"] & 0xFFFFFFFF, args["rsi"] & 0xFFFFFFFF
    run = runs(choose)
    if group == "memory_only" and ["regs.rdi", TEST] in run.args.get("changes", ()):
        run.args["changes"] = [["regs.rcx", 2]]  # where RDI becomes the stack there would be a device below
    return [step("guest", **args, rflags=rflags, flush=flush), run]


def runs(choose: Choose) -> Step:
    """A few KVM_RUNs, sometimes with something else in kvm_run."""
    args: dict[str, Any] = dict(count=choose.of([1, 2, 3, 3, 4, 6]), answer=choose.below(1000))
    kind = choose.weighted(
        {"plain": 20, "immediate": 1.5, "window": 0.7, "sync": 1.5, "cr8": 0.5, "argument": 0.3, "signalled": 0.7}
    )
    if kind in ("immediate", "window", "signalled"):
        args[kind] = True
    elif kind == "sync":
        args["valid"] = choose.weighted({0: 1, 1: 3, 7: 2, 3: 1, 8: 0.5, 1 << 63: 0.3})
        args["dirty"] = choose.weighted({0: 2, 1: 3, 2: 1, 4: 1, 7: 1, 8: 0.5})
        # The stack and the code segment stay, or the guest would run what it does not have.
        args["changes"] = [choose.of(_SYNCED)]
    elif kind == "cr8":
        args["cr8"] = choose.of([0, 1, 5, 15, 16, 1 << 40])
    elif kind == "argument":
        args["argument"] = 1
    return step("run", **args)


def registers(choose: Choose) -> list[Step]:
    """Change a register while something may be pending, and run on."""
    changes = choose.of([[["rax", 0x99]], [["rcx", 1]], [["rbp", 7]], [["rdi", address(choose)]], [["rbx", 5]]])
    return [step("registers", changes=changes), runs(choose)]
