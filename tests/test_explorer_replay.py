"""Traces and walks of the model on real guests of the soft backend, compared move by move."""

from __future__ import annotations

import errno as e
import signal
from dataclasses import replace

import pytest

from anykvm import abi
from anykvm.abi.validity import EHWPOISON
from anykvm.backends.soft.profiles import profile
from anykvm.explorer import ENTRIES, POLICIES, Trace, trace
from anykvm.explorer.kernel import annotated
from anykvm.explorer.moves import Game, Kind
from anykvm.explorer.policy import Policy
from anykvm.explorer.replay import replay, why_not
from anykvm.explorer.replay.guest import GPA, Guest, encode, page_at
from anykvm.explorer.rules import Act, Seen, documented
from anykvm.explorer.search import Walk, walks
from anykvm.explorer.state import Insn, Page, Reason, Union
from explorer_games import campaign, game
from vmm_helpers import require_soft

NOT_ON_SOFT = {
    "T4": "in-kernel APIC",
    "T6": "asynchronous page faults",
    "T7s": "SEV-ES",
    "T8n": "helper thread",
    "T10": "guests are x86",
    "T14": "gives none up",
    "early": "no profile has an EFAULT before the reset",
}


@pytest.fixture(autouse=True)
def soft() -> None:
    require_soft()


def told(walk: Walk) -> str:
    """A replay as lines, for a failure's message."""
    return "\n".join(f"{step.what}: {step.real}; the model: {step.model}" for step in replay(walk).steps)


@pytest.mark.parametrize("name", ENTRIES)
def test_named_trace(name: str) -> None:
    shown = trace(name)
    if name in NOT_ON_SOFT:
        why = why_not(shown)
        assert why is not None and NOT_ON_SOFT[name] in why
        with pytest.raises(ValueError, match="this walk cannot be replayed: "):
            replay(shown)
        return
    performed = replay(shown)
    assert performed.agrees, told(shown)
    assert len(performed.steps) == shown.length and performed.profile == shown.game.policy.profile


def test_all_that_the_searches_found() -> None:
    done = campaign()
    assert not done.disagreeing, [told(shown) for shown, _ in done.disagreeing]
    assert set(done.replays) | set(done.refused) == set(ENTRIES)
    assert set(done.refused) == set(NOT_ON_SOFT)
    assert sum(len(replays) for replays in done.replays.values()) > 100
    profiles = {one.profile for replays in done.replays.values() for _, one in replays}
    assert profiles == {policy.profile for policy in POLICIES.values()} - {None}


def of_game(played: Game, kind: Kind, wanted: int) -> list[Walk]:
    """Walks that soft can perform and that end with such a move, spread over them."""
    possible = [walk for walk in walks(played, 4) if walk.steps[-1].move.kind is kind and why_not(walk) is None]
    return possible[:: max(1, len(possible) // wanted)]


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.profile])
def test_walks_without_a_violation(policy: str) -> None:
    """The model is right not only where something goes wrong."""
    samples = [("documented", kind, 6) for kind in (Kind.RUN, Kind.REACT, Kind.DIE, Kind.PRE_FAULT)]
    samples += [("two-threads", Kind.OTHER_RUN, 4), ("deferring", Kind.RUN, 4), ("kvmtool+ie", Kind.RUN, 4)]
    for rule, kind, wanted in samples:
        chosen = of_game(game(policy, rule), kind, wanted)
        assert bool(chosen) == ((policy, kind) != ("P0", Kind.PRE_FAULT))
        for walk in chosen:
            assert replay(walk).agrees, told(walk)


def elsewhere(shown: Trace, other: str) -> Walk:
    """The same moves, claimed of another KVM."""
    policy = replace(shown.game.policy, profile=other)
    return Walk(shown.game._replace(policy=policy), shown.steps)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES.values() if policy.profile])
def test_policies_and_profiles_say_the_same(policy: Policy) -> None:
    """A policy is the model's, its profile the soft backend's."""
    assert policy.profile is not None
    of_soft = profile(policy.profile)
    assert of_soft.purge is policy.purge
    assert of_soft.annotate_unresolved == annotated(Page.H, policy)
    assert (of_soft.capabilities.get(abi.KVM_CAP_GUEST_MEMFD) != 0) == annotated(Page.G, policy)
    for errno in (e.EFAULT, EHWPOISON, e.EINTR, e.EINVAL, e.ENOMEM):
        decision = documented(Seen(errno, Reason.MEMORY_FAULT, Union(Page.G)), policy)
        assert of_soft.memory_fault_valid(errno, abi.KVM_EXIT_MEMORY_FAULT) == (decision.act is Act.RESOLVE)
        assert not of_soft.memory_fault_valid(errno, abi.KVM_EXIT_UNKNOWN)


