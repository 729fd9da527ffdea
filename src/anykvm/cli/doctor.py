"""``anykvm doctor``: which backends are usable here, and why not the others."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from anykvm.backends import Probe, probe_device, probe_soft
from anykvm.cli.common import ExitCode, JsonOption, print_json

HELP = """Say which backends are usable here, and why not the others.

Each usable backend has run a small guest. Exit code: 0 if one of them is usable, else 3."""


def doctor(json: JsonOption = False) -> None:
    """Probe all backends, print what was found."""
    probes = (probe_device(), probe_soft())
    chosen = next((probe.name for probe in probes if probe.usable), None)
    if json:
        print_json({"backends": [_plain(probe) for probe in probes], "auto": chosen})
    else:
        _show(probes, chosen)
    if chosen is None:
        raise typer.Exit(ExitCode.BACKEND)


def _plain(probe: Probe) -> dict[str, Any]:
    return {"name": probe.name, "usable": probe.usable, "reason": probe.reason, "notes": list(probe.notes)}


def _show(probes: tuple[Probe, ...], chosen: str | None) -> None:
    console = Console(highlight=False)
    for probe in probes:
        mark = "[green]usable    [/]" if probe.usable else "[red]not usable[/]"
        console.print(f"[bold]{probe.name:7}[/] {mark} {escape(probe.reason)}", soft_wrap=True)
        for note in probe.notes:
            console.print(f"                   {escape(note)}", style="dim", soft_wrap=True)
    if chosen:
        console.print(f"--backend auto takes [bold]{chosen}[/]")
