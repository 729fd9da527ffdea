"""Signals around KVM_RUN: none is lost, and all is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

import anykvm
from anykvm.api import GuestMemory, Hlt, InternalError, Intr, MemoryFault, Unknown, Vcpu
from anykvm.backends import Backend
from anykvm.vmm.interrupts import Terminated, TimeLimit, orderly, raise_pending, watched
from anykvm.vmm.loop import describe, drive
from anykvm.vmm.modes import real_mode
from anykvm.vmm.serial import Console
from vmm_helpers import FOREVER


@pytest.fixture
def vcpu(backend: Backend) -> Iterator[Vcpu]:
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm, GuestMemory(0x10000) as memory:
        memory[0x1000:0x1002] = FOREVER
        memory[0x2000] = 0xF4
        vm.map(memory, 0)
        vcpu = vm.create_vcpu()
        real_mode(vcpu, 0x1000)
        yield vcpu


def run_forever(vcpu: Vcpu) -> None:
    drive(vcpu, Console(lambda data: None))


def state() -> tuple[object, object, object]:
    return (
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL)[0] > 0,
    )


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, Terminated),
        (signal.SIGHUP, Terminated),
        (signal.SIGALRM, TimeLimit),
    ],
)
def test_a_signal_that_comes_before_kvm_run_is_not_lost(
    vcpu: Vcpu, number: signal.Signals, error: type[BaseException]
) -> None:
    before = state()
    with pytest.raises(error), watched(vcpu, 60):
        os.kill(os.getpid(), number)  # blocked here: pending when KVM_RUN begins
        run_forever(vcpu)
    assert state() == before
    assert not signal.sigpending()


def test_a_time_limit_ends_a_guest_and_is_gone_afterwards(vcpu: Vcpu) -> None:
    before = state()
    start = time.monotonic()
    with pytest.raises(TimeLimit), watched(vcpu, 0.1):
        run_forever(vcpu)
    assert 0.09 < time.monotonic() - start < 5
    assert state() == before


def test_a_limit_that_is_not_reached_leaves_nothing(vcpu: Vcpu) -> None:
    before = state()
    real_mode(vcpu, 0x2000)
    with watched(vcpu, 60):
        assert drive(vcpu, Console(lambda data: None)) == Hlt()
        raise_pending()  # nothing came
    assert state() == before


def test_an_alarm_of_someone_else_is_left_alone(vcpu: Vcpu) -> None:
    real_mode(vcpu, 0x2000)
    old = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with watched(vcpu):
            assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
            drive(vcpu, Console(lambda data: None))
        with watched(vcpu, 5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_an_error_wins_over_a_signal(vcpu: Vcpu) -> None:
    with pytest.raises(ZeroDivisionError), watched(vcpu):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    assert not signal.sigpending()


def test_an_ignored_signal_is_not_held(vcpu: Vcpu) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    real_mode(vcpu, 0x2000)
    try:
        with watched(vcpu):
            os.kill(os.getpid(), signal.SIGHUP)
            assert drive(vcpu, Console(lambda data: None)) == Hlt()
            raise_pending()
    finally:
        signal.signal(signal.SIGHUP, old)


ENDING = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])


@ENDING
def test_a_signal_that_ends_is_an_exception_once(number: signal.Signals) -> None:
    before = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)]
    cleaned_up = False
    with pytest.raises(Terminated) as info, orderly():
        try:
            os.kill(os.getpid(), number)
        finally:
            for which in (signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), which)  # while it is cleaned up: ignored
            cleaned_up = True
    assert cleaned_up and info.value.number == number
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)] == before


@ENDING
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    old = signal.signal(number, signal.SIG_IGN)
    try:
        with orderly():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, old)


@ENDING
def test_a_forked_process_ends_as_before(number: signal.Signals) -> None:
    with orderly():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), number)
            finally:
                os._exit(1)  # it was an exception
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number


def test_in_another_thread_signals_are_left_alone() -> None:
    found = []

    def body() -> None:
        with orderly():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_other_threads_are_left_alone(vcpu: Vcpu) -> None:
    found: list[object] = []

    def body() -> None:
        with watched(vcpu):
            found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        try:
            with watched(vcpu, 1):
                found.append("not refused")
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [set(), "a time limit needs the main thread"]


def test_intr_of_immediate_exit_is_not_a_signal(vcpu: Vcpu) -> None:
    vcpu.immediate_exit = True
    with watched(vcpu):
        assert isinstance(vcpu.run(), Intr)
        raise_pending()


def test_every_end_has_a_line_of_its_own() -> None:
    assert describe(MemoryFault(0x1000, 4096, MemoryFault.PRIVATE, 133)).endswith("flags=private errno=EHWPOISON")
    code = int.from_bytes(b"\x02\x0f\x0b".ljust(8, b"\0"), "little")
    assert describe(InternalError(1, (1, code, 0))).endswith("instruction=0f0b")
    assert describe(anykvm.FailEntry(0x80000021, 0)) == "fail entry hardware_entry_failure_reason=0x80000021 cpu=0"
    assert describe(anykvm.SystemEvent(2, ())) == "system event type=2"
    assert describe(Unknown(1000, b"")) == "exit reason 1000"
    assert describe(anykvm.Nmi()) == "Nmi()"