@pytest.mark.parametrize(
    ("name", "other", "move"),
    [
        ("T1", "early-purge-after-completion", 3),
        ("T2", "early-purge-after-lock", 3),
        ("T7", "documented", 1),
        ("T9", "linux-7.3", 3),
        ("T11", "early-purge-after-lock", 2),
        ("T12", "early-purge-before-lock", 3),
        ("T15", "documented", 1),
        ("T15n", "linux-7.3", 3),
        ("guard", "linux-7.3", 1),
    ],
)
def test_a_model_that_is_wrong_is_found_out(name: str, other: str, move: int) -> None:
    """The replay ends at the move in which that KVM does otherwise."""
    performed = replay(elsewhere(trace(name), other))
    assert [step.agrees for step in performed.steps] == [True] * (move - 1) + [False]


def test_sgx_runs_out_of_epc() -> None:
    """The thread's own case: VM_PFNMAP memory, whose fault handler fails, is a bare EFAULT; never the last page's."""
    for name, reason in (("T15", "exit_reason UNKNOWN"), ("T15n", "exit_reason MEMORY_FAULT (g)")):
        failed = replay(trace(name)).steps[-2]
        assert failed.real.startswith(f"-EFAULT, {reason}")
    with Guest("linux-7.3", [Insn.TOUCH_E, Insn.HLT], private=True) as guest:
        for expected in (e.EFAULT, e.EFAULT):
            with pytest.raises(OSError) as caught:
                guest.vcpu.run()
            assert (caught.value.errno, guest.position()) == (expected, 0)
        guest.resolve(GPA[Page.E])
        guest.vcpu.run()
        assert guest.position() == 2


@pytest.mark.parametrize("page", [Page.G, Page.N, Page.P, Page.H, Page.E])
def test_a_resolved_page_lets_the_guest_go_on(page: Page) -> None:
    with Guest("documented", [Insn[f"TOUCH_{page.name}"], Insn.HLT], private=True) as guest:
        before = guest.position()
        with pytest.raises(OSError) if page is Page.N else _nothing():
            guest.vcpu.run()
        assert guest.position() == before == 0
        if page is not Page.G:
            guest.convert(GPA[page])
            with pytest.raises(OSError) if page is Page.N else _nothing():
                guest.vcpu.run()
            assert guest.position() == 0
        guest.resolve(GPA[page])
        guest.vcpu.run()
        assert guest.position() == 2


class _nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_an_instruction_that_soft_does_not_have() -> None:
    with pytest.raises(KeyError):
        encode(Insn.TOUCH_S)
    assert all(len(encode(insn)) == 8 for insn in (Insn.HLT, Insn.READ, Insn.WRITE, Insn.WRITE_ACROSS, Insn.TOUCH_E))


def test_every_touch_has_its_own_page() -> None:
    assert [page_at(gpa) for gpa in (GPA[Page.N], GPA[Page.N] + 0xFFFF, 0, 0x800000)] == [Page.N, Page.N, None, None]
    with Guest("documented", [Insn.TOUCH_H, Insn.TOUCH_H, Insn.HLT], private=False) as guest:
        for number in range(2):
            guest.vcpu.run()
            assert guest.vcpu.kvm_run.memory_fault.gpa == GPA[Page.H] + number * 4096
            guest.resolve(guest.vcpu.kvm_run.memory_fault.gpa)
        guest.vcpu.run()
        assert guest.position() == 3


def test_signals_are_taken_back() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.getsignal(signal.SIGUSR1)
    performed = 0
    for walk in walks(game("P1", "kvmtool"), 3):
        if why_not(walk) is None and any(step.move.call and step.move.call.signal for step in walk.steps):
            assert replay(walk).agrees, told(walk)
            performed += 1
    assert performed > 5
    assert signal.SIGUSR1 not in signal.sigpending()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert signal.getsignal(signal.SIGUSR1) == handler
