"""``anykvm conformance random``: random sequences on the soft backend against what a real kernel did, or does."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from anykvm.cli.common import ExitCode, Fail, ProfileOption, choose, seconds
from anykvm.cli.oracle import run_oracle
from anykvm.cli.output import Output, line, say, shown
from anykvm.conformance.golden_file import Record
from anykvm.conformance.oracle import Settings
from anykvm.conformance.records_of import title
from anykvm.conformance.sequences.archive import archived, kernel_archive, slim
from anykvm.conformance.sequences.batch import Batch, parse_seeds, read_batch, record_batch
from anykvm.conformance.sequences.disagreement import disagreements

HELP = """Compare random sequences of ioctls and guest code on the soft backend with those on a real kernel.

By default with this package's records; with --kernel in the oracle's machine, never on this machine's own kernel. Exit
code: 0 if all agree, 1 if not."""
_SMP: Final = 2
"""So that the oracle's emulated processor makes locked accesses as one."""
_PROGRESS: Final = 100
_TIMEOUT: Final[Any] = "3600"
"""As on the command line: the option's parser reads it."""
_MOST_JOBS: Final = 4096


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
    timeout: Annotated[
        float, typer.Option(parser=seconds, metavar="SECONDS", help="For the kernel, booting included.")
    ] = _TIMEOUT,
    profile: ProfileOption = "linux-7.3",
    jobs: Annotated[int, typer.Option(min=1, max=_MOST_JOBS, metavar="N", help="How many at a time.")] = os.cpu_count()
    or 1,
) -> None:
    """Record, compare, and print where they begin to differ."""
    try:
        wanted = parse_seeds(seeds)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"--seeds: {error}") from None
    if kernel is None and (records or archive):
        raise Fail(ExitCode.USAGE, "--records and --archive need --kernel")
    soft = choose("soft", profile).backend
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(Output("--archive", archive)) if archive else None
        expected = kernel_archive("linux-7.3") if kernel is None else _asked(kernel, wanted, records, timeout)
        if out:
            out.write(archived(expected))
    if missing := [seed for seed in wanted if seed not in expected.sequences]:
        raise Fail(ExitCode.USAGE, f"no records of seed {missing[0]}; run them with --kernel")
    line(f"expected: {shown(title(expected.about))}")
    got = dict(_recorded(wanted, profile, jobs))
    chosen = {seed: expected.sequences[seed] for seed in wanted}
    differing = list(disagreements(chosen, got))
    for found in differing:
        line("\n".join(map(shown, found.lines())))
    agreeing = len(chosen) - len(differing)
    line(f"{soft.name}, profile {soft.profile}: {agreeing} of {len(chosen)} sequences agree")
    if differing:
        raise typer.Exit(ExitCode.FAILED)


def _recorded(seeds: list[int], profile: str | None, jobs: int) -> Iterator[tuple[int, list[Record]]]:
    for number, (seed, records) in enumerate(record_batch(seeds, "soft", profile, jobs), 1):
        if number % _PROGRESS == 0:
            say(f"soft: {number} of {len(seeds)}")
            sys.stderr.flush()
        yield seed, [slim(record) for record in records]


def _asked(kernel: str, seeds: list[int], path: Path | None, timeout: float) -> Batch:
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
    return batch._replace(sequences=slimmed)


@contextmanager
def _place(path: Path | None) -> Iterator[Path]:
    if path is not None:
        # In the oracle only the folder is shared, and the file is read again, to continue it.
        if os.path.exists(path) and not path.is_file():
            raise Fail(ExitCode.USAGE, f"--records {shown(path)}: not a regular file, which could be continued")
        with Output("--records", path) as out:
            if out.is_stdout:
                raise Fail(ExitCode.USAGE, "--records -: it must be a file, which can be continued")
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="anykvm-random-") as folder:
        yield Path(folder) / "kernel.jsonl"
