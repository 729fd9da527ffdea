"""A machine with every kind of memory, its vCPUs, and the threads that change what is under them."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

import anykvm
from anykvm import DirtyRing, Kvm, Vm, abi
from anykvm.backends.soft import SoftBackend
from anykvm.testing.machine import CODE, Machine
from stress import audit
from stress import board as b
from stress.area import Area
from stress.guest import program
from stress.host_areas import Anonymous, Code, File, Userfault
from stress.logged import Logged
from stress.private import GPA_BIT, Private, Shared
from stress.slots import Moving
from stress.updater import PHASE, Choice, Phases, Updater
from stress.vcpus import Runner
from test_smp import second

RING_SIZE: Final = 4096
KICK: Final = signal.SIGUSR1
_SWITCH: Final = 0.0005
_PATIENCE: Final = 30.0
"""Seconds that a vCPU may take to halt; it takes milliseconds."""


class StressMachine(Machine):
    """With dirty rings, or without."""

    def __init__(self, kvm: Kvm, rings: bool) -> None:
        """A VM with private memory."""
        self.with_rings = rings
        super().__init__(kvm, type=abi.KVM_X86_SW_PROTECTED_VM)

    def create_vm(self, kvm: Kvm, type: int) -> Vm:
        """Rings come before the first vCPU."""
        vm = super().create_vm(kvm, type)
        if self.with_rings:
            vm.enable_dirty_ring(RING_SIZE)
        return vm


@dataclass
class Report:
    """What happened."""

    seconds: float
    changes: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    """Values that guests read and judged."""
    written: int = 0
    audited: int = 0
    """Words compared at the end."""
    counted: int = 0
    """Increments that the counters must show at the end."""
    missing: str = ""
    """What this machine cannot do."""

    def add(self, other: Report) -> None:
        """Count another's in."""
        for name in ("seconds", "changes", "exits", "checked", "written", "audited", "counted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.missing = self.missing or other.missing


class World:
    """Either dirty bitmaps, and a guest that chooses what is private by an address bit; or dirty rings, and a guest
    whose accesses follow the attributes."""

    def __init__(self, seed: int, *, rings: bool) -> None:
        """Build it; nothing runs yet, but the userfaultfd's handler."""
        self.seed = seed
        self.guest_chooses = not rings
        self.failed: list[BaseException] = []
        self.end = 0.0
        self.missing = ""
        self._room = threading.Condition()
        self._resets = 0
        self.kvm = anykvm.open(SoftBackend(private_gpa_bit=GPA_BIT if self.guest_chooses else None))
        self.machine = StressMachine(self.kvm, rings)
        self.machine.long_mode("hlt")
        self.board = b.Board(self.machine.memory)
        self.areas: list[Area] = []
        self._fill()
        self._program()
        vcpus = [self.machine.vcpu, *(second(self.machine, CODE) for _ in range(b.VCPUS - 1))]
        self.rings = [DirtyRing(vcpu) for vcpu in vcpus] if rings else []
        self.runners = [Runner(self, vcpu, n + 1, seed * 16 + n) for n, vcpu in enumerate(vcpus)]
        for runner in self.runners:
            self._stand(runner)
        kinds = (Anonymous, Code, File, Userfault)
        choices = [Choice(area, change, often) for area in self.areas for often, change in area.changes()]
        groups = [[choice for choice in choices if isinstance(choice.area, kinds) is mine] for mine in (True, False)]
        self.phases = Phases(self, choices, seed * 16 + 15)
        self.updaters = [Updater(self, group, seed * 16 + 8 + n) for n, group in enumerate(groups)]

    def __enter__(self) -> World:
        """Give the object itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close everything."""
        for area in self.areas:
            area.close()
        for runner in self.runners:
            runner.vcpu.close()
        self.machine.__exit__(None, None, None)
        self.kvm.close()
        for area in self.areas:
            if hasattr(area, "host"):
                area.host.unmap()

    # -- construction --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        for kind in (Anonymous, Code, File, Moving, Logged, Shared):
            self.areas.append(kind(self, len(self.areas)))
        shared = self.areas[-1]
        assert isinstance(shared, Shared)
        self.areas.append(Private(self, len(self.areas), shared))
        try:
            self.areas.append(Userfault(self, len(self.areas)))
        except OSError as error:
            self.missing = str(error)

    def _program(self) -> None:
        image, operations = program()
        self.machine.memory.write(CODE, image)
        for area in self.areas:
            at = b.DESCRIPTORS + area.index * b.DESCRIPTOR_SIZE
            for n, address in enumerate(area.vas):
                self.board.put_quad(at + 8 * n, address)
            self.board.put(at + b.FIRST_PAGE, area.first)
            self.board.put(at + b.FOLLOW, b.U32 if area.follow else 0)
            self.board.put(at + b.TWIN, area.twin)
            self.board.put(at + b.WANTS, b.PRIVATE if isinstance(area, Private) else 0)
            for n, name in enumerate(b.spread(area.operations, 16)):
                self.board.put_quad(at + b.OPERATIONS + 8 * n, operations[name])
        # more pages than the engine compares when it enters the guest (coherence.c), or fewer
        self.board.put(b.CALLED, 0xFFFF if self.seed % 2 else 0x1111)

    def _stand(self, runner: Runner) -> None:
        regs = runner.vcpu.get_regs()
        regs.r13, regs.r14, regs.r15 = runner.writer, runner.random.getrandbits(63), runner.note
        regs.rip, regs.rsp = CODE, runner.note + b.NOTE_STACK
        runner.vcpu.set_regs(regs)

    # -- what the threads share ----------------------------------------------------------------------------------------

    def guarded(self, body: Callable[[], None]) -> None:
        """Run a thread's body; its error ends the world."""
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - raised by run()
            self.failed.append(error)
            self.board.put(b.STOP, 1)

    def over(self) -> bool:
        """Say whether the updaters are to stop."""
        return bool(self.failed) or time.monotonic() >= self.end

    def wait_for_room(self) -> None:
        """A vCPU's dirty ring is full: somebody will reset it."""
        with self._room:
            before = self._resets
            self._room.wait_for(lambda: self._resets != before or self.over())

    def room_in_rings(self) -> None:
        """The rings were reset."""
        with self._room:
            self._resets += 1
            self._room.notify_all()

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, seconds: float, progress: Callable[[Report], None] = lambda report: None) -> Report:
        """Let it happen. Raises the first thread's error: AssertionError for what must not be."""
        started = time.monotonic()
        self.end = started + seconds
        with _switching(), _kicks():
            for area in self.areas:
                area.start()
            for thread in [runner.thread for runner in self.runners] + [updater.thread for updater in self.updaters]:
                thread.start()
            self._watch(progress, started)
            self.phases.next()  # also who sleeps finds that it is over
            for updater in self.updaters:
                updater.thread.join()
            self.board.put(b.STOP, 1)
            self._join()
        if self.failed:
            raise self.failed[0]
        report = self.report(time.monotonic() - started)
        report.audited = audit.check(self.areas)
        report.counted = sum(area.check_counters() for area in self.areas if isinstance(area, Logged))
        return report

    def _watch(self, progress: Callable[[Report], None], started: float) -> None:
        """Kick a vCPU now and then: KVM_RUN ends with EINTR, in the middle of whatever it does."""
        told = phase = started
        while not self.over():
            for runner in self.runners:
                time.sleep(0.001)
                if runner.thread.is_alive() and runner.thread.ident is not None:
                    signal.pthread_kill(runner.thread.ident, KICK)
            if time.monotonic() - phase > PHASE:
                phase = time.monotonic()
                self.phases.next()
            if time.monotonic() - told > 1:
                told = time.monotonic()
                progress(self.report(told - started))

    def _join(self) -> None:
        """Kick them meanwhile: after an error, one may wait for another that has been left."""
        until = time.monotonic() + _PATIENCE
        for runner in self.runners:
            while runner.thread.is_alive() and time.monotonic() < until:
                assert runner.thread.ident is not None
                signal.pthread_kill(runner.thread.ident, KICK)
                runner.thread.join(0.01)
            if runner.thread.is_alive():
                raise AssertionError(f"vCPU {runner.writer} does not stop; errors so far: {self.failed}")

    def report(self, seconds: float) -> Report:
        """What has happened so far."""
        report = Report(seconds, missing=self.missing)
        for area in self.areas:
            report.changes += area.done
        for runner in self.runners:
            report.exits += runner.exits
            report.checked += self.board.quad(runner.note + b.NOTE_CHECKED)
            report.written += self.board.quad(runner.note + b.NOTE_WRITTEN)
        return report


@contextlib.contextmanager
def _switching() -> Iterator[None]:
    """Threads take turns more often than usual: vCPUs wait for the interpreter's lock after each exit."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    yield
    sys.setswitchinterval(before)


@contextlib.contextmanager
def _kicks() -> Iterator[None]:
    before = signal.signal(KICK, lambda number, frame: None)
    yield
    signal.signal(KICK, before)
