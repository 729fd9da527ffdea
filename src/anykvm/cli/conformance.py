"""``anykvm conformance``: the scenarios, records of what a KVM does in them, and how records differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from anykvm.backends.soft.profiles import PROFILES
from anykvm.cli import sequences
from anykvm.cli.common import ExitCode, Fail, JsonOption, ProfileOption, check_writable, choose, print_json
from anykvm.conformance import record as recorder
from anykvm.conformance import report
from anykvm.conformance.records_of import Records, find, kernel_names, kernel_records
from anykvm.conformance.scenario import load

HELP = "Scenarios that run on any KVM, records of what it does in them, and a comparison of records."
LIST_HELP = "List the scenarios: their area, what they need, and in how many steps each kernel was recorded."
RECORD_HELP = """Run scenarios on a backend and write a file of records.

By default all that leave the machine as it is. On /dev/kvm only if asked for by name, and never on a KVM whose machine
you need: scenarios send it bad input. Exit code: 2 wrong usage; 3 the backend cannot be used."""
COMPARE_HELP = """Compare records with those expected.

Each is a kernel's name (see `anykvm conformance list`), a file of records, or soft, soft:PROFILE or device to record
now. The table counts the scenarios of each area that agree, and names the others. A difference that is known, with its
reason (see --verbose, or the page), is no failure. Exit code: 0 if there is no other, 1 if there is."""

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
    table = Table(*map(_whole, ("scenario", "area")), "needs", *kernels)
    for scenario in scenarios:
        counts = [str(len(records.scenarios.get(scenario.name, ())) or "-") for records in kernels.values()]
        table.add_row(escape(scenario.name), escape(scenario.area), ", ".join(sorted(scenario.needs)), *counts)
    console = Console(highlight=False)
    console.print(table)
    for name, records in kernels.items():
        console.print(f"{name}: {escape(records.title)}", soft_wrap=True)


def _whole(head: str) -> Column:
    """Make a column whose text is never cut off."""
    return Column(head, overflow="fold")


@app.command("record", help=RECORD_HELP)
def record(
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    backend: Annotated[Literal["soft", "device"], typer.Option(help="Whose KVM: the kernel's only by name.")] = "soft",
    profile: ProfileOption = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds a scenario may take at most.")] = None,
    intrusive: Annotated[bool, typer.Option("--intrusive", help="Also those that change the machine.")] = False,
    scenarios: Scenarios = None,
) -> None:
    """Write a file of records."""
    chosen = choose(backend, profile).backend
    _check(scenarios)
    check_writable("OUTPUT", output)
    _require(backend)
    options = ["--backend", chosen.name, "--output", str(output), *(["--intrusive"] if intrusive else [])]
    if chosen.name == "soft":
        options += ["--profile", chosen.profile]
    if timeout is not None:
        options += ["--timeout", str(timeout)]
    recorder.main([*options, *(scenarios or [])])


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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print each difference, and why if known.")] = False,
) -> None:
    """Compare and print a table."""
    _check(scenarios)
    if html:
        check_writable("--html", html)
    for spec in (expected, *(got or ())):
        _require(spec)
    wanted = _records(expected, scenarios)
    if missing := [name for name in scenarios or () if name not in wanted.scenarios]:
        raise Fail(ExitCode.USAGE, f"{expected} has no records of {', '.join(missing)}")
    names = scenarios or list(wanted.scenarios)
    others = [_records(spec, [n for n in names if n in load()]) for spec in got or [_soft_as(expected)]]
    comparison = report.compare(wanted, others, scenarios)
    if json:
        print_json(_plain(comparison))
    else:
        _show(comparison, verbose)
    if html:
        html.write_text(report.html(comparison))
    if comparison.differing:
        raise typer.Exit(ExitCode.FAILED)


def _check(scenarios: list[str] | None) -> None:
    if unknown := [name for name in scenarios or () if name not in load()]:
        raise Fail(ExitCode.USAGE, f"no scenario is named {', '.join(unknown)}; see `anykvm conformance list`")


def _require(spec: str) -> None:
    try:
        recorder.require(spec)
    except RuntimeError as error:
        raise Fail(ExitCode.BACKEND, str(error)) from None


def _records(spec: str, names: list[str] | None) -> Records:
    # What changes the machine is only recorded on request, by `record --intrusive`.
    harmless = [name for name in names or load() if not load()[name].intrusive]

    def started(name: str) -> None:
        print(f"{spec}: {name}", file=sys.stderr, flush=True)

    try:
        return find(spec, harmless, started)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, str(error)) from None
    except (ImportError, RuntimeError) as error:
        raise Fail(ExitCode.BACKEND, f"{spec}: {error}") from None


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


def _coloured(kind: str, text: str) -> str:
    return f"[{_COLOURS[kind]}]{text}[/]"


def _show(comparison: report.Comparison, verbose: bool) -> None:
    console = Console(highlight=False)
    console.print(f"expected: [bold]{escape(comparison.expected)}[/]", soft_wrap=True)
    table = Table(*map(_whole, ("area", "scenario")), *map(escape, comparison.labels))
    for area in comparison.areas:
        counts = [_coloured(tally.kind, tally.text) for tally in area.tallies]
        table.add_row(f"[bold]{escape(area.name)}[/]", "", *counts)
        for row in area.rows:
            if not row.settled:
                table.add_row("", escape(row.name), *(_coloured(cell.kind, cell.verdict) for cell in row.cells))
    console.print(table)
    for label, title, tally in zip(comparison.labels, comparison.titles, comparison.tallies, strict=True):
        console.print(escape(f"{label}: {title}: scenarios that agree: {tally.text}"), soft_wrap=True)
    if verbose:
        for row in comparison.rows:
            for label, cell in zip(comparison.labels, row.cells, strict=True):
                for difference in cell.differences:
                    console.print(escape(f"{label}: {difference}"), soft_wrap=True)
                for difference, reason in cell.known:
                    console.print(escape(f"{label}: known: {difference}: {reason}"), soft_wrap=True)
