"""Moves: everything that somebody can do next, and what comes of it.

A move is one thing that one side does: a KVM_RUN from its call to its return; the VMM's look at the result and its
decision; another ioctl; something another thread does. The length of a trace is its number of moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import NamedTuple

from anykvm.explorer import kernel as k
from anykvm.explorer.arch import Arch, Feature
from anykvm.explorer.policy import Annotates, Policy
from anykvm.explorer.properties import Violation, helps, of_decision, of_return
from anykvm.explorer.rules import Act, Decision, Habit, Rule, Seen
from anykvm.explorer.state import PAGE_OF, Access, Call, Insn, Return, Swapped, Unread, World


class Kind(Enum):
    """Whose move, and which."""

    RUN = "KVM_RUN"
    REACT = "the VMM looks and decides"
    PRE_FAULT = "KVM_PRE_FAULT_MEMORY"
    DIE = "another vCPU trips a bug check, and the VM dies"
    RESET = "KVM_SET_MP_STATE: UNINITIALIZED"
    CONVERT = "KVM_SET_MEMORY_ATTRIBUTES: page g becomes private"
    OTHER_RUN = "KVM_RUN of another thread, with a wrong argument"


class Move(NamedTuple):
    """A move with its outcome."""

    kind: Kind
    call: Call | None = None
    ended: Return | None = None
    """Of RUN."""
    seen: Seen | None = None
    decision: Decision | None = None
    """Of REACT."""


class Step(NamedTuple):
    """A move, the world after it, and what it violates."""

    move: Move
    world: World
    violations: tuple[Violation, ...] = ()


class Game(NamedTuple):
    """Who plays: a kernel on an architecture, and a VMM."""

    policy: Policy
    rule: Rule
    arch: Arch

    @property
    def machine(self) -> k.Machine:
        """The kernel's side, with the instructions this VMM's guests may contain."""
        return _machine(self.policy, self.arch, frozenset(_insns(self)))


@cache
def _machine(policy: Policy, arch: Arch, insns: frozenset[Insn]) -> k.Machine:
    return k.Machine(policy, arch, insns)


_NEEDS = {
    Insn.TOUCH_G: (Feature.MISMATCH, Habit.PRIVATE),
    Insn.TOUCH_N: (Feature.GUEST_MEMFD, Habit.PRIVATE),
    Insn.TOUCH_P: (Feature.GUEST_MEMFD, Habit.PRIVATE),
    Insn.TOUCH_E: (Feature.VEPC, None),
    Insn.TOUCH_S: (Feature.SCRATCH, Habit.SEV_ES),
    Insn.TOUCH_SWAPPED: (Feature.ASYNC, Habit.PRIVATE),
    Insn.PUSH_ACROSS: (Feature.ABANDONED, None),
    Insn.WRITE_ACROSS: (Feature.FRAGMENTS, None),
}


def _insns(game: Game) -> Iterator[Insn]:
    for insn in Insn:
        feature, habit = _NEEDS.get(insn, (None, None))
        if feature is not None and feature not in game.arch.features:
            continue
        if habit is not None and habit not in game.rule.habits:
            continue
        if habit is Habit.PRIVATE and game.policy.annotates is Annotates.NOTHING:
            continue  # before 6.8 there is no such memory
        yield insn


def moves(world: World, game: Game, machine: k.Machine) -> Iterator[Step]:
    """Everything that can happen next. ``machine`` is the game's."""
    vmm = world.vmm
    if vmm.stopped:
        return
    if vmm.unread is not None:
        yield _react(world, game)
        if Habit.TWO_THREADS in game.rule.habits:
            kernel = k.refused_run(world.kernel, game.policy)
            erased = vmm.unread.erased or kernel != world.kernel
            yield Step(Move(Kind.OTHER_RUN), World(kernel, vmm._replace(unread=vmm.unread._replace(erased=erased))))
        return
    for call in _calls(world, game):
        for ended in machine.kvm_run(world.kernel, call):
            yield _ran(world, call, ended)
    if not vmm.deferred and not world.kernel.dead:
        yield from _others(world, game)


def _calls(world: World, game: Game) -> Iterator[Call]:
    habits = game.rule.habits
    if world.vmm.deferred:
        yield Call(immediate_exit=True)
        return
    yield Call()
    if Habit.IMMEDIATE_EXIT in habits:
        yield Call(immediate_exit=True)
    if Habit.SIGNAL in habits:
        yield Call(signal=True)
    if Habit.BAD_SYNC in habits and Feature.SYNC_REGS in game.arch.features:
        yield Call(bad_sync=True)


def _others(world: World, game: Game) -> Iterator[Step]:
    kernel, habits, features = world.kernel, game.rule.habits, game.arch.features
    yield Step(Move(Kind.DIE), world._replace(kernel=kernel._replace(dead=True)))
    known = game.policy.annotates is not Annotates.NOTHING  # else it is older than the ioctl
    if known and Habit.PRE_FAULT in habits and Feature.PRE_FAULT in features:
        yield Step(Move(Kind.PRE_FAULT), world._replace(kernel=k.pre_fault(kernel)))
    if Habit.RESET in habits and Feature.MP_STATE in features and not kernel.uninitialized:
        yield Step(Move(Kind.RESET), world._replace(kernel=kernel._replace(uninitialized=True)))
    if kernel.swapped is Swapped.OUT:
        yield Step(Move(Kind.CONVERT), world._replace(kernel=kernel._replace(swapped=Swapped.CONVERTED)))


def _ran(world: World, call: Call, ended: Return) -> Step:
    vmm = world.vmm
    violations = of_return(vmm, ended)
    access = vmm.access
    if ended.device and not ended.again:
        access = Access.REPORTED
    stands = not ended.did or (ended.again and len(ended.did) == 1)  # where it stood before
    unread = Unread(ended.errno, ended.cause, ended.device)
    vmm = vmm._replace(unread=unread, resolved=vmm.resolved if stands else None, access=access)
    return Step(Move(Kind.RUN, call, ended), World(ended.kernel, vmm), violations)


def _react(world: World, game: Game) -> Step:
    kernel, vmm = world
    unread = vmm.unread
    assert unread is not None
    seen = Seen(unread.errno, kernel.reason, kernel.union, vmm.deferred)
    decision = game.rule.decide(seen, game.policy)
    redone = k.redone(kernel, game.arch)
    violations = of_decision(vmm, unread, kernel.union, decision, redone=redone)
    act = decision.act
    vmm = vmm._replace(unread=None, deferred=act is Act.DEFER, stopped=act is Act.STOP)
    if act is Act.RESOLVE:
        vmm = vmm._replace(resolved=decision.page)
        if helps(game.rule, decision.page, PAGE_OF.get(kernel.insn) if kernel.insn else None):
            kernel = kernel._replace(insn=None)
    elif act is Act.SERVE:
        vmm = vmm._replace(access=Access.PERFORMED)
        if kernel.union.read:
            kernel = kernel._replace(union=kernel.union._replace(answered=True))
    return Step(Move(Kind.REACT, seen=seen, decision=decision), World(kernel, vmm), violations)
