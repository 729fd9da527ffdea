"""``anykvm conformance``: the scenarios, records of what a KVM does in them, and how records differ."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Final, Literal, TextIO

import typer

from anykvm.backends.soft.profiles import PROFILES
from anykvm.cli import sequences
from anykvm.cli.common import ExitCode, Fail, JsonOption, ProfileOption, choose, seconds
from anykvm.cli.output import Output, line, print_json, shown, styled, table
from anykvm.cli.progress import Scenarios as Progress
from anykvm.conformance import record as recorder
from anykvm.conformance import report
from anykvm.conformance.records_of import Records, find, kernel_names, kernel_records
from anykvm.conformance.scenario import load

HELP = "Scenarios that run on any KVM, records of what it does in them, and a comparison of records."
LIST_HELP = "List the scenarios: their area, what they need, and in how many steps each kernel was recorded."
RECORD_HELP = """Run scenarios on a backend and write a file of records.

By default all that leave the machine as it is. On /dev/kvm only if asked for by name, and never on a KVM whose machine
you need: scenarios send it bad input. OUTPUT replaces an older file only when it is complete; it may be a device, a
FIFO, or - for standard output. Exit code: 2 wrong usage, or OUTPUT cannot be written to; 3 the backend cannot be used;
7 writing OUTPUT failed."""
COMPARE_HELP = """Compare records with those expected.

