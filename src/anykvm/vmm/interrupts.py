"""Signals and a running guest: Ctrl-C and time limits that cannot be lost, and an orderly end of everything else."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn, TypeAlias

from anykvm.api import Vcpu

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_STOP: Final = frozenset((signal.SIGINT, *_ENDING))
_WATCHED: Final = _STOP | {signal.SIGALRM}
_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class TimeLimit(Exception):
    """The time given to the guest is over."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. Like KeyboardInterrupt not an Exception: it can come anywhere, and is for who ends."""

    def __init__(self, number: int) -> None:
        """Take the signal's number."""
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Raise ``Terminated`` in the main thread on SIGTERM and SIGHUP, so that what is cleaned up on errors is then too.

    The first one counts: what comes while it is cleaned up is ignored. A signal that is ignored (``nohup``) stays so.
    Processes that are forked meanwhile have their signals as they were. In another than the main thread nothing is
    done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in _ENDING if not _ignored(number)}
    _FORKED.append(before)
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        with contextlib.suppress(ValueError):  # a forked child has forgotten it
            _FORKED.remove(before)
        for number, handler in before.items():
            signal.signal(number, handler)


_FORKED: Final[list[dict[signal.Signals, _Handler]]] = []
"""What each ``orderly`` that is entered found, the outermost first."""


def _as_before() -> None:
    for before in reversed(_FORKED):
        for number, handler in before.items():
            signal.signal(number, handler)
    _FORKED.clear()


os.register_at_fork(after_in_child=_as_before)


def _ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def watched(vcpu: Vcpu, timeout: float | None = None) -> Iterator[None]:
    """Hold signals back outside of ``vcpu.run()``, so that none is lost between a look at them and KVM_RUN.

    SIGINT, SIGTERM and SIGHUP are blocked in this thread and, by KVM_SET_SIGNAL_MASK, not in KVM_RUN: it then ends with
    ``Intr``, or does not start, and ``raise_pending`` tells what came. One that is ignored (``nohup``) stays ignored.
    With a ``timeout`` (seconds) SIGALRM is too, and ``TimeLimit`` is what it tells then. Only the main thread gets
    this; in another one nothing is done, and a timeout raises ValueError. On leaving, everything is as before, an alarm
    timer that was running included; a signal that came meanwhile takes effect then.
    """
    if threading.current_thread() is not threading.main_thread():
        if timeout is not None:
            raise ValueError("a time limit needs the main thread")
        yield
        return
    # Blocked, an ignored signal would be kept, and end the guest.
    held = frozenset(number for number in _STOP if not _ignored(number))
    if timeout is not None:
        held |= {signal.SIGALRM}
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
    if number in _ENDING:
        raise Terminated(number)
    if number == signal.SIGALRM:
        raise TimeLimit


def _take_pending(which: frozenset[signal.Signals]) -> signal.Signals | None:
    pending = signal.sigpending() & which
    if not pending:
        return None
    # SIGALRM last: who presses Ctrl-C wants to hear of that.
    return signal.Signals(signal.sigwait({min(pending, key=lambda number: (number == signal.SIGALRM, number))}))


def _restore_mask(vcpu: Vcpu) -> None:
    with contextlib.suppress(OSError):
        vcpu.set_signal_mask(None)
