"""Signals and a running guest: Ctrl-C and time limits that cannot be lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

from anykvm.api import Vcpu

_STOP: Final = frozenset((signal.SIGINT, signal.SIGTERM))
_WATCHED: Final = _STOP | {signal.SIGALRM}


class TimeLimit(Exception):
    """The time given to the guest is over."""


class Terminated(Exception):
    """SIGTERM came while the guest ran."""


@contextlib.contextmanager
def watched(vcpu: Vcpu, timeout: float | None = None) -> Iterator[None]:
    """Hold signals back outside of ``vcpu.run()``, so that none is lost between a look at them and KVM_RUN.

    SIGINT and SIGTERM are blocked in this thread and, by KVM_SET_SIGNAL_MASK, not in KVM_RUN: it then ends with
    ``Intr``, or does not start, and ``raise_pending`` tells what came. With a ``timeout`` (seconds) so is SIGALRM, and
    ``TimeLimit`` is what it tells then. Only the main thread gets this; in another one nothing is done, and a timeout
    raises ValueError. On leaving, everything is as before, an alarm timer that was running included; a signal that came
    meanwhile takes effect then.
    """
    if threading.current_thread() is not threading.main_thread():
        if timeout is not None:
            raise ValueError("a time limit needs the main thread")
        yield
        return
    held = _STOP if timeout is None else _WATCHED
    with contextlib.ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        if timeout is not None:
            stack.enter_context(_alarm(timeout))
        try:
            vcpu.set_signal_mask(before - held)
            stack.callback(_restore_mask, vcpu)
            yield
        except BaseException:
            # One error is enough: what came meanwhile must not end the process on top of it.
            while _take_pending(held):
                pass
            raise


@contextlib.contextmanager
def _alarm(timeout: float) -> Iterator[None]:
    """Have SIGALRM, blocked, come after ``timeout`` seconds; afterwards give the timer back to who had it."""
    # If a backend lets a signal's handler run, then SIGALRM's own, which ends the process, must not.
    handler = signal.signal(signal.SIGALRM, lambda number, frame: None)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, max(timeout, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _take_pending(frozenset((signal.SIGALRM,)))
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-6), interval)


def raise_pending() -> None:
    """After ``Intr``: raise KeyboardInterrupt, Terminated or TimeLimit if that is what came; else do nothing."""
    number = _take_pending(_WATCHED)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number == signal.SIGTERM:
        raise Terminated
    if number == signal.SIGALRM:
        raise TimeLimit


def _take_pending(which: frozenset[signal.Signals]) -> int | None:
    pending = signal.sigpending() & which
    if not pending:
        return None
    # SIGALRM last: who presses Ctrl-C wants to hear of that.
    return signal.sigwait({min(pending, key=lambda number: (number == signal.SIGALRM, number))})


def _restore_mask(vcpu: Vcpu) -> None:
    with contextlib.suppress(OSError):
        vcpu.set_signal_mask(None)
