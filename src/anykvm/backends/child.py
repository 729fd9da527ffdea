"""Trying a KVM in a child process: a kernel that kills or hangs its caller must not take this process with it.

Some nested hosts do that. ``try_device`` starts a child, a Python of its own; that one forks a second, which runs the
self-test on the device and tells each step before it does it. What it told last is where the kernel failed. The first
child waits for it with a time limit and says how it ended. So the answer does not depend on what this program does with
SIGCHLD, and a process that the kernel never lets go of is not this program's to wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from typing import Final, NoReturn

import anykvm
from anykvm.abi.names import ioctl_name
from anykvm.backends.base import Backend

SECONDS: Final = 10.0
"""How long the self-test may take. A working KVM needs a few milliseconds."""
START_SECONDS: Final = 30.0
"""How long the child may need besides, to start and to end."""
_KILLED_SECONDS: Final = 1.0  # a process that sleeps in the kernel may not even end then
_POLL_SECONDS: Final = 0.005
_PASSED: Final = "passed"
_FAILED: Final = "failed: "
_NOT_TRIED: Final = "not tried: "
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_INTERPRETER: Final = re.compile(r"(python|pypy)\d*(\.\d+)*[a-z]?(-dbg)?")
_PROGRAM: Final = """
import sys
sys.path.append(sys.argv[1])
from anykvm.backends.child import main
main(sys.argv[2], float(sys.argv[3]))
"""


class NotTried(Exception):
    """There was no way to try the device in a process of its own. The text says why, in one line."""


def try_device(path: str, seconds: float = SECONDS) -> str | None:
    """Run the self-test on the KVM device at ``path``, in a child; None if it passed, else why not, in one line.

    Raises NotTried if that cannot be done here; never OSError. Leaves no process behind, unless the kernel does not let
    go of it even after SIGKILL.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(anykvm.__file__)))
    command = [interpreter(), "-I", "-S", "-c", _PROGRAM, package, path, str(seconds)]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is this process's
        )
    except (OSError, MemoryError) as error:
        raise NotTried(f"no process for it: {getattr(error, 'strerror', None) or 'out of memory'}") from None
    assert child.stdout is not None
    limit = seconds + START_SECONDS
    try:
        lines, timely = _listen(child.stdout.fileno(), time.monotonic() + limit)
        if timely:
            child.wait()
    finally:
        child.stdout.close()
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    verdict = lines[-1] if lines else ""
    if verdict == _PASSED:
        return None
    if verdict.startswith(_FAILED):
        return verdict.removeprefix(_FAILED)
    if verdict.startswith(_NOT_TRIED):
        raise NotTried(verdict.removeprefix(_NOT_TRIED))
    if not timely:
        raise NotTried(f"the child that was to try it did not end within {limit:g} s")
    code = child.returncode
    raise NotTried(f"the child that was to try it {_ending(code) if code < 0 else f'ended with exit code {code}'}")


def interpreter() -> str:
    """Find a Python to start. Raises NotTried if there is none.

    A program with Python inside may have its own name in ``sys.executable``: it must not be started in Python's place.
    """
    folders = dict.fromkeys((sys.exec_prefix, sys.base_exec_prefix))
    names = (f"python{sys.version_info[0]}.{sys.version_info[1]}", f"python{sys.version_info[0]}")
    paths = [sys.executable, getattr(sys, "_base_executable", None)]
    paths += [os.path.join(folder, "bin", name) for folder in folders for name in names]
    for path in paths:
        if path and _INTERPRETER.fullmatch(os.path.basename(path)) and os.access(path, os.X_OK):
            return path
    raise NotTried(f"no Python to do it in a process of its own (sys.executable is {sys.executable!r})")


def _listen(fd: int, deadline: float) -> tuple[list[str], bool]:
    """Read lines until the writers are gone; whether that was in time."""
    said = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    timely = False
    while not timely and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        piece = os.read(fd, 4096)
        said += piece
        timely = not piece
    return said.decode("utf-8", "replace").splitlines(), timely


def _ending(code: int) -> str:
    """Say how a process ended by a signal, from its negative number."""
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


# What follows runs in the first child.


def main(path: str, seconds: float) -> None:
    """Try the device at ``path`` in a process forked for it, and print the verdict: one line."""
    _clean_slate()
    # Before the fork, so that the time limit is the kernel's alone.
    from anykvm.backends import selftest as _selftest  # noqa: F401

    reader, writer = os.pipe()
    try:
        process = os.fork()
    except OSError as error:
        _tell(1, f"{_NOT_TRIED}no process for it: {error.strerror}")
        return
    if not process:
        os.close(reader)
        _test(path, writer)
    os.close(writer)
    deadline = time.monotonic() + seconds
    lines, timely = _listen(reader, deadline)
    code = reap(process, deadline) if timely else None
    gone = True
    if code is None:
        os.kill(process, signal.SIGKILL)
        gone = reap(process, time.monotonic() + _KILLED_SECONDS) is not None
    _tell(1, _judge(lines, code, gone, seconds))


def _clean_slate() -> None:
    """Undo what was inherited: signals that are blocked or ignored would hide how the test ends."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not None:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def reap(process: int, deadline: float) -> int | None:
    """Wait for a child of this process; its exit code or negative signal, None if it does not end in time."""
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)


def _judge(lines: list[str], code: int | None, gone: bool, seconds: float) -> str:
    last = lines[-1] if lines else ""
    told = last == _PASSED or last.startswith(_FAILED)
    where = f" in {'ending' if told else last}" if last else ""
    if code is None:
        still = "" if gone else "; it cannot even be killed"
        return f"{_FAILED}did not answer within {seconds:g} s{where}{still}"
    if code < 0:
        return f"{_FAILED}{_ending(code).removeprefix('was ')}{where}"
    return last if told else f"{_FAILED}the process that tried it ended{where} with exit code {code}"


# What follows runs in the second.


def _test(path: str, writer: int) -> NoReturn:
    """Do the self-test and tell the verdict."""
    from anykvm.backends.device import DeviceBackend
    from anykvm.backends.selftest import self_test

    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no core file, and no crash reporter
        os.dup2(2, 1)  # so that who waits for the first child's verdict does not wait for this process
        try:
            failure = self_test(Telling(DeviceBackend(path), writer))
        except Exception as error:  # of what the kernel answered
            failure = f"{type(error).__name__}: {error}"
        _tell(writer, _PASSED if failure is None else f"{_FAILED}{failure}")
        code = 0
    finally:
        os._exit(code)


class Telling:
    """Forwards to a backend, and says what it is about to do."""

    def __init__(self, inner: Backend, writer: int) -> None:
        """Wrap ``inner``; lines go to the descriptor ``writer``."""
        self.inner = inner
        self.writer = writer
        self.name = inner.name
        self.profile = inner.profile

    def open(self) -> int:
        """Say ``open``."""
        _tell(self.writer, "open()")
        return self.inner.open()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Say the ioctl's name."""
        _tell(self.writer, ioctl_name(request))
        return self.inner.ioctl(fd, request, arg)

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Say ``mmap``."""
        _tell(self.writer, "mmap()")
        return self.inner.mmap(fd, length, offset)

    def munmap(self, address: int, length: int) -> None:
        """Say ``munmap``."""
        _tell(self.writer, "munmap()")
        self.inner.munmap(address, length)

    def close(self, fd: int) -> None:
        """Say ``close``."""
        _tell(self.writer, "close()")
        self.inner.close(fd)


def _tell(writer: int, line: str) -> None:
    os.write(writer, " ".join(line.split()).encode("utf-8", "replace") + b"\n")
