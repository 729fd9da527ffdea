"""Run many sequences on a backend, each in a process of its own, and write their records as they come.

``python -m anykvm.conformance.sequences.batch`` is what runs in the oracle. A file that was not finished is continued:
what it has is not run again, so a batch that is ended by a time limit loses nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from anykvm.backends import backend as make_backend
from anykvm.backends.base import Backend
from anykvm.conformance.bound import held
from anykvm.conformance.golden_file import ABOUT, Record
from anykvm.conformance.record import about, record_scenario
from anykvm.conformance.scenario import Scenario
from anykvm.conformance.sequences.generator import Sequence, generate
from anykvm.conformance.sequences.perform import perform

SECONDS: Final = 30.0
"""After which a sequence hangs."""
_PROGRESS: Final = 100
_PATIENCE: Final = 4 * SECONDS
_MOST_SEEDS: Final = 1_000_000
_NOT_HERE: Final = "random sequences are never run on this machine's own kernel: only in `anykvm oracle`"


class Batch(NamedTuple):
    """Records of sequences by seed, and what they are of."""

    about: Record
    sequences: dict[int, list[Record]]


def in_oracle() -> bool:
    """Say whether this is the oracle's machine, whose kernel nobody needs (``oracle/init.sh``)."""
    try:
        return "anykvm_oracle" in Path("/proc/cmdline").read_text().split()
    except OSError:
        return False


def record_sequence(sequence: Sequence, backend: Callable[[], Backend], seconds: float = SECONDS) -> list[Record]:
    """Run one sequence in a process of its own; a crash or a hang is its last record."""
    name = f"random_{sequence.seed}"
    body = Scenario(name, "random", frozenset(), seconds, lambda lab: perform(lab, sequence.setup, sequence.steps))
    return record_scenario(body, backend)


def _record_seed(backend: str, profile: str | None, seconds: float, seed: int) -> tuple[int, list[Record]]:
    return seed, record_sequence(generate(seed), lambda: make_backend(backend, profile), seconds)


def record_batch(
    seeds: Iterable[int], backend: str, profile: str | None = None, jobs: int = 1, seconds: float = SECONDS
) -> Iterator[tuple[int, list[Record]]]:
    """Run the sequences of seeds, ``jobs`` at a time, and give each as it is done.

    Raises RuntimeError for the kernel's KVM where that is not the oracle's: nobody's own machine is to be tried so.
    """
    if backend != "soft" and not in_oracle():
        raise RuntimeError(_NOT_HERE)
    with held() as mask:
        pool = multiprocessing.get_context("fork").Pool(jobs, _leave_ctrl_c, (mask,))
    with pool:
        yield from pool.imap_unordered(functools.partial(_record_seed, backend, profile, seconds), seeds)


def _leave_ctrl_c(mask: set[signal.Signals]) -> None:
    # To who asked for the sequences, who gets it too and ends us; one that ended by itself may hold the pool's lock.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def parse_seeds(text: str) -> list[int]:
    """Read ``5``, ``0:2000``, or several with commas. Raises ValueError, for a range without a seed too.

    >>> parse_seeds("3,0:3")
    [3, 0, 1, 2]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, colon, end = part.partition(":")
        if not first.isdigit() or (colon and not end.isdigit()):
            raise ValueError(f"{text!r} is not SEED or FIRST:END")
        found = range(int(first), int(end)) if colon else range(int(first), int(first) + 1)
        if found.stop - found.start > _MOST_SEEDS:
            raise ValueError(f"{part!r} is more than {_MOST_SEEDS:,} seeds")
        if not found:
            raise ValueError(f"{part!r} has no seed: END is the first behind the range")
        if len(seeds) + len(found) > _MOST_SEEDS:
            raise ValueError(f"{text!r} is more than {_MOST_SEEDS:,} seeds")
        seeds += found
    return seeds


def read_batch(path: Path) -> Batch:
    """Read a file, also an unfinished one. Raises OSError; ValueError for what is none."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    if not whole or whole[0].get("n") != ABOUT:
        raise ValueError(f"{path.name}: not a file of sequences")
    return Batch(whole[0], {line["seed"]: line["records"] for line in whole[1:]})


def lines(batch: Mapping[int, list[Record]]) -> Iterator[str]:
    """Write sequences as lines."""
    for seed, records in batch.items():
        yield json.dumps({"seed": seed, "records": records}) + "\n"


def _give_up(backend: str, seeds: list[int]) -> NoReturn:
    """End without waiting for the processes: one that hangs in the kernel cannot be killed."""
    text = f"no sequence ends any more: it hangs in one of the seeds {', '.join(map(str, seeds))}; leave it out"
    print(f"{backend}: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Record the sequences of a range of seeds into a file; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m anykvm.conformance.sequences.batch", description=main.__doc__)
    parser.add_argument("--backend", default="soft", help="soft or device")
    parser.add_argument("--profile", help="which KVM the soft backend is to be, such as linux-7.3")
    parser.add_argument("--seeds", required=True, type=parse_seeds, help="such as 0:2000")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, or to continue")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time; default all CPUs")
    parser.add_argument("--patience", type=float, default=_PATIENCE, help="seconds to wait for a sequence to end")
    options = parser.parse_args(arguments)
    if options.backend != "soft" and not in_oracle():
        parser.error(_NOT_HERE)
    done: set[int] = set()
    if options.output.exists():
        batch = read_batch(options.output)
        done = set(batch.sequences)
        # Without the line that was being written when it was ended.
        options.output.write_text("".join((json.dumps(batch.about) + "\n", *lines(batch.sequences))))
    else:
        options.output.write_text(json.dumps(about(make_backend(options.backend, options.profile))) + "\n")
    left = [seed for seed in options.seeds if seed not in done]
    running = list(left)
    began = time.monotonic()
    with options.output.open("a") as file:
        recorded = record_batch(left, options.backend, options.profile, options.jobs)
        signal.signal(signal.SIGALRM, lambda *_: _give_up(options.backend, running[: options.jobs]))
        signal.setitimer(signal.ITIMER_REAL, options.patience)
        for number, (seed, records) in enumerate(recorded, 1):
            signal.setitimer(signal.ITIMER_REAL, options.patience)
            running.remove(seed)
            file.writelines(lines({seed: records}))
            file.flush()
            if number % _PROGRESS == 0 or number == len(left):
                rate = number / (time.monotonic() - began)
                text = f"{options.backend}: {len(done) + number} of {len(options.seeds)} sequences, {rate:.1f}/s"
                print(text, file=sys.stderr, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
