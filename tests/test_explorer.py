"""The model of KVM_RUN's errors and its search: what is found, that it is shortest, and that nothing is left out."""

from __future__ import annotations

import errno as e
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anykvm import abi
from anykvm.abi.validity import EHWPOISON
from anykvm.explorer import ARCHITECTURES, ENTRIES, POLICIES, RULES, Game, Property, architecture, named, search, trace
from anykvm.explorer.arch import Selects
from anykvm.explorer.catalogue import classify
from anykvm.explorer.kernel import Machine, annotated, kvm_run, pre_fault, refused_run
from anykvm.explorer.moves import Kind, moves
from anykvm.explorer.properties import Subject, Violation
from anykvm.explorer.rules import Act, Decision, Seen
from anykvm.explorer.search import walks
from anykvm.explorer.state import Call, Completion, Insn, Kernel, Origin, Page, Reason, Return, Swapped, Union, World
from explorer_games import found, game, games
from vmm_helpers import command, environment

ABI = (Path(__file__).parent.parent / "docs" / "ABI.md").read_text()
FAULT = Union(Page.G, Origin.RUN)
EARLY = ("P3a", "P3b", "P3c")

# Name: moves, and the errno of the KVM_RUN that is misread or tells nothing. The last look decides.
EXPECTED = {
    "T1": (4, e.EINTR),
    "T2": (4, e.EINVAL),
    "T3": (5, e.EIO),
    "T4": (5, e.EAGAIN),
    "T5": (3, e.EINTR),
    "T6": (5, e.EFAULT),
    "T7": (2, e.EFAULT),
    "T7n": (4, e.EFAULT),
    "T7s": (2, e.EFAULT),
    "T8": (2, e.ENOMEM),
    "T8n": (3, e.ENOMEM),
    "T8b": (2, EHWPOISON),
    "T9": (4, e.EINTR),
    "T9f": (3, 0),
    "T10": (4, 0),
    "T11": (3, 0),
    "T12": (4, e.EINTR),
    "T13": (4, 0),
    "T14": (2, e.EFAULT),
    "T15": (2, e.EFAULT),
    "T15n": (4, e.EFAULT),
    "early": (4, e.EFAULT),
    "guard": (4, e.EFAULT),
}


def names(policy: str, rule: str, wanted: Property, arch: str = "x86") -> set[str]:
    """What a game's search found for a property."""
    return {classify(violation) for violation in found(policy, rule, arch).traces if violation.property is wanted}


def test_every_trace_of_the_specification_has_an_entry() -> None:
    told = set(re.findall(r"^\* \*\*(T\d+b?)\*\*", ABI, re.MULTILINE))
    assert told == {f"T{number}" for number in range(1, 16)} | {"T8b"}
    assert told <= set(ENTRIES) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_named_trace(name: str) -> None:
    shown = trace(name)
    assert classify(shown.violation) == name
    assert (shown.length, shown.violation.errno) == EXPECTED[name]
    assert [bool(step.violations) for step in shown.steps] == [False] * (shown.length - 1) + [True]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_search_sees_all_states_and_names_all_it_finds(arch: str) -> None:
    for one in games(arch):
        assert one.complete, one.game
        assert set(named(one)) <= set(ENTRIES)
        lengths = [shown.length for shown in one.traces.values()]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_trace_is_a_path_of_the_model(name: str) -> None:
    shown = trace(name)
    machine, world = shown.game.machine, World()
    for step in shown.steps:
        assert step in list(moves(world, shown.game, machine))
        world = step.world
    assert shown.violation in shown.steps[-1].violations


def every_sequence(game: Game, depth: int) -> Iterator[tuple[int, Violation]]:
    """All violations by all sequences of moves, with no memory of states: another algorithm than the search's."""
    machine = game.machine

    def follow(world: World, length: int) -> Iterator[tuple[int, Violation]]:
        for step in moves(world, game, machine):
            if step.violations:
                yield from ((length, violation) for violation in step.violations)
            elif length < depth:
                yield from follow(step.world, length + 1)

    yield from follow(World(), 1)


@pytest.mark.parametrize(
    ("policy", "rule", "arch", "depth"),
    [
        ("P2", "documented", "x86", 3),
        ("P3b", "deferring", "x86", 5),
        ("P1", "errno-blind", "x86", 4),
        ("P3a", "two-threads", "x86", 3),
        ("P3b", "kvmtool+ie", "arm64", 6),
        ("never", "qemu", "x86", 4),
    ],
)
def test_traces_are_the_shortest(policy: str, rule: str, arch: str, depth: int) -> None:
    wanted: dict[Violation, int] = {}
    for length, violation in every_sequence(game(policy, rule, arch), depth):
        wanted[violation] = min(length, wanted.get(violation, length))
    traces = found(policy, rule, arch).traces
    assert wanted and wanted == {v: shown.length for v, shown in traces.items() if shown.length <= depth}


