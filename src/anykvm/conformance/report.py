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


class Row(NamedTuple):
    """A scenario: its name, its area, and a cell for each set of records."""

    name: str
    area: str
    steps: int
    cells: list[Cell]


class Comparison(NamedTuple):
    """All scenarios of the expected records, by area."""

    expected: str
    labels: list[str]
    titles: list[str]
    rows: list[Row]

    @property
    def agreeing(self) -> list[int]:
        """Count for each set of records the scenarios that were recorded and agree."""
        return [sum(row.cells[at].verdict == "agrees" for row in self.rows) for at in range(len(self.titles))]

    @property
    def differing(self) -> int:
        """Count the cells with differences."""
        return sum(bool(cell.differences) for row in self.rows for cell in row.cells)


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
    areas: dict[str, list[Row]] = {}
    for row in comparison.rows:
        areas.setdefault(row.area, []).append(row)
    return environment.from_string(template).render(comparison=comparison, areas=areas)
