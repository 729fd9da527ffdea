"""``anykvm caps``: what each backend and profile answers to KVM_CHECK_EXTENSION."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

import anykvm
from anykvm.abi.names import CAP_NAMES
from anykvm.backends import probe_device, soft_backend
from anykvm.backends.device import DeviceBackend
from anykvm.backends.soft.profiles import PROFILES
from anykvm.cli.common import ExitCode, JsonOption
from anykvm.cli.output import line, print_json, shown, table

HELP = """Show the capabilities of each backend and profile, as KVM_CHECK_EXTENSION of the system file answers.

Exit code: 0 if one backend could be asked, else 3."""


class Column(NamedTuple):
    """One backend with one profile: its values by capability, or why it could not be asked."""

    backend: str
    profile: str
    values: dict[str, int]
    problem: str | None


def caps(
    everything: Annotated[bool, typer.Option("--all", help="Also capabilities that none of them has.")] = False,
    json: JsonOption = False,
) -> None:
    """Ask every backend for every capability."""
    columns = [_ask("device", "kernel"), *(_ask("soft", profile) for profile in PROFILES)]
    if json:
        print_json({"columns": [_plain(column, everything) for column in columns]})
    else:
        _show(columns, everything)
    if all(column.problem for column in columns):
        raise typer.Exit(ExitCode.BACKEND)


def _ask(name: str, profile: str) -> Column:
    # Asked in this process only once a child has tried it: some kernels kill or hang their caller.
    if name == "device" and not (probe := probe_device()).usable:
        return Column(name, profile, {}, probe.reason)
    try:
        backend = DeviceBackend() if name == "device" else soft_backend(profile)
        with anykvm.open(backend) as kvm:
            values = {cap: kvm.check_extension(number) for number, cap in CAP_NAMES.items()}
    except (ImportError, OSError, RuntimeError) as error:
        return Column(name, profile, {}, getattr(error, "strerror", None) or str(error))
    return Column(name, profile, values, None)


def _plain(column: Column, everything: bool) -> dict[str, Any]:
    return {
        "backend": column.backend,
        "profile": column.profile,
        "usable": column.problem is None,
        "problem": column.problem,
        "capabilities": {name: value for name, value in column.values.items() if value or everything},
    }


def _show(columns: list[Column], everything: bool) -> None:
    asked = [column for column in columns if column.problem is None]
    rows = []
    for name in CAP_NAMES.values():
        values = [column.values[name] for column in asked]
        if everything or any(values):
            rows.append((name.removeprefix("KVM_CAP_"), *map(_number, values)))
    if asked:
        head = ("capability", *(f"{column.backend}/{column.profile}" for column in asked))
        table(head, rows, right=range(1, len(head)))
    for column in columns:
        if column.problem:
            line(f"{column.backend}/{column.profile} cannot be asked: {shown(column.problem)}")


def _number(value: int) -> str:
    return "" if not value else str(value) if value < 100_000 else hex(value)
