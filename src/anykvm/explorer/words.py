"""Moves and violations in words: for the diagrams, and for machines."""

from __future__ import annotations

from typing import Any, Final

from anykvm.abi.names import errno_name
from anykvm.explorer.catalogue import classify
from anykvm.explorer.moves import Kind, Move
from anykvm.explorer.properties import Property, Subject, Violation
from anykvm.explorer.rules import Decision
from anykvm.explorer.search import Trace
from anykvm.explorer.state import Call, Kernel, Reason, Union

_OPTIONS: Final = {
    "immediate_exit": "immediate_exit",
    "signal": "a signal waits",
    "bad_sync": "bad kvm_dirty_regs",
}


def result(errno: int) -> str:
    """KVM_RUN's result.

    >>> result(14), result(0)
    ('-EFAULT', '0')
    """
    return f"-{errno_name(errno)}" if errno else "0"


def call(how: Call) -> str:
    """A call of KVM_RUN, with what is special about it."""
    return "KVM_RUN" + "".join(f", {_OPTIONS[name]}" for name, given in how._asdict().items() if given)


def page(reason: Reason, union: Union) -> str:
    """What the shared page says: exit_reason, and the part of the union that goes with it."""
    if reason is Reason.MEMORY_FAULT and union.page is not None:
        return f"MEMORY_FAULT ({union.page.value})"
    if reason is Reason.MMIO:
        return f"MMIO ({'write' if union.write else 'read'})"
    return reason.name


def page_of(kernel: Kernel) -> str:
    """What the shared page says in a state."""
    return page(kernel.reason, kernel.union)


def decided(decision: Decision) -> str:
    """A VMM's decision."""
    return f"{decision.act.value} {decision.page.value}" if decision.page else decision.act.value


def verdict(violation: Violation) -> str:
    """Say in a sentence what is wrong."""
    errno = result(violation.errno)
    cause = f"page {violation.cause.value}" if violation.cause else None
    match violation.property, violation.subject:
        case Property.MISREAD, Subject.FAULT:
            why = f"for {cause}" if cause else "for no page"
            assert violation.page is not None
            return f"misread: the VMM resolves page {violation.page.value}; KVM_RUN gave {errno} {why}"
        case Property.MISREAD, Subject.EXIT:
            return f"misread: the VMM performs a device access; KVM_RUN gave {errno}, and no exit"
        case Property.FAULT_LOST, Subject.FAULT:
            return f"fault lost: KVM_RUN gave {errno} for {cause}; the VMM does not learn it, or does not look"
        case Property.ACCESS_LOST, Subject.EXIT:
            return "access lost: the guest's device access never reaches the device"
        case Property.ACCESS_LOST, Subject.ANSWER:
            return "access lost: the guest reads something else than the VMM answered"
        case Property.REPEATED, Subject.FAULT:
            assert violation.page is not None
            return f"repeated: page {violation.page.value} is resolved again, and the guest has done nothing since"
    return "repeated: the guest's device access reaches the device twice"


def plain(trace: Trace) -> dict[str, Any]:
    """Give a trace as JSON has it."""
    policy, rule, arch = trace.game
    return {
        "name": classify(trace.violation),
        "policy": policy.name,
        "rule": rule.name,
        "arch": arch.name,
        "property": trace.violation.property.value,
        "verdict": verdict(trace.violation),
        "moves": [_move(step.move, step.world.kernel) for step in trace.steps],
    }


def _move(move: Move, after: Kernel) -> dict[str, Any]:
    said: dict[str, Any] = {"what": call(move.call) if move.call else move.kind.value}
    if move.ended is not None:
        said["result"] = result(move.ended.errno)
        said["steps"] = list(move.ended.steps)
    if move.decision is not None:
        said["decision"] = decided(move.decision)
    if move.kind is not Kind.REACT:
        said["exit_reason"] = page_of(after)
    return said
