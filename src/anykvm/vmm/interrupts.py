"""Signals and a running guest: Ctrl-C and time limits that cannot be lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Final

from anykvm.api import Vcpu

_WATCHED: Final = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGALRM))


class TimeLimit(Exception):
    """The time given to the guest is over."""


class Terminated(Exception):
    """SIGTERM came while the guest ran."""


@contextlib.contextmanager
def watched(vcpu: Vcpu, timeout: float | None = None) -> Iterator[None]:
    """Hold signals back outside of ``vcpu.run()``, so that none is lost between a look at them and KVM_RUN.

    SIGINT, SIGTERM and SIGALRM are blocked in this thread and, by KVM_SET_SIGNAL_MASK, not in KVM_RUN: it then ends
    with ``Intr``, or does not start, and ``raise_pending`` tells what came. After ``timeout`` seconds that is
    ``TimeLimit``. Only the main thread gets this; in another one nothing is done, and a timeout raises ValueError.
    On leaving, everything is as before; a signal that came meanwhile takes effect then.
    """
    if threading.current_thread() is not threading.main_thread():
        if timeout is not None:
            raise ValueError("a time limit needs the main thread")
        yield
        return
    with contextlib.ExitStack() as stack:
        # If a backend lets a signal's handler run, then SIGALRM's own, which ends the process, must not.
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, lambda number, frame: None))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        try:
            vcpu.set_signal_mask(before - _WATCHED)
            stack.callback(_restore_mask, vcpu)
            if timeout is not None:
                signal.setitimer(signal.ITIMER_REAL, max(timeout, 1e-6))
                stack.callback(_disarm)
            yield
        except BaseException:
            # One error is enough: what came meanwhile must not end the process on top of it.
            _take_pending()
            raise


def raise_pending() -> None:
    """After ``Intr``: raise KeyboardInterrupt, Terminated or TimeLimit if that is what came; else do nothing."""
    number = _take_pending()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number == signal.SIGTERM:
        raise Terminated
    if number == signal.SIGALRM:
        raise TimeLimit


def _take_pending() -> int | None:
    pending = signal.sigpending() & _WATCHED
    if not pending:
        return None
    # SIGALRM last: who presses Ctrl-C wants to hear of that.
    return signal.sigwait({min(pending, key=lambda number: (number == signal.SIGALRM, number))})


def _disarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    if signal.SIGALRM in signal.sigpending():
        signal.sigwait({signal.SIGALRM})


def _restore_mask(vcpu: Vcpu) -> None:
    with contextlib.suppress(OSError):
        vcpu.set_signal_mask(None)
