"""Run a command in the oracle's machine: boot, watch, bring back its output and how it ended."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from anykvm.conformance import bound
from anykvm.conformance.oracle import initramfs, kernels, qemu
from anykvm.conformance.oracle.apt import Say, install_qemu
from anykvm.conformance.oracle.errors import OracleError

PASSED_ON: Final = ("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH", "TERM", "USER", "VIRTUAL_ENV")
"""Of the environment; besides, what begins with ``ANYKVM_``. Nothing else of it enters the machine."""
_POLL_SECONDS: Final = 0.05
_CHUNK: Final = 1 << 16
_NO_STATUS: Final = -1


class Settings(NamedTuple):
    """What the machine is."""

    kernel: str = kernels.DEFAULT
    """A version, or the path of an image; see ``kernels.find``."""
    smp: int = 1
    memory: int = 4096
    """MiB."""
    timeout: float | None = None
    """Seconds for all of it, booting included."""
    output: Path | None = None
    """A folder that the command may write to, under the same path; made if missing."""
    console: BinaryIO | None = None
    """A file, open for writing, for all that the machine's console says."""


class _Tail:
    """Passes on what is added to a file that another process writes."""

    def __init__(self, path: Path, sink: BinaryIO) -> None:
        self._path, self._sink, self._at = path, sink, 0

    def pass_on(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                while data := file.read(_CHUNK):
                    self._at += len(data)
                    self._sink.write(data)
        except FileNotFoundError:
            return
        self._sink.flush()


def run(
    command: list[str],
    settings: Settings,
    say: Say,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
    booting: Callable[[float], object] = lambda seconds: None,
) -> int:
    """Run a command in this working directory on a real Linux with a real /dev/kvm; returns its exit code.

    Its output goes to ``stdout`` and ``stderr`` (default: this process's) while it runs. It sees this machine's files;
    what it writes is lost, except below ``settings.output``. It is root there, without a network. While the machine
    boots ``booting`` is told several times a second how long that has taken.
    Raises OracleError if the machine cannot be made or ends by itself, TimeoutError if the time is over.
    """
    cache = kernels.cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if settings.output:
            settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OracleError(f"{error.filename}: {error.strerror}") from None
    if not qemu.usable():
        install_qemu(say)
        if not qemu.usable():
            raise OracleError(f"{qemu.PROGRAM} is still missing or older than {qemu.OLDEST[0]}")
    kernel = kernels.find(settings.kernel, cache, say)
    busybox = kernels.find_busybox(cache, say)
    with tempfile.TemporaryDirectory(prefix="anykvm-oracle-") as name:
        folder = Path(name)
        control = folder / "control"
        control.mkdir()
        (folder / "initrd").write_bytes(initramfs.build(busybox, kernel.modules))
        (control / "command").write_bytes(os.fsencode(script(command, os.environ, os.getcwd())))
        shares = [qemu.Share("control", control, True), qemu.Share("host", Path("/"), False)]
        if settings.output:
            (control / "output").write_bytes(os.fsencode(settings.output.resolve()))
            shares.append(qemu.Share("output", settings.output.resolve(), True))
        line = qemu.command_line(kernel.image, folder / "initrd", shares, settings.smp, settings.memory)
        say(f"booting Linux {kernel.version} ({settings.smp} CPU, {settings.memory} MiB)")
        console = folder / "console"
        tails = [
            _Tail(control / "stdout", stdout or sys.stdout.buffer),
            _Tail(control / "stderr", stderr or sys.stderr.buffer),
        ]
        if settings.console:
            tails.append(_Tail(console, settings.console))
        return _watch(line, control, console, tails, settings.timeout, say, booting)


def script(command: list[str], environment: os._Environ[str] | dict[str, str], folder: str) -> str:
    """Write the shell script that runs a command in a folder, with the parts of the environment that are passed on.

    >>> print(script(["echo", "a b"], {"LANG": "C", "SECRET": "x"}, "/srv"))
    export PYTHONDONTWRITEBYTECODE=1
    export LANG=C
    cd /srv || exit 125
    exec echo 'a b'
    """
    passed = {k: v for k, v in sorted(environment.items()) if k in PASSED_ON or k.startswith("ANYKVM_")}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in passed.items()]
    # Written to memory, compiled Python files would only cost time.
    lines = ["export PYTHONDONTWRITEBYTECODE=1", *exports, f"cd {shlex.quote(folder)} || exit 125"]
    return "\n".join((*lines, f"exec {shlex.join(command)}"))


def _watch(
    line: list[str],
    control: Path,
    console: Path,
    tails: list[_Tail],
    timeout: float | None,
    say: Say,
    booting: Callable[[float], object],
) -> int:
    """Start QEMU and pass on what the command says until the machine is off."""
    began = time.monotonic()
    booted = False
    with console.open("wb") as said, _started(line, said) as process:
        try:
            while (ended := process.poll()) is None:
                taken = time.monotonic() - began
                if not booted and (control / "kernel").exists():
                    booted = True
                    say(f"booted in {taken:.1f} s; running the command")
                elif not booted:
                    booting(taken)
                for tail in tails:
                    tail.pass_on()
                if timeout is not None and taken > timeout:
                    raise TimeoutError(f"the machine ran longer than {timeout:g} s")
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
            for tail in tails:
                tail.pass_on()
    status = _status(control / "status")
    if status == _NO_STATUS:
        why = reason(console.read_bytes()) or f"QEMU ended with code {ended}"
        raise OracleError(f"the machine ended before the command did: {why}")
    say(f"the command ended with code {status} after {time.monotonic() - began:.1f} s")
    return status


def _started(line: list[str], said: BinaryIO) -> subprocess.Popen[bytes]:
    """Start QEMU in a session of its own: Ctrl-C is for us, who then end it. If we are killed, it is too."""
    return subprocess.Popen(
        bound.command(line), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
    )


def _status(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return _NO_STATUS


def reason(said: bytes) -> str:
    """Find in what a console said why the machine ended: what init or a panic said, else the last line.

    >>> reason(b"one\\r\\n[  1.0] Kernel panic - not syncing: no init\\r\\n[  1.1] Kernel Offset: disabled\\r\\n")
    '[ 1.0] Kernel panic - not syncing: no init'
    """
    lines = [line for line in map(_plain, said.decode("utf-8", "replace").splitlines()) if line]
    telling = [line for line in lines if line.startswith("oracle: ") or "Kernel panic" in line]
    return (telling or lines or [""])[-1]


def _plain(line: str) -> str:
    return " ".join("".join(c for c in line if c.isprintable()).split())
