"""Processes that end with the one that started them, even when that is killed: PR_SET_PDEATHSIG.

The kernel sends the signal when the *thread* that forked ends, so that thread is to wait for the process. As a script
this is the way to a program that knows nothing of it, without running Python between fork() and exec(), which a process
with threads must not do; it needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_FAILED: Final = 127


def bind(parent: int) -> None:
    """Let this process be killed when its parent ends; if it is ``parent`` no more, it has ended, and so does this."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_FAILED)


@contextlib.contextmanager
def held() -> Iterator[set[signal.Signals]]:
    """Hold this thread's signals back while it forks, so that none is lost; gives the mask to restore in a child.

    Python calls functions of other modules before and after fork(): ``logging`` has some. An exception that a signal's
    handler raises in one of them is printed and dropped, so Ctrl-C would do nothing. What comes meanwhile takes effect
    when this is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # It may raise what came just before, with all signals blocked already.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def command(line: list[str]) -> list[str]:
    """Give the command line that runs ``line`` bound to this process; if it cannot be run, its exit code is 127."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *line]


def main() -> None:
    """Become the program on the command line, behind the parent's process id."""
    bind(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(f"{sys.argv[2]}: {error.strerror}", file=sys.stderr)
        sys.exit(_FAILED)


if __name__ == "__main__":
    main()
