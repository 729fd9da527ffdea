"""Replay: the moves of a trace on a real guest, and after each what the model says beside what happened."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from anykvm import abi
from anykvm.explorer import words
from anykvm.explorer.moves import Kind, Step
from anykvm.explorer.policy import Annotates
from anykvm.explorer.replay.guest import DEVICE, EACH, GPA, KICK, Guest, page_at
from anykvm.explorer.replay.possible import why_not
from anykvm.explorer.rules import Act, Seen
from anykvm.explorer.search import Walk
from anykvm.explorer.state import PAGE_OF, Call, Completion, Insn, Kernel, Origin, Page, Reason, Return, Union, World
from anykvm.host.ranges import PAGE_SIZE

ANSWER: Final = 0x5AFE5AFE
"""What the VMM answers to device reads."""
_PRE_FAULT: Final = GPA[Page.N] + (EACH - 1) * PAGE_SIZE
"""No guest gets that far."""
_BAD_SYNC: Final = 1 << 20
_REASONS: Final = frozenset(reason.value for reason in Reason)


class Compared(NamedTuple):
    """One move: who does what, and the outcome in the model and on the guest."""

    what: str
    model: str
    real: str

    @property
    def agrees(self) -> bool:
        """Whether they are the same."""
        return self.model == self.real


class Replay(NamedTuple):
    """A walk on a guest of the profile."""

    walk: Walk
    profile: str
    steps: tuple[Compared, ...]

    @property
    def agrees(self) -> bool:
        """Whether every move had the outcome of the model."""
        return all(step.agrees for step in self.steps)


def replay(walk: Walk) -> Replay:
    """Run a walk on a guest of the policy's profile. Ends at the first move that has another outcome.

    Raises ValueError for a walk that ``why_not`` refuses; ImportError and OSError when soft does not work here.
    """
    if (why := why_not(walk)) is not None:
        raise ValueError(f"this walk cannot be replayed: {why}")
    profile = walk.game.policy.profile
    assert profile is not None
    private = walk.game.policy.annotates is not Annotates.NOTHING
    with Guest(profile, _program(walk), private=private) as guest:
        compared: list[Compared] = []
        player, before = _Player(guest, walk), World()
        for step in walk.steps:
            compared.append(player.play(step, before))
            if not compared[-1].agrees:
                break
            before = step.world
    return Replay(walk, profile, tuple(compared))


def _program(walk: Walk) -> list[Insn]:
    """Everything the guest does, each instruction once however often it is tried."""
    return [insn for step in walk.steps if step.move.ended for insn in _begun(step.move.ended)]


def _begun(ended: Return) -> tuple[Insn, ...]:
    return ended.did[1:] if ended.again else ended.did


class _Player:
    """Plays the moves; knows where the model has the guest."""

    def __init__(self, guest: Guest, walk: Walk) -> None:
        self.guest = guest
        self.rule, self.policy = walk.game.rule, walk.game.policy
        self.errno = 0
        self.touched: Counter[Page] = Counter()
        self.begun = 0  # instructions the guest has begun, in the model
        self.position = 0  # the one it stands at

    def play(self, step: Step, before: World) -> Compared:
        """Do one move."""
        kind = step.move.kind
        if kind is Kind.RUN:
            return self._run(step, before.kernel)
        if kind is Kind.REACT:
            return self._react(step, before)
        model = f"exit_reason {words.page_of(step.world.kernel)}"
        if kind is Kind.PRE_FAULT:
            with contextlib.suppress(OSError):  # its own result is not the question
                self.guest.vcpu.pre_fault_memory(_PRE_FAULT, PAGE_SIZE)
        elif kind is Kind.OTHER_RUN:
            thread = threading.Thread(target=self._ioctl, args=(1,))
            thread.start()
            thread.join()
        elif kind is Kind.DIE:
            self.guest.kill()
        else:
            raise AssertionError(kind)
        return Compared(kind.value, model, self._real_page())

    def _run(self, step: Step, before: Kernel) -> Compared:
        call, ended = step.move.call, step.move.ended
        assert call is not None and ended is not None
        self._moved(before, ended)
        with _called(self.guest, call):
            self.errno = self._ioctl(0)
        model = f"{words.result(ended.errno)}, exit_reason {words.page_of(ended.kernel)}"
        real = f"{words.result(self.errno)}, {self._real_page()}"
        if ended.kernel.union.origin is Origin.RUN and ended.cause is ended.kernel.union.page and ended.cause:
            model += f" at {GPA[ended.cause] + (self.touched[ended.cause] - 1) * PAGE_SIZE:#x}"
            real += f" at {self.guest.vcpu.kvm_run.memory_fault.gpa:#x}"
        if not ended.kernel.dead:
            model += f", guest at instruction {self.position}"
            real += f", guest at instruction {self.guest.position()}"
        if before.completion is Completion.READ and "S4: the device read is completed" in ended.steps:
            model += ", " + ("another value" if ended.answer_lost else "the VMM's value") + " read"
            value = self.guest.vcpu.get_regs().rbx
            real += ", " + ("the VMM's value" if value == ANSWER else "another value") + " read"
        return Compared(words.call(call), model, real)

    def _moved(self, before: Kernel, ended: Return) -> None:
        after = ended.kernel
        self.begun += len(_begun(ended))
        self.touched.update(PAGE_OF[insn] for insn in _begun(ended) if insn in PAGE_OF)
        if ended.did:
            self.position = self.begun - (after.insn is not None)
        elif before.completion is Completion.READ and after.completion is Completion.NONE:
            self.position += 1

    def _react(self, step: Step, before: World) -> Compared:
        decision = step.move.decision
        assert decision is not None
        reason, union = self._seen()
        did = self.rule.decide(Seen(self.errno, reason, union, before.vmm.deferred), self.policy)
        run = self.guest.vcpu.kvm_run
        if did.act is Act.RESOLVE and did.page is not None:
            resolve = self.guest.resolve if did.page in self.rule.resolves else self.guest.convert
            # A dead VM refuses its ioctls with EIO, to a VMM that does not know it is dead.
            with contextlib.suppress(OSError) if before.kernel.dead else contextlib.nullcontext():
                resolve(run.memory_fault.gpa)
        elif did.act is Act.SERVE and not run.mmio.is_write:
            run.mmio.data[:4] = list(ANSWER.to_bytes(4, "little"))
        return Compared(Kind.REACT.value, words.decided(decision), words.decided(did))

    def _ioctl(self, arg: int) -> int:
        try:
            self.guest.backend.ioctl(self.guest.vcpu.fileno(), abi.KVM_RUN, arg)
        except OSError as error:
            assert error.errno is not None
            return error.errno
        return 0

    def _seen(self) -> tuple[Reason, Union]:
        run = self.guest.vcpu.kvm_run
        if run.exit_reason not in _REASONS:
            raise AssertionError(f"exit_reason {run.exit_reason} is not one of the model's")
        reason = Reason(run.exit_reason)
        if reason is Reason.MEMORY_FAULT:
            return reason, Union(page_at(run.memory_fault.gpa))
        if reason is Reason.MMIO:
            return reason, Union(read=not run.mmio.is_write, write=bool(run.mmio.is_write))
        return reason, Union()

    def _real_page(self) -> str:
        reason, union = self._seen()
        run = self.guest.vcpu.kvm_run
        if reason is Reason.MMIO and not DEVICE <= run.mmio.phys_addr <= DEVICE + PAGE_SIZE:
            return f"exit_reason MMIO for {run.mmio.phys_addr:#x}"
        if reason is Reason.MEMORY_FAULT and (run.memory_fault.size != PAGE_SIZE or union.page is None):
            return f"exit_reason MEMORY_FAULT for {run.memory_fault.size:#x} bytes at {run.memory_fault.gpa:#x}"
        return f"exit_reason {words.page(reason, union)}"


@contextlib.contextmanager
def _called(guest: Guest, call: Call) -> Iterator[None]:
    """Prepare a KVM_RUN, and take that back."""
    vcpu = guest.vcpu
    vcpu.immediate_exit = call.immediate_exit
    vcpu.kvm_run.kvm_dirty_regs = _BAD_SYNC if call.bad_sync else 0
    if not call.signal:
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})
    try:
        signal.pthread_kill(threading.get_ident(), KICK)
        yield
    finally:
        signal.sigwait({KICK})
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
