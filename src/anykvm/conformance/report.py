"""Compare one set of records with others, scenario by scenario; as a table of values, and as one HTML page."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from anykvm.conformance.compare import Difference, compare_scenario
from anykvm.conformance.records_of import Records
from anykvm.conformance.scenario import load


class Cell(NamedTuple):
    """One scenario of one set of records, beside the expected one."""

    recorded: bool
    steps: int
    differences: list[Difference]

    @property
    def verdict(self) -> str:
        """Say it in a word or two.

        >>> Cell(True, 3, []).verdict, Cell(False, 0, []).verdict
        ('agrees', 'not recorded')
        """
        if not self.recorded:
            return "not recorded"
        count = len(self.differences)
        return f"{count} difference{'s' if count != 1 else ''}" if count else "agrees"


class Line(NamedTuple):
    """A field in which a set of records is not the expected one, and what each set has there."""

    step: str
    field: str
    expected: object
    got: list[object | None]
    """For each set of records; None: as expected, or not recorded."""


class Row(NamedTuple):
    """A scenario: its name, its area, and a cell for each set of records."""

    name: str
    area: str
    steps: int
    cells: list[Cell]

    @property
    def differs(self) -> bool:
        """Whether any set of records has a difference."""
        return any(cell.differences for cell in self.cells)

    @property
    def settled(self) -> bool:
        """Whether every set of records has it, and agrees."""
        return all(cell.verdict == "agrees" for cell in self.cells)

    @property
    def lines(self) -> list[Line]:
        """Lay the differences of all sets of records side by side."""
        lines: dict[tuple[str, str], Line] = {}
        for at, cell in enumerate(self.cells):
            for difference in cell.differences:
                empty = Line(difference.step, difference.field, difference.expected, [None] * len(self.cells))
                lines.setdefault((difference.step, difference.field), empty).got[at] = difference.got
        return list(lines.values())


class Area(NamedTuple):
    """The scenarios of one area."""

    name: str
    rows: list[Row]

    @property
    def agreeing(self) -> list[int]:
        """Count for each set of records the scenarios that were recorded and agree."""
        return agreeing(self.rows)


class Comparison(NamedTuple):
    """All scenarios of the expected records, by area."""

    expected: str
    labels: list[str]
    titles: list[str]
    rows: list[Row]

    @property
    def agreeing(self) -> list[int]:
        """Count for each set of records the scenarios that were recorded and agree."""
        return agreeing(self.rows) or [0] * len(self.titles)

    @property
    def areas(self) -> list[Area]:
        """Group the scenarios."""
        areas: dict[str, list[Row]] = {}
        for row in self.rows:
            areas.setdefault(row.area, []).append(row)
        return [Area(name, rows) for name, rows in areas.items()]

    @property
    def differing(self) -> int:
        """Count the cells with differences."""
        return sum(bool(cell.differences) for row in self.rows for cell in row.cells)


def agreeing(rows: list[Row]) -> list[int]:
    """Count for each set of records the rows that were recorded and agree."""
    return [
        sum(cell.verdict == "agrees" for cell in column) for column in zip(*(row.cells for row in rows), strict=True)
    ]


def compare(expected: Records, others: list[Records], names: list[str] | None = None) -> Comparison:
    """Compare records with the expected ones, for ``names`` (default: every expected scenario)."""
    known = load()
    rows = []
    for name, records in expected.scenarios.items():
        if names is None or name in names:
            area = known[name].area if name in known else "unknown"
            cells = [_cell(name, expected, other) for other in others]
            rows.append(Row(name, area, len(records), cells))
    rows.sort(key=lambda row: row.area)
    return Comparison(expected.title, [o.label or o.title for o in others], [o.title for o in others], rows)


def _cell(name: str, expected: Records, other: Records) -> Cell:
    got = other.scenarios.get(name)
    if got is None:
        return Cell(False, 0, [])
    return Cell(True, len(got), compare_scenario(name, expected.scenarios[name], got))


def html(comparison: Comparison) -> str:
    """Make a page of a comparison that needs nothing else."""
    template = (files("anykvm.conformance") / "templates" / "report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(comparison=comparison)
