"""Trying a KVM in a child process: a kernel that kills or hangs its caller must not take this process with it.

Some nested hosts do that. ``try_device`` starts a child that runs the self-test on /dev/kvm and tells each step before
it does it; what is left when it dies or stays silent is where the kernel failed.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Final

import anykvm
from anykvm.abi.names import ioctl_name
from anykvm.backends.base import Backend

SECONDS: Final = 10.0
"""How long the child may take. A working KVM needs a few milliseconds, the child's start up to a second."""
_KILLED_SECONDS: Final = 1.0  # a child that sleeps in the kernel may not even end then
_PASSED: Final = "passed"
_FAILED: Final = "failed: "
_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); from anykvm.backends.child import main; main(sys.argv[2])"
)


def try_device(path: str, seconds: float = SECONDS) -> str | None:
    """Run the self-test on the KVM device at ``path``, in a child; None if it passed, else why not, in one line.

    Never raises OSError. Leaves no process behind, unless the kernel does not let go of it even after SIGKILL.
    """
    python = sys.executable
    if not python:
        return "not tried: sys.executable does not say which Python could do it in a process of its own"
    package = os.path.dirname(os.path.dirname(os.path.abspath(anykvm.__file__)))
    try:
        child = subprocess.Popen(
            [python, "-I", "-S", "-c", _PROGRAM, package, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is this process's
        )
    except OSError as error:
        return f"not tried: no process for it: {error.strerror}"
    try:
        lines, timely = _listen(child, time.monotonic() + seconds)
        if timely:
            child.wait()
    finally:
        ended = _end(child)
    return _judge(lines, timely, ended, child.returncode, seconds)


def _listen(child: subprocess.Popen[bytes], deadline: float) -> tuple[list[str], bool]:
    """Read what the child says until it ends; whether it ended in time."""
    assert child.stdout is not None
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(child.stdout.fileno(), 4096)
            said += piece
            if not piece:
                return said.decode("utf-8", "replace").splitlines(), True
    return said.decode("utf-8", "replace").splitlines(), False


def _end(child: subprocess.Popen[bytes]) -> bool:
    """Kill it if it still runs; whether it is gone."""
    assert child.stdout is not None
    child.stdout.close()
    if child.poll() is None:
        child.kill()
        try:
            child.wait(_KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            return False
    return True


def _judge(lines: list[str], timely: bool, ended: bool, code: int | None, seconds: float) -> str | None:
    last = lines[-1] if lines else ""
    where = f" in {last}" if last and not last.startswith((_PASSED, _FAILED)) else ""
    if not timely:
        still = "" if ended else "; the child cannot even be killed"
        return f"no answer within {seconds:g} s{where}{still}"
    if last == _PASSED:
        return None
    if last.startswith(_FAILED):
        return last.removeprefix(_FAILED)
    if code is not None and code < 0:
        return f"killed by {_signal_name(-code)}{where}"
    return f"the child that tried it ended{where} with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Telling:
    """Forwards to a backend, and says on stdout what it is about to do."""

    def __init__(self, inner: Backend) -> None:
        """Wrap ``inner``."""
        self.inner = inner
        self.name = inner.name
        self.profile = inner.profile

    def open(self) -> int:
        """Say ``open``."""
        _say("open()")
        return self.inner.open()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Say the ioctl's name."""
        _say(ioctl_name(request))
        return self.inner.ioctl(fd, request, arg)

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Say ``mmap``."""
        _say("mmap()")
        return self.inner.mmap(fd, length, offset)

    def munmap(self, address: int, length: int) -> None:
        """Say ``munmap``."""
        _say("munmap()")
        self.inner.munmap(address, length)

    def close(self, fd: int) -> None:
        """Say ``close``."""
        _say("close()")
        self.inner.close(fd)


def _say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def main(path: str) -> None:
    """What the child does: the self-test on the device at ``path``; the last line is the verdict."""
    from anykvm.backends.device import DeviceBackend
    from anykvm.backends.selftest import self_test

    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)
    failure = self_test(Telling(DeviceBackend(path)))
    _say(_PASSED if failure is None else f"{_FAILED}{failure}")
