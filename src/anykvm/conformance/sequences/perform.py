"""Perform a sequence on a backend: one record a step, and one a KVM_RUN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from anykvm.conformance.scenario import Lab
from anykvm.conformance.sequences import host_steps, memory_steps, run_steps, vcpu_steps
from anykvm.conformance.sequences.step import Step
from anykvm.conformance.sequences.world import World

OPS: Final[dict[str, Callable[..., Any]]] = {
    **host_steps.OPS,
    **memory_steps.OPS,
    **vcpu_steps.OPS,
    **run_steps.OPS,
}
"""Every step there is."""


def perform(lab: Lab, setup: str, steps: Sequence[Step]) -> None:
    """Perform steps in a world of their own, and record at the end what memory and the vCPU hold.

    Raises KeyError for an unknown step, TypeError for wrong arguments, and what a step that cannot fail raises.
    """
    world = World(lab, setup)
    for number, (op, args) in enumerate(steps):
        world.begin(number, op)
        OPS[op](world, **args)
    for op, args in _END:
        world.begin(len(steps), f"end_{op}_{args.get('kind', '')}")
        OPS[op](world, **args)


_END: Final = (Step("memory", {}), Step("show", {"kind": "regs"}), Step("show", {"kind": "events"}))
