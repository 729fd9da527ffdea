#!/usr/bin/env python3
"""Write the generated parts of docs/thread.md: tables and pictures of what `anykvm explore` finds.

A part is between `<!-- explore: WHAT -->` and `<!-- end -->`. WHAT is `table PROPERTY`, `arch PROPERTY`, `trace NAME`,
`policies`, `rules` or `replays`. With --check nothing is written, and the exit code says whether the file is as it
would be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from anykvm.explorer import ARCHITECTURES, DEPTH, ENTRIES, POLICIES, RULES, Property, named, trace
from anykvm.explorer.diagram import diagram
from anykvm.explorer.replay import replay_all
from anykvm.explorer.search import Found
from anykvm.explorer.table import cell, searches

FILE = Path(__file__).resolve().parent.parent / "docs" / "thread.md"
_PART = re.compile(r"(<!-- explore: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@cache
def games(arch: str) -> tuple[Found, ...]:
    """Every game of an architecture."""
    return tuple(searches(ARCHITECTURES[arch], POLICIES.values(), list(RULES.values()), DEPTH))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Give a table; the first row is its heading."""
    heading, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "|" + " --- |" * heading.count(" | ") + " --- |", *rest]) + "\n"


def table(wanted: str) -> str:
    """Policies by VMMs, on x86."""
    rows: dict[str, list[str]] = {}
    for found in games("x86"):
        rows.setdefault(found.game.policy.name, [found.game.policy.name]).append(cell(found, Property(wanted)))
    return markdown([["policy", *RULES], *rows.values()])


def arch(wanted: str) -> str:
    """Policies by architectures: what any VMM of the table meets there."""
    rows = []
    for policy in POLICIES:
        row = [policy]
        for name in ARCHITECTURES:
            names = _names(found for found in games(name) if found.game.policy.name == policy)
            row.append(", ".join(n for n in ENTRIES if (n, wanted) in names) or "-")
        rows.append(row)
    return markdown([["policy", *(", ".join(kind.members) for kind in ARCHITECTURES.values())], *rows])


def _names(games: Iterable[Found]) -> set[tuple[str, str]]:
    return {
        (name, wanted.value)
        for found in games
        for wanted in Property
        for name in re.findall(r"(\S+)\(", cell(found, wanted))
    }


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
    campaign = replay_all(games("x86"))
    rows = [["trace", "what goes wrong", "replayed as in the model"]]
    for name, entry in ENTRIES.items():
        done = campaign.replays.get(name, [])
        if done:
            said = f"{sum(one.agrees for _, one in done)} of {len(done)} different ones"
        else:
            said = f"no: {campaign.refused.get(name) or _elsewhere(name)}"
        rows.append([name, entry.title, said])
    return markdown(rows)


def _elsewhere(name: str) -> str:
    return replay_all(found for found in games(ENTRIES[name].arch) if name in named(found)).refused[name]


PARTS: dict[str, Callable[[str], str]] = {
    "table": table,
    "arch": arch,
    "trace": picture,
    "policies": policies,
    "rules": rules,
    "replays": replays,
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
