"""The table: for each policy and VMM rule, the shortest trace that violates each property, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from anykvm.explorer import words
from anykvm.explorer.arch import Arch
from anykvm.explorer.catalogue import ENTRIES, classify, named
from anykvm.explorer.moves import Game
from anykvm.explorer.policy import Policy
from anykvm.explorer.properties import Property
from anykvm.explorer.rules import Rule
from anykvm.explorer.search import Found, search


def searches(arch: Arch, policies: Iterable[Policy], rules: Sequence[Rule], depth: int) -> Iterator[Found]:
    """Search every game of an architecture, policy by policy."""
    for policy in policies:
        for rule in rules:
            yield search(Game(policy, rule, arch), depth)


def cell(found: Found, wanted: Property) -> str:
    """The traces for a property by name, each with its number of moves, the shortest first; a dash for none.

    >>> from anykvm.explorer import ARCHITECTURES, POLICIES, RULES
    >>> cell(search(Game(POLICIES["P3b"], RULES["deferring"], ARCHITECTURES["x86"])), Property.ACCESS_LOST)
    'T9f(3), T9(4)'
    """
    return summary((found,), wanted)


def summary(games: Iterable[Found], wanted: Property) -> str:
    """What any of these games has for a property, as ``cell`` gives it for one."""
    names: dict[str, int] = {}
    for found in games:
        for violation, trace in found.traces.items():
            if violation.property is wanted:
                name = classify(violation)
                names[name] = min(trace.length, names.get(name, trace.length))
    return _cell(names)


def _cell(names: Mapping[str, int]) -> str:
    ordered = sorted(names, key=lambda name: (names[name], list(ENTRIES).index(name)))
    return ", ".join(f"{name}({names[name]})" for name in ordered) or "-"


def extent(found: Found) -> str:
    """How far a search went."""
    return f"{'all' if found.complete else f'depth {found.depth},'} {found.states} states"


def line(found: Found) -> str:
    """One game in a line."""
    cells = "; ".join(f"{wanted.value} {cell(found, wanted)}" for wanted in Property)
    return f"{found.game.arch.name} {found.game.policy.name} {found.game.rule.name}: {cells} ({extent(found)})"


def grid(found: Sequence[Found], wanted: Property) -> list[list[str]]:
    """One property for all games: a heading with the rules, then a row for each policy."""
    rules = list(dict.fromkeys(one.game.rule.name for one in found))
    rows: dict[str, list[str]] = {}
    for one in found:
        rows.setdefault(one.game.policy.name, [one.game.policy.name]).append(cell(one, wanted))
    return [[wanted.value, *rules], *rows.values()]


def architectures(found: Sequence[Found], wanted: Property) -> list[list[str]]:
    """One property for all architectures, whatever the VMM: a heading with their names, then a row for each policy."""
    archs = list(dict.fromkeys(one.game.arch for one in found))
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys(one.game.policy.name for one in found):
        of_policy = [one for one in found if one.game.policy.name == name]
        cells = [summary((one for one in of_policy if one.game.arch is arch), wanted) for arch in archs]
        rows[name] = [name, *cells]
    return [[wanted.value, *(", ".join(arch.members) for arch in archs)], *rows.values()]


def plain(found: Found) -> dict[str, Any]:
    """Give one game as JSON has it."""
    return {
        "policy": found.game.policy.name,
        "rule": found.game.rule.name,
        "arch": found.game.arch.name,
        "depth": found.depth,
        "states": found.states,
        "complete": found.complete,
        "traces": [words.plain(trace) for trace in named(found).values()],
    }
