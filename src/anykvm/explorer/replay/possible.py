"""Which traces the soft backend can perform, and why not the others."""

from __future__ import annotations

from typing import Final

from anykvm.explorer.moves import Kind, Step
from anykvm.explorer.search import Walk
from anykvm.explorer.state import Insn

_INSNS: Final = {
    Insn.TOUCH_SWAPPED: "soft has no asynchronous page faults",
    Insn.PUSH_ACROSS: "soft hands a device write out after its instruction has retired, so it gives none up",
    Insn.TOUCH_S: "soft has no SEV-ES guests",
}
_STEPS: Final = {
    "S1: the helper thread": "soft starts no helper thread",
    "S1: an access to user space": "no profile has an EFAULT before the reset",
    "S8: no memory for page tables": "soft has no page tables of its own",
}


def why_not(walk: Walk) -> str | None:
    """Say why a walk cannot be replayed; None if it can."""
    policy, _, arch = walk.game
    if arch.name != "x86":
        return f"soft's guests are x86, whose completions need no exit_reason; this one is {arch.name}'s"
    reasons = filter(None, map(_of_step, walk.steps))
    return next(reasons, None) or (None if policy.profile else f"no profile is {policy.name}")


def _of_step(step: Step) -> str | None:
    if step.move.kind is Kind.RESET:
        return "soft has no in-kernel APIC, so KVM_SET_MP_STATE refuses UNINITIALIZED"
    ended = step.move.ended
    if ended is None:
        return None
    for insn in ended.did:
        if insn in _INSNS:
            return _INSNS[insn]
    return next((why for start, why in _STEPS.items() if any(said.startswith(start) for said in ended.steps)), None)
