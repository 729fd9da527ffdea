"""``python -m stress``: the stress test for as long as one likes, with its progress shown."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from stress.world import Report, World

ROUND = 30.0
"""Seconds of one world, before the next seed's."""


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long, in total (300)")
    parser.add_argument("--seed", type=int, default=1, help="of the first world (1)")
    parser.add_argument("--only", choices=("bitmaps", "rings"), help="one kind of world; else in turn")
    return parser.parse_args()


def show(kind: str, seed: int, report: Report) -> None:
    """One line, over the last one; in a log, only the last."""
    if not sys.stderr.isatty() and report.audited == 0:
        return
    print(f"\r{kind}, seed {seed}: {report.seconds:.0f} s, {summary(report)}", end="", file=sys.stderr, flush=True)


def summary(report: Report) -> str:
    """What happened, in short."""
    changes, exits = report.changes.total(), report.exits
    return (
        f"{changes} changes, {report.checked} values judged, {report.written} written,"
        f" {exits['MemoryFault']} memory faults, {exits['Mmio']} device accesses"
    )


def listing(counts: Counter[str]) -> str:
    """All of them, most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def main() -> int:
    """Run it; 1 if something was wrong."""
    given = arguments()
    total, seed, left = Report(0.0), given.seed, given.seconds
    kinds = (given.only,) if given.only else ("bitmaps", "rings")
    while left > 0:
        kind = kinds[(seed - given.seed) % len(kinds)]
        try:
            with World(seed, rings=kind == "rings") as world:
                report = world.run(min(left, ROUND), lambda report: show(kind, seed, report))  # noqa: B023
        except (AssertionError, OSError) as error:
            print(f"\nstress: WRONG in {kind}, seed {seed}: {error}")
            return 1
        show(kind, seed, report)
        print(file=sys.stderr)
        total.add(report)
        left -= report.seconds
        seed += 1
    print(f"changes: {listing(total.changes)}")
    print(f"exits: {listing(total.exits)}")
    if total.missing:
        print(f"NOT TESTED: {total.missing}")
    audit = f"{total.audited} words and {total.counted} increments audited"
    print(f"stress: nothing wrong in {total.seconds:.0f} s: {summary(total)}; {audit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
