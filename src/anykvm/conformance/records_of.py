"""Where records come from: a file, one of this package by its name, or a backend that is asked now."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from anykvm.backends import backend as make_backend
from anykvm.conformance.golden_file import ABOUT, END, Record, by_scenario, golden, golden_names, read_records


class Records(NamedTuple):
    """Records by scenario, and what they are of."""

    title: str
    """Such as ``Linux 7.3.4+deb13-amd64, kvm_amd (2026-11-22)``."""
    scenarios: dict[str, list[Record]]
    label: str = ""
    """How it was asked for, for the head of a column."""
    of: str = ""
    """Whose they are, as ``known`` knows it: ``linux-7.3``, ``soft:linux-7.3``; empty where a file does not say."""


def kernel_names() -> list[str]:
    """Name the oracle's records in this package.

    >>> "linux-7.3" in kernel_names()
    True
    """
    folder = resources.files("anykvm.conformance") / "records"
    return sorted(entry.name[: -len(".jsonl")] for entry in folder.iterdir() if entry.name.endswith(".jsonl"))


def kernel_records(name: str) -> Records:
    """Read the oracle's records of a kernel, such as ``linux-7.3``. Raises FileNotFoundError for an unknown name."""
    with resources.as_file(resources.files("anykvm.conformance") / "records" / f"{name}.jsonl") as path:
        return from_file(path)


def from_file(path: Path) -> Records:
    """Read a file of records. Raises OSError, and ValueError for what is none."""
    records = read_records(path)
    if not all(map(_is_record, records)):
        raise ValueError(f"{path.name}: not a file of records")
    about = next((record for record in records if record["n"] == ABOUT), None)
    return Records(title(about) if about else path.name, by_scenario(records), of=owner(about) if about else "")


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("n"), str):
        return False
    if record["n"] == ABOUT:
        fields = ("date", "backend", "profile") if record.get("backend") == "soft" else ("date", "backend", "kernel")
        modules = record.get("modules", [])
        texts = all(isinstance(record.get(field), str) for field in fields)
        return texts and isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    return record["n"] == END or isinstance(record.get("s"), str)


def owner(about: Record) -> str:
    """Say whose records a file's first line announces: a kernel's by its two numbers, or the soft backend's.

    >>> owner({"n": "ABOUT", "backend": "soft", "profile": "linux-7.3"})
    'soft:linux-7.3'
    >>> owner({"n": "ABOUT", "backend": "device", "kernel": "7.3.4+deb13-amd64"})
    'linux-7.3'
    """
    if about["backend"] == "soft":
        return f"soft:{about['profile']}"
    return "linux-" + ".".join(re.findall(r"\d+", about["kernel"])[:2])


def title(about: Record) -> str:
    """Say what a file's first line is of.

    >>> title({"n": "ABOUT", "date": "2026-11-22", "backend": "soft", "profile": "linux-7.3"})
    'soft, profile linux-7.3 (2026-11-22)'
    """
    if about["backend"] == "soft":
        return f"soft, profile {about['profile']} ({about['date']})"
    return f"Linux {', '.join((about['kernel'], *about.get('modules', ())))} ({about['date']})"


def find(spec: str, names: list[str] | None, started: Callable[[str], None]) -> Records:
    """Find records: a name of this package's, ``soft``, ``soft:PROFILE`` or ``device`` to record now, else a file.

    ``names`` are the scenarios to record (default: all that leave the machine as it is).
    Raises ValueError and OSError as the functions above, and as ``anykvm.backend``; RuntimeError for a ``device`` that
    cannot be used.
    """
    return _found(spec, names, started)._replace(label=spec)


def _found(spec: str, names: list[str] | None, started: Callable[[str], None]) -> Records:
    kind, _, profile = spec.partition(":")
    if kind in ("soft", "device"):
        return _recorded(kind, profile or None, names, started)
    if spec in kernel_names():
        return kernel_records(spec)
    if spec in golden_names():
        return Records(f"golden file {spec}", golden(spec), of=spec)
    path = Path(spec)
    if not path.exists():
        known = ", ".join((*kernel_names(), *golden_names(), "soft", "soft:PROFILE", "device"))
        raise ValueError(f"{spec}: no such file; names are {known}")
    return from_file(path)


def _recorded(kind: str, profile: str | None, names: list[str] | None, started: Callable[[str], None]) -> Records:
    from anykvm.conformance import record as recorder  # a program too, so not imported by who does not record
    from anykvm.conformance.scenario import load

    chosen = names or [name for name, scenario in load().items() if not scenario.intrusive]
    recorder.require(kind)
    made = make_backend(kind, profile)
    # Asked for its name, then let go of: scenarios are to be forked from a process without a backend.
    about = recorder.about(made)
    del made
    records = recorder.record(chosen, lambda: make_backend(kind, profile), started)
    return Records(title(about), by_scenario(records), of=owner(about))
