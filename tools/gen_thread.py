#!/usr/bin/env python3
"""Write the generated parts of docs/thread.md: tables and pictures of what `anykvm explore` finds.

A part is between `<!-- explore: WHAT -->` and `<!-- end -->`. WHAT is `table PROPERTY`, `arch PROPERTY`, `trace NAME`,
`policies`, `rules`, `replays` or `extent`. With --check nothing is written, and the exit code says whether the file is
as it would be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from anykvm.explorer import ARCHITECTURES, DEPTH, ENTRIES, POLICIES, RULES, Property, trace
from anykvm.explorer.diagram import diagram
from anykvm.explorer.replay import replay_all
from anykvm.explorer.search import Found
from anykvm.explorer.table import architectures, grid, searches

FILE = Path(__file__).resolve().parent.parent / "docs" / "thread.md"
_PART = re.compile(r"(<!-- explore: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@cache
def games(arch: str) -> tuple[Found, ...]:
    """Every game of an architecture."""
    return tuple(searches(ARCHITECTURES[arch], POLICIES.values(), list(RULES.values()), DEPTH))


def everything() -> list[Found]:
    """Those of every architecture."""
    return [found for name in ARCHITECTURES for found in games(name)]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Give a table; the first row is its heading."""
    heading, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "|" + " --- |" * heading.count(" | ") + " --- |", *rest]) + "\n"


def table(wanted: str) -> str:
    """Policies by VMMs, on x86."""
    return markdown(grid(games("x86"), Property(wanted)))


def arch(wanted: str) -> str:
    """Policies by architectures: what any VMM of the table meets there."""
    return markdown(architectures(everything(), Property(wanted)))


def picture(name: str) -> str:
    """A trace."""
    return "\n".join(["```", *diagram(trace(name)), "```"]) + "\n"


def policies(_: str) -> str:
    """What the policies are."""
    rows = [[p.name, p.title, p.source, p.profile or "-"] for p in POLICIES.values()]
    return markdown([["policy", "what KVM does", "source", "profile of the soft backend"], *rows])


def rules(_: str) -> str:
    """What the VMMs are."""
    return markdown([["VMM", "what it does", "source"], *([r.name, r.title, r.source] for r in RULES.values())])


def replays(_: str) -> str:
    """What was performed on guests."""
    campaign = replay_all(everything())
    rows = [["trace", "what goes wrong", "replayed as in the model"]]
    for name, entry in ENTRIES.items():
        done = campaign.replays.get(name, [])
        if done:
            said = f"{sum(one.agrees for _, one in done)} of {len(done)} different ones"
        else:
            said = f"no: {campaign.refused[name]}"
        rows.append([name, entry.title, said])
    return markdown(rows)


def extent(_: str) -> str:
    """How much was searched."""
    found = everything()
    assert all(one.complete for one in found)
    longest = max(trace.length for one in found for trace in one.traces.values())
    states = sum(one.states for one in found)
    return f"{len(found)} searches saw {states} states. No trace needs more than {longest} moves.\n"


PARTS: dict[str, Callable[[str], str]] = {
    "table": table,
    "arch": arch,
    "trace": picture,
    "policies": policies,
    "rules": rules,
    "replays": replays,
    "extent": extent,
}


def generated(text: str) -> str:
    """Give the file with every part as it should be. Raises KeyError for an unknown part."""

    def part(found: re.Match[str]) -> str:
        kind, _, what = found[2].partition(" ")
        return f"{found[1]}{PARTS[kind](what)}{found[4]}"

    return _PART.sub(part, text)


def main(arguments: list[str]) -> int:
    """0; with --check 1 when the file is not up to date."""
    text = FILE.read_text()
    wanted = generated(text)
    if arguments == ["--check"]:
        return int(text != wanted)
    FILE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
