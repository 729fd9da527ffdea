"""Calls that nothing interrupts: no signal handler, no exception thrown at the thread, no finalizer in their middle.

In a kernel no signal handler runs inside a system call. A call that is done ``atomically`` is like one: handlers run
before it or after it. It is done on a thread of ours (``workers.c``) that the program does not know of. The caller's
thread waits in C meanwhile. There are as many such threads as calls at one time; two are kept.

The garbage collector does not start by itself during such a call, for a finalizer of the program could run on the
worker. It is held back by its threshold, in all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

_Ts = TypeVarTuple("_Ts")
_R = TypeVar("_R")

class NoThread(OSError):
    """There is no thread to do a call on (EAGAIN, ENOMEM); nothing was done."""

def atomically(function: Callable[[*_Ts], _R], *arguments: *_Ts) -> _R:
    """Call ``function`` with these positional arguments on a worker. Returns what it returns, raises what it raises.

    On a worker, and when the interpreter is finalizing, it is called right here.
    Raises NoThread when there is no thread for it; then it was not called.
    """

def atomically_or_here(function: Callable[[*_Ts], _R], *arguments: *_Ts) -> _R:
    """As ``atomically``; but when there is no thread for it, it is called right here: what must be done in any case."""

def client_thread() -> int:
    """Identify the thread for which this one works: on a worker its client, elsewhere the thread itself."""

class Finalizer:
    """weakref.finalize without ``atexit``, and of which no step is bytecode on the thread where the object goes.

    So a signal handler that raises there can neither cut it short nor be swallowed by it.
    """

    def __init__(self, owner: object, function: Callable[[*_Ts], object], *arguments: *_Ts) -> None:
        """Call ``function`` atomically when ``owner`` goes."""
    @property
    def alive(self) -> bool:
        """Whether it has yet to be called."""
    def __call__(self) -> None:
        """Call it now, if it was not called yet. Raises what it raises."""

class Dropped:
    """Base of an object that is told when it is dropped, as by ``__del__``, but atomically."""

    def _dropped(self) -> str | None:
        """Do what is to be done then; the text of a ResourceWarning to issue, or None."""
