"""Compare one set of records with others, scenario by scenario; as a table of values, and as one HTML page."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from anykvm.conformance.compare import Difference
from anykvm.conformance.known import judge, known
from anykvm.conformance.records_of import Records
from anykvm.conformance.scenario import load


class Cell(NamedTuple):
    """One scenario of one set of records, beside the expected one."""

    recorded: bool
    steps: int
    differences: list[Difference]
    """Those that nobody has explained."""
    known: list[tuple[Difference, str]]
    """The others, each with its reason."""

    @property
    def verdict(self) -> str:
        """Say it in a few words.

        >>> Cell(True, 3, [], []).verdict, Cell(False, 0, [], []).verdict
        ('agrees', 'not recorded')
        >>> Cell(True, 3, [], [(Difference("x", "a", "rax", 1, 2), "why")]).verdict
        '1 known'
        """
        if not self.recorded:
            return "not recorded"
        count = len(self.differences)
        said = [f"{count} difference{'s' if count != 1 else ''}"] if count else []
        said += [f"{len(self.known)} known"] if self.known else []
        return ", ".join(said) or "agrees"

    @property
    def kind(self) -> str:
        """Say whether it is to worry about: ``differs``, ``known``, ``agrees``, or ``none`` for not recorded."""
        if not self.recorded:
            return "none"
        return "differs" if self.differences else "known" if self.known else "agrees"


class Shown(NamedTuple):
    """What one set of records has in a field: text, and the ``kind`` of it as ``Cell.kind``."""

    kind: str
    text: str
    reason: str = ""


class Line(NamedTuple):
    """A field in which a set of records is not the expected one, and what each set has there."""

    step: str
    field: str
    expected: object
    got: list[Shown]

    @property
    def reasons(self) -> list[str]:
        """List why, each reason once."""
        return list(dict.fromkeys(shown.reason for shown in self.got if shown.reason))


class Row(NamedTuple):
    """A scenario: its name, its area, and a cell for each set of records."""

    name: str
    area: str
    steps: int
    cells: list[Cell]

    @property
    def differs(self) -> bool:
        """Whether any set of records has a difference, known or not."""
        return any(cell.differences or cell.known for cell in self.cells)

    @property
    def settled(self) -> bool:
        """Whether every set of records has it, and agrees."""
        return all(cell.kind == "agrees" for cell in self.cells)

    @property
    def lines(self) -> list[Line]:
        """Lay the differences of all sets of records side by side, those nobody has explained first."""
        empty = [Shown("agrees", "same") if cell.recorded else Shown("none", "not recorded") for cell in self.cells]
        lines: dict[tuple[str, str], Line] = {}
        found = [(at, difference, "") for at, cell in enumerate(self.cells) for difference in cell.differences]
        found += [(at, difference, reason) for at, cell in enumerate(self.cells) for difference, reason in cell.known]
        for at, difference, reason in found:
            fresh = Line(difference.step, difference.field, difference.expected, list(empty))
            line = lines.setdefault((difference.step, difference.field), fresh)
            line.got[at] = Shown("known" if reason else "differs", str(difference.got), reason)
        return list(lines.values())


class Tally(NamedTuple):
    """How many scenarios of one set of records there are of each kind."""

    agrees: int
    known: int
    differs: int
    none: int

    @property
    def kind(self) -> str:
        """Give the kind of the worst of them, as ``Cell.kind``."""
        return "differs" if self.differs else "none" if self.none else "known" if self.known else "agrees"

    @property
    def text(self) -> str:
        """Say it, leaving out what is 0.

        >>> Tally(10, 0, 0, 0).text, Tally(7, 2, 1, 1).text
        ('10 of 10', '7 of 11, 2 known, 1 differs, 1 not recorded')
        """
        parts = [f"{self.agrees} of {sum(self)}"]
        parts += [f"{self.known} known"] if self.known else []
        parts += [f"{self.differs} differ{'s' if self.differs == 1 else ''}"] if self.differs else []
        parts += [f"{self.none} not recorded"] if self.none else []
        return ", ".join(parts)


class Area(NamedTuple):
    """The scenarios of one area."""

    name: str
    rows: list[Row]

    @property
    def tallies(self) -> list[Tally]:
        """Count for each set of records."""
        return tallies(self.rows)


class Comparison(NamedTuple):
    """All scenarios of the expected records, by area."""

    expected: str
    labels: list[str]
    titles: list[str]
    rows: list[Row]

    @property
    def tallies(self) -> list[Tally]:
        """Count for each set of records."""
        return tallies(self.rows) or [Tally(0, 0, 0, 0)] * len(self.titles)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """List the reasons of known differences, and how many scenarios each is about, the most frequent first."""
        counted = Counter(
            reason for row in self.rows for reason in {reason for cell in row.cells for _, reason in cell.known}
        )
        return counted.most_common()

    @property
    def areas(self) -> list[Area]:
        """Group the scenarios."""
        areas: dict[str, list[Row]] = {}
        for row in self.rows:
            areas.setdefault(row.area, []).append(row)
        return [Area(name, rows) for name, rows in areas.items()]

    @property
    def differing(self) -> int:
        """Count the cells with differences that nobody has explained."""
        return sum(bool(cell.differences) for row in self.rows for cell in row.cells)


def tallies(rows: list[Row]) -> list[Tally]:
    """Count for each set of records the scenarios of each kind."""
    columns = zip(*(row.cells for row in rows), strict=True)
    return [Tally(*(sum(cell.kind == kind for cell in column) for kind in Tally._fields)) for column in columns]


def compare(expected: Records, others: list[Records], names: list[str] | None = None) -> Comparison:
    """Compare records with the expected ones, for ``names`` (default: every expected scenario)."""
    scenarios = load()
    rows = []
    for name, records in expected.scenarios.items():
        if names is None or name in names:
            area = scenarios[name].area if name in scenarios else "unknown"
            cells = [_cell(name, expected, other) for other in others]
            rows.append(Row(name, area, len(records), cells))
    rows.sort(key=lambda row: row.area)
    return Comparison(expected.title, [o.label or o.title for o in others], [o.title for o in others], rows)


def _cell(name: str, expected: Records, other: Records) -> Cell:
    got = other.scenarios.get(name)
    if got is None:
        return Cell(False, 0, [], [])
    unknown, explained = judge(name, expected.scenarios[name], got, known(expected.label, other.of, name))
    return Cell(True, len(got), unknown, explained)


def html(comparison: Comparison) -> str:
    """Make a page of a comparison that needs nothing else."""
    template = (files("anykvm.conformance") / "templates" / "report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(comparison=comparison)
