"""Breadth-first search: the shortest trace for each way in which something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from anykvm.explorer.moves import Game, Step, moves
from anykvm.explorer.properties import Property, Violation
from anykvm.explorer.state import World

DEPTH: Final = 16
"""Moves a trace may have, unless said otherwise. Each search of the table ends earlier, with all states seen."""


@dataclass(frozen=True)
class Walk:
    """Moves from a new vCPU on."""

    game: Game
    steps: tuple[Step, ...]

    @property
    def length(self) -> int:
        """Moves."""
        return len(self.steps)


@dataclass(frozen=True)
class Trace(Walk):
    """A walk that ends with a violation."""

    violation: Violation


@dataclass(frozen=True)
class Found:
    """What a search found."""

    game: Game
    depth: int
    states: int
    """Different states seen."""
    complete: bool
    """No state was left unexplored for the depth: what was not found cannot happen in the model at all."""
    traces: Mapping[Violation, Trace]
    """The shortest trace for each violation, shortest first."""

    def shortest(self, wanted: Property) -> Trace | None:
        """The shortest trace that violates a property; None if there is none up to the depth."""
        return next((trace for violation, trace in self.traces.items() if violation.property is wanted), None)


_Parents = dict[World, tuple[World, Step] | None]


def search(game: Game, depth: int = DEPTH) -> Found:
    """Visit every state that at most ``depth`` moves lead to. Deterministic: moves have an order.

    A violation ends its branch: what a VMM does afterwards follows from a mistake.
    """
    start = World()
    parents: _Parents = {start: None}
    traces: dict[Violation, Trace] = {}
    frontier, machine = [start], game.machine
    for _ in range(depth):
        following: list[World] = []
        for world in frontier:
            for step in moves(world, game, machine):
                if step.violations:
                    for violation in step.violations:
                        if violation not in traces:
                            traces[violation] = Trace(game, (*_path(parents, world), step), violation)
                elif step.world not in parents:
                    parents[step.world] = (world, step)
                    following.append(step.world)
        frontier = following
    return Found(game, depth, len(parents), not frontier, traces)


def walks(game: Game, depth: int = DEPTH) -> Iterator[Walk]:
    """Every move without a violation, after a shortest walk to where it is made; ``depth`` moves at most."""
    parents: _Parents = {World(): None}
    frontier, machine = [World()], game.machine
    for _ in range(depth):
        following: list[World] = []
        for world in frontier:
            for step in moves(world, game, machine):
                if step.violations:
                    continue
                yield Walk(game, (*_path(parents, world), step))
                if step.world not in parents:
                    parents[step.world] = (world, step)
                    following.append(step.world)
        frontier = following


def _path(parents: _Parents, world: World) -> tuple[Step, ...]:
    steps: list[Step] = []
    while (parent := parents[world]) is not None:
        world, step = parent
        steps.append(step)
    return tuple(reversed(steps))
