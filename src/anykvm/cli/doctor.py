"""``anykvm doctor``: which backends are usable here, and why not the others."""

from __future__ import annotations

from typing import Any

import typer

from anykvm.backends import Probe, probe_device, probe_soft
from anykvm.cli.common import ExitCode, JsonOption
from anykvm.cli.output import line, print_json, shown, styled

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
    for probe in probes:
        mark = styled("usable    ", "green") if probe.usable else styled("not usable", "red")
        line(f"{styled(f'{probe.name:7}', 'bold')} {mark} {shown(probe.reason)}")
        for note in probe.notes:
            line(styled(f"{'':18} {shown(note)}", "dim"))
    if chosen:
        line(f"--backend auto takes {styled(chosen, 'bold')}")
