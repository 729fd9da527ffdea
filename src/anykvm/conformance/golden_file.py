"""Reading files of records: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
"""One step: ``n`` scenario, ``s`` step, and what was seen; see ``golden/README.md``."""

END = "END"
"""The name in the last line of a file that was written to its end."""
ABOUT = "ABOUT"
"""The name in the first line of a file: which backend, kernel and profile, and when."""


def read_records(path: Path) -> list[Record]:
    """Read a file of records. Raises OSError, and ValueError with the line's number for what is not JSON."""
    records: list[Record] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
    return records


def by_scenario(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by scenario, in order; the first and last lines are left out."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["n"] not in (ABOUT, END):
            groups.setdefault(record["n"], []).append(record)
    return groups


def golden_names() -> list[str]:
    """Name the golden files of this package.

    >>> golden_names()
    ['linux-7.3-npt', 'linux-7.3-shadow-paging']
    """
    folder = resources.files("anykvm.conformance") / "golden"
    return sorted(entry.name[: -len(".jsonl")] for entry in folder.iterdir() if entry.name.endswith(".jsonl"))


def golden(name: str) -> dict[str, list[Record]]:
    """Read a golden file of this package, grouped by scenario. Raises FileNotFoundError for an unknown name."""
    with resources.as_file(resources.files("anykvm.conformance") / "golden" / f"{name}.jsonl") as path:
        return by_scenario(read_records(path))
