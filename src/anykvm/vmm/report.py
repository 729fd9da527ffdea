"""The report of a post-copy run: one HTML page with inline SVG, for light and dark, that needs nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from typing import Final, NamedTuple

from jinja2 import Environment, StrictUndefined

from anykvm.api import PAGE_SIZE
from anykvm.host.outfile import OutFile
from anykvm.vmm.postcopy import FILE_GPA, Result

_COLUMNS, _ROWS = 132, 66
_LEVELS: Final = 6
_BINS: Final = 60


class Tick(NamedTuple):
    """A mark on an axis: where, 0 to 1, and its label."""

    at: float
    label: str


class Level(NamedTuple):
    """One colour of the heat map: the range of counts it stands for, and its cells as an SVG path."""

    label: str
    path: str


class HeatMap(NamedTuple):
    """Faults by time and gpa, in units of cells: ``columns`` by ``rows``."""

    columns: int
    rows: int
    levels: list[Level]
    time: list[Tick]
    gpa: list[Tick]
    offset: list[Tick]
    """The same places as offsets in the file."""


class Histogram(NamedTuple):
    """Faults by latency; all numbers are fractions of the axes."""

    bars: list[tuple[float, float, float]]
    """x, width, height."""
    latency: list[Tick]
    faults: list[Tick]
    marks: list[Tick]
    """p50 and p99."""


def write_report(path: str, name: str, result: Result) -> None:
    """Write the page to ``path`` as ``OutFile`` does; ``name`` is the file's. Raises OSError."""
    with OutFile(path) as out:
        out.write(render(name, result).encode("utf-8", "backslashreplace"))


def render(name: str, result: Result) -> str:
    """Make the page's HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (files(__package__) / "templates" / "postcopy.html.j2").read_text("utf-8")
    some = bool(result.faults.page)
    return environment.from_string(source).render(
        name=name,
        result=result,
        faults=len(result.faults.page),
        p50=result.latency_us(0.5),
        p99=result.latency_us(0.99),
        heat=heat_map(result) if some else None,
        histogram=histogram(result) if some else None,
    )


def heat_map(result: Result) -> HeatMap:
    """Count the faults in cells of time and gpa, and sort the cells into colours."""
    rows = min(_ROWS, result.pages)
    counts: Counter[tuple[int, int]] = Counter()
    for page, time in zip(result.faults.page, result.faults.time_ns, strict=True):
        column = min(time * _COLUMNS // result.wall_ns, _COLUMNS - 1)
        counts[column, rows - 1 - page * rows // result.pages] += 1
    bounds = _bounds(max(counts.values()))
    paths: list[list[str]] = [[] for _ in bounds]
    for (column, row), count in sorted(counts.items()):
        index = next(index for index, (_, most) in enumerate(bounds) if count <= most)
        paths[index].append(f"M{column} {row}h1v1h-1z")
    levels = [
        Level(str(least) if least == most else f"{least}\N{EN DASH}{most}", "".join(cells))
        for (least, most), cells in zip(bounds, paths, strict=True)
    ]
    wall_ms = result.wall_ns / 1e6
    time_ticks = [Tick(value / wall_ms, f"{value:g}") for value in _round_steps(wall_ms, 8)]
    length = result.pages * PAGE_SIZE
    offsets = [(1 - offset / length, offset) for offset in range(0, length + 1, _step(length))]
    return HeatMap(
        _COLUMNS,
        rows,
        levels,
        time_ticks,
        [Tick(at, f"{FILE_GPA + offset:#x}") for at, offset in offsets],
        [Tick(at, _bytes(offset)) for at, offset in offsets],
    )


def histogram(result: Result) -> Histogram:
    """Count the faults by latency, on a logarithmic axis."""
    values = sorted(value / 1e3 for value in result.faults.latency_ns)
    low, high = math.log10(max(values[0], 0.01) * 0.9), math.log10(max(values[-1], 0.02) * 1.1)

    def place(value: float) -> float:
        return min(max((math.log10(max(value, 0.01)) - low) / (high - low), 0.0), 1.0)

    counts = Counter(min(int(place(value) * _BINS), _BINS - 1) for value in values)
    most = max(counts.values())
    bars = [(index / _BINS, 1 / _BINS, count / most) for index, count in sorted(counts.items())]
    decades = range(math.floor(low), math.ceil(high) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    inside = [value for value in marks if low <= math.log10(value) <= high]
    return Histogram(
        bars,
        [Tick(place(value), f"{value:,g}") for value in inside],
        [Tick(value / most, f"{value:,.0f}") for value in _round_steps(most, 5) if value == int(value)],
        [Tick(place(result.latency_us(q) or 0), f"p{q * 100:.0f} {result.latency_us(q):.1f} µs") for q in (0.5, 0.99)],
    )


def _bounds(most: int) -> list[tuple[int, int]]:
    """Divide the counts 1 to ``most`` into at most ``_LEVELS`` ranges, each some times as wide as the one before.

    >>> _bounds(3), _bounds(40)
    ([(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2), (3, 4), (5, 9), (10, 19), (20, 40)])
    """
    if most <= _LEVELS:
        return [(count, count) for count in range(1, most + 1)]
    ends = [max(round(most ** (index / (_LEVELS - 1))), index + 1) for index in range(_LEVELS)]
    starts = [1, *(end + 1 for end in ends[:-1])]
    return list(zip(starts, ends, strict=True))


def _round_steps(end: float, about: int) -> Iterable[float]:
    """Give round numbers from 0 to ``end``, about so many.

    >>> list(_round_steps(7, 4))
    [0.0, 2.0, 4.0, 6.0]
    """
    raw = end / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    return [round(index * step, 9) for index in range(int(end / step * 1.000001) + 1)]


def _step(length: int) -> int:
    """Give the distance between marks for so many bytes: a power of two, for at most nine marks."""
    step = PAGE_SIZE
    while length / step > 8:
        step *= 2
    return step


def _bytes(count: int) -> str:
    """Write a multiple of 4096 short.

    >>> _bytes(0), _bytes(12288), _bytes(48 << 20), _bytes(3 << 29)
    ('0', '12 KiB', '48 MiB', '1.5 GiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return str(count)