def test_depth_bounds_the_search() -> None:
    whole = found("P2", "documented")
    bounded = search(whole.game, 3)
    assert not bounded.complete and bounded.states < whole.states
    assert list(bounded.traces) == [v for v, shown in whole.traces.items() if shown.length <= 3]
    assert bounded.shortest(Property.REPEATED) is None and whole.shortest(Property.REPEATED) is not None
    assert len({walk.steps[-1].world for walk in walks(whole.game, 3)} | {World()}) == bounded.states


def test_the_same_again_whatever_the_hashes() -> None:
    arguments = command("explore", "--policy", "P2", "--rule", "two-threads", "--json")
    outputs = [
        subprocess.run(
            arguments, env=environment() | {"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and b"T1" in outputs[0]


class TestVerdicts:
    """The table of ABI.md 7.3, by the search; VMMs that keep to the policy's documents, on x86."""

    @pytest.mark.parametrize("policy", ["P1", "P1d", *EARLY])
    def test_the_documented_rule_is_sound_across_runs_and_not_within_one(self, policy: str) -> None:
        assert names(policy, "documented", Property.MISREAD) == {"T6"}

    def test_any_errno_is_not_sound_across_runs(self) -> None:
        assert names("P2", "documented", Property.MISREAD) == {"T1", "T2", "T3", "T4", "T5", "T6", "T8n"}
        assert names("P1", "any-errno", Property.MISREAD) == names("P2", "documented", Property.MISREAD)

    def test_an_early_reset_leaves_what_comes_before_it_and_within_the_run(self) -> None:
        # T5 with EIO: a dead VM is refused ahead of every reset
        for policy in ("P3a", "P3b"):
            assert names(policy, "any-errno", Property.MISREAD) == {"T3", "T5", "T6"}
        late = found("P3c", "any-errno")
        assert {"T2", "T3", "T4", "T6", "T8n"} <= names("P3c", "any-errno", Property.MISREAD)
        # immediate_exit ends a run early only of an uninitialised vCPU, which is ahead of P3c's reset
        assert Kind.RESET in [step.move.kind for step in named(late)["T1"].steps]

    def test_what_is_not_told(self) -> None:
        lost = {policy: names(policy, "documented", Property.FAULT_LOST) for policy in POLICIES}
        assert lost["P0"] == {"T7", "T7s", "T15"}
        assert lost["P1d"] == {"T7s", "T8"}
        assert lost["P2"] == {"T7", "T7s", "T15"}
        assert all(lost[policy] == {"T7", "T7s", "T8", "T15"} for policy in ("P1", *EARLY, "never"))

    def test_completions_selected_by_exit_reason(self) -> None:
        for arch, kind in ARCHITECTURES.items():
            for policy in POLICIES.values():
                broken = "T10" in names(policy.name, "qemu", Property.REPEATED, arch)
                early = policy.name in ("P3a", "P3b", "early-EFAULT+P3b")
                assert broken == (early and kind.selects is Selects.EXIT_REASON), (arch, policy.name)

    def test_reasons_over_immediate_exit(self) -> None:
        for arch in ARCHITECTURES:
            for policy in POLICIES:
                lost = "T9" in names(policy, "deferring", Property.ACCESS_LOST, arch)
                # s390 leaves ahead of what P3c comes after
                wanted = policy in (*EARLY, "early-EFAULT+P3b") and (arch, policy) != ("s390", "P3c")
                assert lost == wanted, (arch, policy)

    def test_another_thread(self) -> None:
        for policy in POLICIES:
            for wanted in (Property.ACCESS_LOST, Property.FAULT_LOST):
                assert ("T11" in names(policy, "two-threads", wanted)) == (policy == "P3a")
        # where the guest does the access again, the second thread erases nothing but time
        erased = {arch for arch in ARCHITECTURES if "T11" in names("P3a", "two-threads", Property.ACCESS_LOST, arch)}
        assert erased == {"x86", "ppc", "s390"}

    def test_what_an_early_reset_cures(self) -> None:
        assert "T12" in names("P1", "kvmtool+ie", Property.REPEATED)
        assert all(not names(policy, "kvmtool+ie", Property.REPEATED) for policy in EARLY)
        assert "early" in names("early-EFAULT", "qemu", Property.MISREAD)
        assert "early" not in names("early-EFAULT+P3b", "qemu", Property.MISREAD)

    def test_the_late_reset_is_what_makes_the_rule_sound(self) -> None:
        assert {"T7n", "T15n"} <= names("never", "qemu", Property.MISREAD)

    def test_a_vmm_that_only_converts_and_every_page_annotated(self) -> None:
        assert {r for r in RULES if "guard" in names("P1d", r, Property.REPEATED)} == {"qemu", "cloud-hypervisor"}
        assert not any("guard" in names("P1", rule, Property.REPEATED) for rule in RULES)

    def test_kvmtool_as_it_is_repeats_nothing(self) -> None:
        assert not any(names(policy, "kvmtool", Property.REPEATED) for policy in POLICIES)


def returns(kernel: Kernel, call: Call = Call(), policy: str = "P1", arch: str = "x86") -> list[Return]:  # noqa: B008
    """How a KVM_RUN can end, for guests that halt, write to a device or touch page g."""
    insns = frozenset((Insn.HLT, Insn.WRITE, Insn.TOUCH_G))
    return list(kvm_run(kernel, call, Machine(POLICIES[policy], ARCHITECTURES[arch], insns)))


class TestKvmRun:
    """The rows of ABI.md 1 in the model."""

    stale = Kernel(reason=Reason.MEMORY_FAULT, union=FAULT, started=True)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_dead_vm(self, policy: str) -> None:
        (ended,) = returns(self.stale._replace(dead=True), policy=policy)
        assert (ended.errno, ended.kernel.reason) == (e.EIO, Reason.MEMORY_FAULT)  # row 1

    @pytest.mark.parametrize(
        ("kernel", "call", "errno", "kept"),
        [
            (stale, Call(bad_sync=True), e.EINVAL, ("P0", "P1", "P1d", "P2", "P3c", "never")),  # row 12
            (stale._replace(uninitialized=True), Call(), e.EAGAIN, ("P0", "P1", "P1d", "P2", "P3c", "never")),  # row 11
            (stale._replace(uninitialized=True), Call(immediate_exit=True), e.EINTR, ("P1", "P3c", "never")),  # row 8
            (stale, Call(immediate_exit=True), e.EINTR, ("P0", "P1", "P1d", "P2", "never")),  # row 17
        ],
    )
    def test_returns_ahead_of_the_guest(self, kernel: Kernel, call: Call, errno: int, kept: tuple[str, ...]) -> None:
        for policy in ("P1", *EARLY, "never"):
            (ended,) = returns(kernel, call, policy)
            reason = Reason.MEMORY_FAULT if policy in kept else Reason.UNKNOWN
            assert (ended.errno, ended.kernel.reason, ended.kernel.union) == (errno, reason, FAULT), policy

    def test_a_signal(self) -> None:
        ended = returns(self.stale, Call(signal=True))[0]
        assert (ended.errno, ended.kernel.reason, ended.did) == (e.EINTR, Reason.INTR, ())  # row 31
        ended = returns(self.stale._replace(uninitialized=True), Call(signal=True))[0]
        assert (ended.errno, ended.kernel.reason) == (e.EINTR, Reason.INTR)  # row 10

    def test_the_completion_comes_before_immediate_exit(self) -> None:
        kernel = Kernel(Reason.MMIO, Union(read=True, answered=True), Completion.READ, started=True, insn=Insn.READ)
        (ended,) = returns(kernel, Call(immediate_exit=True))
        assert (ended.errno, ended.kernel.completion, ended.kernel.insn) == (e.EINTR, Completion.NONE, None)
        assert not ended.answer_lost
        (ended,) = returns(pre_fault(kernel), Call(immediate_exit=True))
        assert ended.answer_lost

    def test_the_second_half_of_a_write_outranks_immediate_exit(self) -> None:
        kernel = Kernel(Reason.MMIO, Union(write=True), Completion.FRAGMENT, started=True)
        (ended,) = returns(kernel, Call(immediate_exit=True))
        assert (ended.errno, ended.device, ended.kernel.completion) == (0, True, Completion.WRITE)  # row 15

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_a_device_write(self, arch: str) -> None:
        write = next(one for one in returns(Kernel(started=True), arch=arch) if one.device)
        assert (write.errno, write.kernel.reason) == (0, Reason.MMIO)
        purged = write.kernel._replace(reason=Reason.UNKNOWN)
        again = [one for one in returns(purged, arch=arch) if one.again]
        assert bool(again) == (ARCHITECTURES[arch].selects is Selects.EXIT_REASON)

    def test_the_first_run_may_fail_for_its_helper(self) -> None:
        first = returns(Kernel(reason=Reason.MEMORY_FAULT, union=FAULT))[0]
        assert (first.errno, first.kernel.reason, first.kernel.started) == (e.ENOMEM, Reason.MEMORY_FAULT, False)

    def test_a_page_that_got_ready_private(self) -> None:
        ended = returns(Kernel(started=True, swapped=Swapped.CONVERTED))
        assert {one.kernel.reason for one in ended} == {Reason.HLT, Reason.MMIO, Reason.MEMORY_FAULT}
        failed = next(one for one in ended if one.errno == e.ENOMEM)
        assert failed.kernel.union == Union(Page.G, Origin.ASYNC)

    def test_what_is_annotated(self) -> None:
        told = {name: {page for page in Page if annotated(page, policy)} for name, policy in POLICIES.items()}
        private = {Page.G, Page.N, Page.P}
        assert told["P0"] == set() and told["P1d"] == private | {Page.H, Page.E}
        assert all(told[name] == private for name in told if name not in ("P0", "P1d"))

    def test_another_threads_refused_run(self) -> None:
        for policy in POLICIES.values():
            assert (refused_run(self.stale, policy) != self.stale) == (policy.name == "P3a")
            assert refused_run(self.stale._replace(dead=True), policy) == self.stale._replace(dead=True)


R = Decision(Act.RESOLVE, Page.G)
STOP, AGAIN, SERVE, DEFER = (Decision(act) for act in (Act.STOP, Act.AGAIN, Act.SERVE, Act.DEFER))
ERRNOS = (0, e.EFAULT, EHWPOISON, e.EINTR, e.EAGAIN, e.ENOMEM)


@pytest.mark.parametrize(
    ("rule", "policy", "beside_fault", "beside_write"),
    [
        ("documented", "P1", (AGAIN, R, R, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("documented", "P0", (AGAIN, STOP, STOP, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("documented", "P2", (AGAIN, R, R, R, R, R), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("any-errno", "P1", (AGAIN, R, R, R, R, R), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("deferring", "P1", (AGAIN, R, R, AGAIN, AGAIN, STOP), (DEFER, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("errno-blind", "P1", (R, R, R, R, R, R), (SERVE, SERVE, SERVE, SERVE, SERVE, SERVE)),
        ("qemu", "P1", (AGAIN, R, STOP, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("kvm-ioctls", "P1", (AGAIN, R, R, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("cloud-hypervisor", "P2", (AGAIN, R, R, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, AGAIN, AGAIN, STOP)),
        ("kvmtool", "P1", (AGAIN, STOP, STOP, AGAIN, AGAIN, STOP), (SERVE, STOP, STOP, SERVE, SERVE, STOP)),
    ],
)
def test_rules(rule: str, policy: str, beside_fault: tuple[Decision, ...], beside_write: tuple[Decision, ...]) -> None:
    """What ABI.md 8 says that each VMM does, by errno, beside MEMORY_FAULT and beside MMIO."""
    decide = RULES[rule].decide
    fault = [decide(Seen(errno, Reason.MEMORY_FAULT, FAULT), POLICIES[policy]) for errno in ERRNOS]
    write = [decide(Seen(errno, Reason.MMIO, Union(write=True)), POLICIES[policy]) for errno in ERRNOS]
    assert (fault, write) == (list(beside_fault), list(beside_write))


def test_a_deferred_write_is_looked_for_in_the_page() -> None:
    decide = RULES["deferring"].decide
    assert decide(Seen(e.EINTR, Reason.MMIO, Union(write=True), deferred=True), POLICIES["P1"]) == SERVE
    assert decide(Seen(e.EINTR, Reason.UNKNOWN, Union(write=True), deferred=True), POLICIES["P1"]) == AGAIN


def test_everything_cites_a_section_that_there_is() -> None:
    numbers = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)", ABI, re.MULTILINE))
    cited = [one.source for one in POLICIES.values()] + [one.source for one in RULES.values()]
    cited += [one.source for one in ARCHITECTURES.values()] + [one.source for one in ENTRIES.values()]
    for source in cited:
        assert source.startswith("ABI.md ")
        for number in re.findall(r"(?:ABI\.md |; )(\d+(?:\.\d+)?)", source):
            assert number in numbers, source


def test_numbers_are_the_kernels() -> None:
    assert all(reason.value == getattr(abi, f"KVM_EXIT_{reason.name}") for reason in Reason)


def test_names_that_are_wrong() -> None:
    assert architecture("mips").name == "ppc"
    with pytest.raises(ValueError, match="no architecture named 'vax'; there are x86, arm64"):
        architecture("vax")
    with pytest.raises(LookupError, match="no name for"):
        classify(Violation(Property.FAULT_LOST, Subject.FAULT, e.EFAULT))
    with pytest.raises(LookupError, match="no name for"):
        classify(Violation(Property.ACCESS_LOST, Subject.EXIT, 0))


def test_a_search_does_not_load_the_replay() -> None:
    code = "import sys, anykvm.cli.explore; sys.exit('anykvm.explorer.replay' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0
