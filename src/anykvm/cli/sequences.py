"""``anykvm conformance random``: random sequences on the soft backend against what a real kernel did, or does."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from anykvm.cli.common import ExitCode, Fail, ProfileOption, check_writable, choose
from anykvm.cli.oracle import run_oracle
from anykvm.conformance.golden_file import Record
from anykvm.conformance.oracle import Settings
from anykvm.conformance.records_of import title
from anykvm.conformance.sequences.archive import kernel_archive, slim, write_archive
from anykvm.conformance.sequences.batch import Batch, parse_seeds, read_batch, record_batch
from anykvm.conformance.sequences.disagreement import disagreements

HELP = """Compare random sequences of ioctls and guest code on the soft backend with those on a real kernel.

By default with this package's records; with --kernel in the oracle's machine, never on this machine's own kernel. Exit
code: 0 if all agree, 1 if not."""
_SMP: Final = 2
"""So that the oracle's emulated processor makes locked accesses as one."""
_PROGRESS: Final = 100


def random(
    seeds: Annotated[str, typer.Option(metavar="FIRST:END", help="Which sequences; a seed each.")] = "0:4000",
    kernel: Annotated[
        str | None, typer.Option(metavar="VERSION|PATH", help="Run them on this kernel now, as `anykvm oracle` does.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --kernel: where to keep what it did; continued if it is there."),
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --kernel: also write it as this package has it.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the kernel, booting included.")] = 3600,
    profile: ProfileOption = "linux-7.3",
    jobs: Annotated[int, typer.Option(min=1, help="How many at a time.")] = os.cpu_count() or 1,
) -> None:
    """Record, compare, and print where they begin to differ."""
    try:
        wanted = parse_seeds(seeds)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"--seeds: {error}") from None
    if kernel is None and (records or archive):
        raise Fail(ExitCode.USAGE, "--records and --archive need --kernel")
    soft = choose("soft", profile).backend
    if archive:
        check_writable("--archive", archive)
    expected = kernel_archive("linux-7.3") if kernel is None else _asked(kernel, wanted, records, timeout, archive)
    if missing := [seed for seed in wanted if seed not in expected.sequences]:
        raise Fail(ExitCode.USAGE, f"no records of seed {missing[0]}; run them with --kernel")
    print(f"expected: {title(expected.about)}")
    got = dict(_recorded(wanted, profile, jobs))
    chosen = {seed: expected.sequences[seed] for seed in wanted}
    differing = list(disagreements(chosen, got))
    for found in differing:
        print("\n".join(found.lines()))
    agreeing = len(chosen) - len(differing)
    print(f"{soft.name}, profile {soft.profile}: {agreeing} of {len(chosen)} sequences agree")
    if differing:
        raise typer.Exit(ExitCode.FAILED)


def _recorded(seeds: list[int], profile: str | None, jobs: int) -> Iterator[tuple[int, list[Record]]]:
    for number, (seed, records) in enumerate(record_batch(seeds, "soft", profile, jobs), 1):
        if number % _PROGRESS == 0:
            print(f"soft: {number} of {len(seeds)}", file=sys.stderr, flush=True)
        yield seed, [slim(record) for record in records]


def _asked(kernel: str, seeds: list[int], path: Path | None, timeout: float, archive: Path | None) -> Batch:
    with _place(path) as file:
        command = [sys.executable, "-m", "anykvm.conformance.sequences.batch", "--backend", "device"]
        command += ["--seeds", ",".join(map(str, seeds)), "--output", str(file)]
        settings = Settings(kernel, smp=_SMP, timeout=timeout, output=file.parent)
        try:
            code = run_oracle(command, settings)
        except Fail as failure:
            hint = "; with --records the next run goes on from here" if failure.code == ExitCode.TIMEOUT else ""
            raise Fail(failure.code, f"{failure}{hint}") from None
        if code:
            raise Fail(ExitCode.BACKEND, f"recording on the kernel ended with code {code}")
        batch = read_batch(file)
    slimmed = {seed: [slim(record) for record in found] for seed, found in batch.sequences.items()}
    batch = batch._replace(sequences=slimmed)
    if archive:
        write_archive(archive, batch)
    return batch


@contextmanager
def _place(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="anykvm-random-") as folder:
        yield Path(folder) / "kernel.jsonl"
