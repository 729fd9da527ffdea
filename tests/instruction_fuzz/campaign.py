"""Children that work through cases. One that dies, hangs or reports damage has a finding; another takes its place."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from instruction_fuzz.bed import EVERY, Bed, Broken
from instruction_fuzz.forms import case

STUCK_CPU, STUCK = 10.0, 60.0
"""Seconds of the processor's, or of the clock's, after which a case counts as one that does not end."""
_STATE = struct.Struct("<qqq")  # the next case, the last one that was checked, whether it is done


@dataclass
class Finding:
    """A case and what it did; of damage seen late, the cases since it was looked for."""

    first: int
    last: int
    what: str

    def __str__(self) -> str:
        """One line."""
        numbers = f"case {self.last}" if self.first >= self.last else f"one of the cases {self.first} to {self.last}"
        return f"{numbers}: {self.what}"


@dataclass
class Report:
    """What a campaign has done and found."""

    cases: int = 0
    findings: list[Finding] = field(default_factory=list)


def _work(shared: mmap.mmap, errors: int, start: int, count: int, seed: int, until: float) -> None:
    """In the child."""
    os.dup2(errors, 2)
    bed = Bed(errors, seed)
    for number in range(start, start + count):
        if (number - start) % EVERY == 0:
            bed.check()
            _STATE.pack_into(shared, 0, number, number, 0)
            if time.monotonic() > until:
                break
        _STATE.pack_into(shared, 0, number, _STATE.unpack_from(shared)[1], 0)
        bed.execute(case(number, seed))
    else:
        number = start + count
        bed.check()
    _STATE.pack_into(shared, 0, number, number, 1)


def _child(shared: mmap.mmap, errors: int, start: int, count: int, seed: int, until: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _work(shared, errors, start, count, seed, until)
        status = 0
    except Broken as broken:
        os.write(errors, f"{broken}\n".encode())
    except BaseException:
        os.write(errors, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _cpu(pid: int) -> float:
    """Seconds of the processor's that a process has had."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait(pid: int, shared: mmap.mmap) -> int | None:
    """The child's status; None: it was stuck, and is no more."""
    seen, cpu, since = -1, 0.0, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        number = _STATE.unpack_from(shared)[0]
        if number != seen:
            seen, cpu, since = number, _cpu(pid), time.monotonic()
        elif _cpu(pid) - cpu > STUCK_CPU or time.monotonic() - since > STUCK:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.02)


def _what(status: int | None, text: str) -> str:
    if status is None:
        return "did not end"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return text or f"the process ended with {os.WEXITSTATUS(status)}"


def campaign(
    count: int, seed: int = 0, start: int = 0, seconds: float = 1e9, tell: Callable[[str], None] = lambda line: None
) -> Report:
    """Execute `count` cases from `start` on, or as many as the seconds allow."""
    report, number, until = Report(), start, time.monotonic() + seconds
    with mmap.mmap(-1, 4096) as shared:
        while number < start + count and time.monotonic() < until:
            with tempfile.TemporaryFile() as errors:
                _STATE.pack_into(shared, 0, number, number, 0)
                pid = _child(shared, errors.fileno(), number, start + count - number, seed, until)
                status = _wait(pid, shared)
                reached, checked, done = _STATE.unpack_from(shared)
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip()
            report.cases += reached - number
            if done and status == 0:
                break
            finding = Finding(reached if status is None else checked, reached, _what(status, text))
            report.findings.append(finding)
            tell(str(finding))
            number = reached + 1
    return report