Each is a kernel's name (see `anykvm conformance list`), a file of records, or soft, soft:PROFILE or device to record
now. The differences are printed, a line each, and after them how many scenarios agree. --all also prints a table of all
scenarios. A difference that is known, with its reason (see --verbose, or the page), is no failure. The page replaces an
older one only when it is complete; FILE may be a device, a FIFO, or - for standard output; what else is printed then
goes to stderr. Exit code: 0 if there is no difference but known ones, 1 if there is; 2 wrong usage, or a file cannot be
used; 3 a backend cannot be used; 7 writing the output failed."""

app = typer.Typer(help=HELP, add_completion=False, rich_markup_mode=None)
app.command("random", help=sequences.HELP)(sequences.random)
Scenarios = Annotated[list[str] | None, typer.Option("--scenario", metavar="NAME", help="Only these; may be repeated.")]


@app.command("list", help=LIST_HELP)
def list_scenarios(json: JsonOption = False) -> None:
    """Print every scenario."""
    kernels = {name: kernel_records(name) for name in kernel_names()}
    scenarios = sorted(load().values(), key=lambda scenario: (scenario.area, scenario.name))
    rows = [
        {
            "name": scenario.name,
            "area": scenario.area,
            "needs": sorted(scenario.needs),
            "intrusive": scenario.intrusive,
            "steps": {kernel: len(records.scenarios.get(scenario.name, ())) for kernel, records in kernels.items()},
        }
        for scenario in scenarios
    ]
    if json:
        print_json({"kernels": {name: records.title for name, records in kernels.items()}, "scenarios": rows})
        return
    lines = []
    for scenario in scenarios:
        counts = [str(len(records.scenarios.get(scenario.name, ())) or "") for records in kernels.values()]
        lines.append((scenario.name, scenario.area, ",".join(sorted(scenario.needs)), *counts))
    table(("scenario", "area", "needs", *kernels), lines, right=range(3, 3 + len(kernels)))
    for name, records in kernels.items():
        line(f"{name}: {shown(records.title)}")


@app.command("record", help=RECORD_HELP)
def record(
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    backend: Annotated[Literal["soft", "device"], typer.Option(help="Whose KVM: the kernel's only by name.")] = "soft",
    profile: ProfileOption = None,
    timeout: Annotated[
        float | None, typer.Option(parser=seconds, metavar="SECONDS", help="The most a scenario may take.")
    ] = None,
    intrusive: Annotated[bool, typer.Option("--intrusive", help="Also those that change the machine.")] = False,
    scenarios: Scenarios = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name each scenario on stderr.")] = False,
) -> None:
    """Write a file of records."""
    chosen = choose(backend, profile).backend
    _check(scenarios)
    _require(backend)
    names = scenarios or [name for name, scenario in load().items() if intrusive or not scenario.intrusive]
    progress = Progress(chosen.name, len(names), verbose)
    with Output("OUTPUT", output) as out:
        try:
            text = recorder.recorded(names, chosen.name, profile, progress.started, timeout)
        finally:
            progress.end()
        out.write(text)


def _soft_as(expected: str) -> str:
    """The soft backend as the kernel that is expected, or as the newest."""
    return f"soft:{expected if expected in PROFILES else 'linux-7.3'}"


@app.command("compare", help=COMPARE_HELP)
def compare(
    expected: Annotated[str, typer.Argument(help="What is expected.")] = "linux-7.3",
    got: Annotated[list[str] | None, typer.Argument(help="What is compared; default soft with its profile.")] = None,
    scenarios: Scenarios = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page.")] = None,
    json: JsonOption = False,
    everything: Annotated[bool, typer.Option("--all", help="Also a table of all areas and scenarios.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also known differences, and why; name scenarios as they run.")
    ] = False,
) -> None:
    """Compare, and print the differences."""
    _check(scenarios)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(Output("--html", html, expected, *(got or ()))) if html else None
        if json and out and out.is_stdout:
            raise Fail(ExitCode.USAGE, "--json and --html - cannot both go to stdout")
        comparison = _compared(expected, got, scenarios, verbose)
        if json:
            print_json(_plain(comparison))
        else:
            _show(comparison, out.others if out else sys.stdout, everything, verbose)
        if out:
            out.write(report.html(comparison))
    if comparison.differing:
        raise typer.Exit(ExitCode.FAILED)


def _compared(expected: str, got: list[str] | None, scenarios: list[str] | None, verbose: bool) -> report.Comparison:
    for spec in (expected, *(got or ())):
        _require(spec)
    wanted = _records(expected, scenarios, verbose)
    if missing := [name for name in scenarios or () if name not in wanted.scenarios]:
        raise Fail(ExitCode.USAGE, f"{expected} has no records of {', '.join(missing)}")
    names = scenarios or list(wanted.scenarios)
    specs = got or [_soft_as(expected)]
    others = [_records(spec, [name for name in names if name in load()], verbose) for spec in specs]
    return report.compare(wanted, others, scenarios)


def _check(scenarios: list[str] | None) -> None:
    if unknown := [name for name in scenarios or () if name not in load()]:
        raise Fail(ExitCode.USAGE, f"no scenario is named {shown(', '.join(unknown))}; see `anykvm conformance list`")


def _require(spec: str) -> None:
    try:
        recorder.require(spec)
    except RuntimeError as error:
        raise Fail(ExitCode.BACKEND, str(error)) from None


def _records(spec: str, names: list[str] | None, verbose: bool) -> Records:
    # What changes the machine is only recorded on request, by `record --intrusive`.
    harmless = [name for name in names or load() if not load()[name].intrusive]
    progress = Progress(shown(spec), len(harmless), verbose)
    try:
        return find(spec, harmless, progress.started)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, str(error)) from None
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"{shown(spec)}: {error.strerror or error}") from None
    except (ImportError, RuntimeError) as error:
        raise Fail(ExitCode.BACKEND, f"{shown(spec)}: {error}") from None
    finally:
        progress.end()


def _plain(comparison: report.Comparison) -> dict[str, object]:
    return {
        "expected": comparison.expected,
        "compared": comparison.titles,
        "agreeing": [tally.agrees for tally in comparison.tallies],
        "known": [tally.known for tally in comparison.tallies],
        "scenarios": [
            {
                "name": row.name,
                "area": row.area,
                "cells": [
                    {
                        "verdict": cell.verdict,
                        "differences": [difference._asdict() for difference in cell.differences],
                        "known": [{**difference._asdict(), "reason": why} for difference, why in cell.known],
                    }
                    for cell in row.cells
                ],
            }
            for row in comparison.rows
        ],
    }


_COLOURS: Final = {"agrees": "green", "known": "yellow", "differs": "red", "none": "dim"}


def _show(comparison: report.Comparison, to: TextIO, everything: bool, verbose: bool) -> None:
    """Print what differs first; what is as expected only if asked for."""
    line(f"expected: {styled(shown(comparison.expected), 'bold', to)}", to)
    for row in comparison.rows:
        for label, cell in zip(map(shown, comparison.labels), row.cells, strict=True):
            for difference in cell.differences:
                line(styled(f"{label}: {shown(str(difference))}", "red", to), to)
            for difference, reason in cell.known if verbose else ():
                line(f"{label}: known: {shown(str(difference))}: {shown(reason)}", to)
    if everything:
        _table(comparison, to)
    totals = zip(comparison.labels, comparison.titles, comparison.tallies, strict=True)
    for label, title, tally in totals:
        text = f"{shown(label)}: {shown(title)}: scenarios that agree: {tally.text}"
        line(styled(text, _COLOURS[tally.kind], to), to)


def _table(comparison: report.Comparison, to: TextIO) -> None:
    rows: list[tuple[str, ...]] = []
    for area in comparison.areas:
        rows.append((area.name, "all", *(tally.text for tally in area.tallies)))
        rows += [(area.name, row.name, *(cell.verdict for cell in row.cells)) for row in area.rows]
    table(("area", "scenario", *comparison.labels), rows, stream=to)
