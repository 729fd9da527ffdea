"""Run scenarios on a backend and give their records; each in a forked process, under a watchdog.

A scenario unmaps memory under a running guest, sends itself signals and may meet a backend that crashes or hangs: none
of that may reach the process that asked. ``python -m anykvm.conformance.record`` writes a file of records::

    python -m anykvm.conformance.record --backend soft --profile linux-7.3 --output soft.jsonl unmapped_read prot_none
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from anykvm.backends import backend as make_backend
from anykvm.backends import probe_device
from anykvm.backends.base import Backend
from anykvm.conformance.bound import bind, held
from anykvm.conformance.golden_file import ABOUT, END, Record
from anykvm.conformance.scenario import Lab, Scenario, failure, load
from anykvm.host.outfile import OutFile

CHILD: Final = "<child>"
"""The step of a record that says how a scenario's process ended, when it did not end well."""
_CHUNK: Final = 1 << 16


def record(
    names: Iterable[str],
    backend: Callable[[], Backend],
    started: Callable[[str], None] = lambda _: None,
    timeout: float | None = None,
    jobs: int = 1,
) -> Iterator[Record]:
    """Run scenarios by name and give their records, scenario by scenario.

    ``backend`` makes the backend, in each scenario's own process; ``started`` is told each name before it runs;
    ``timeout`` is the most a scenario may take, if less than its own; ``jobs`` run at a time.
    Raises KeyError for a name that no scenario has.
    """
    scenarios = load()
    running: deque[_Child] = deque()
    for chosen in [scenarios[name] for name in names]:
        started(chosen.name)
        limit = chosen.timeout if timeout is None else min(timeout, chosen.timeout)
        running.append(_start(chosen._replace(timeout=limit), backend))
        if len(running) >= jobs:
            yield from _finish(running.popleft())
    while running:
        yield from _finish(running.popleft())


def record_scenario(scenario: Scenario, backend: Callable[[], Backend]) -> list[Record]:
    """Run one scenario in a forked process and give its records.

    A crash, a hang longer than ``scenario.timeout`` and a nonzero exit are the last record's ``<child>`` step.
    """
    return _finish(_start(scenario, backend))


class _Child(NamedTuple):
    """A scenario's process, and where its records come from."""

    scenario: Scenario
    pid: int
    reader: int
    deadline: float


def _start(scenario: Scenario, backend: Callable[[], Backend]) -> _Child:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with held() as mask:
        child = os.fork()
        if child == 0:
            _run_child(scenario, backend, (reader, writer), parent, mask)
    os.close(writer)
    return _Child(scenario, child, reader, time.monotonic() + scenario.timeout)


def _finish(child: _Child) -> list[Record]:
    try:
        text, in_time = _read_until(child.reader, child.deadline)
    finally:
        os.close(child.reader)
    status = _reap(child.pid, in_time)
    records: list[Record] = [json.loads(line) for line in text.splitlines()]
    if status or not in_time:
        seconds = 0 if in_time else child.scenario.timeout
        records.append({"n": child.scenario.name, "s": CHILD, "status": hex(status), "killed_after_s": seconds})
    return records


def _run_child(
    scenario: Scenario, backend: Callable[[], Backend], pipe: tuple[int, int], parent: int, mask: set[signal.Signals]
) -> NoReturn:
    reader, writer = pipe

    def keep(record: Record) -> None:
        os.write(writer, json.dumps(record).encode() + b"\n")

    # os._exit whatever happens: this process must not return into its parent's code.
    status = 1
    try:
        os.close(reader)
        bind(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # in here: what came meanwhile may raise
        lab = Lab(scenario.name, backend(), keep)
        lab.signals.install()
        scenario.run(lab)
        status = 0
    except BaseException as error:
        keep(failure(scenario.name, error))
    finally:
        os._exit(status)


def _read_until(reader: int, deadline: float) -> tuple[str, bool]:
    """Read until the writer is gone, or the deadline; returns the text and whether it was in time."""
    chunks: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([reader], [], [], max(0.0, left))
        if not ready:
            return _whole_lines(chunks), False
        chunk = os.read(reader, _CHUNK)
        if not chunk:
            return _whole_lines(chunks), True
        chunks.append(chunk)


def _whole_lines(chunks: list[bytes]) -> str:
    text = b"".join(chunks).decode()
    return text[: text.rfind("\n") + 1]


def _reap(child: int, ended: bool) -> int:
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def require(backend: str) -> None:
    """Raise RuntimeError, saying why, for the kernel's KVM where it cannot be used.

    Each scenario makes its backend in its own process, and what fails there is its record: without this, records of a
    KVM that cannot be opened would be taken for what it does.
    """
    if backend == "device" and not (probe := probe_device()).usable:
        raise RuntimeError(f"device backend: {probe.reason}")


def about(backend: Backend) -> Record:
    """Give the first line of a file of records: what was recorded, and on which day (UTC)."""
    told: Record = {"n": ABOUT, "date": datetime.now(UTC).date().isoformat(), "backend": backend.name}
    if backend.name == "soft":
        return {**told, "profile": backend.profile}
    loaded = [name for name in ("kvm_amd", "kvm_intel", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")]
    return {**told, "kernel": os.uname().release, "modules": loaded}


def recorded(
    names: Iterable[str],
    backend: str,
    profile: str | None = None,
    started: Callable[[str], None] = lambda _: None,
    timeout: float | None = None,
    jobs: int = 1,
) -> str:
    """Run scenarios by name on a backend by name, as ``record``; give the text of a file of records."""

    def make() -> Backend:
        return make_backend(backend, profile)

    entries = list(record(names, make, started, timeout, jobs))
    # Only now: scenarios are to be forked from a process without a backend.
    return "".join(json.dumps(entry) + "\n" for entry in (about(make()), *entries, {"n": END}))


def main(arguments: list[str] | None = None) -> int:
    """Record scenarios into a file; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m anykvm.conformance.record", description=main.__doc__)
    parser.add_argument("--backend", default="soft", choices=("soft", "device"), help="default soft")
    parser.add_argument("--profile", help="which KVM the soft backend is to be, such as linux-7.3")
    parser.add_argument("--timeout", type=float, help="seconds a scenario may take at most")
    parser.add_argument("--intrusive", action="store_true", help="by default also those that change the machine")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios to run at a time; default 1")
    parser.add_argument("--output", type=Path, help="the file to write; default standard output")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="names; default all that stay in this process")
    options = parser.parse_args(arguments)
    known = load()
    if unknown := [name for name in options.scenarios if name not in known]:
        parser.error(f"no scenario is named {', '.join(unknown)}")
    try:
        require(options.backend)
    except RuntimeError as error:
        parser.error(str(error))

    harmless = [name for name, scenario in known.items() if options.intrusive or not scenario.intrusive]
    chosen = options.scenarios or harmless

    def started(name: str) -> None:
        print(f"{options.backend}: {name}", file=sys.stderr, flush=True)

    if options.output is None:
        sys.stdout.write(recorded(chosen, options.backend, options.profile, timeout=options.timeout, jobs=options.jobs))
        return 0
    with OutFile(options.output) as out:
        text = recorded(chosen, options.backend, options.profile, started, options.timeout, options.jobs)
        out.write(text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
