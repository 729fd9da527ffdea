"""Threads that change things: each has areas of its own, and chooses by a seed.

Most changes make every vCPU look its pages up anew, and would hide that another one forgets to. So for a while
everything happens, and then for a while only one change, over and over, while guests access mostly what it changes.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from stress import board as b

if TYPE_CHECKING:
    from stress.area import Area, Change
    from stress.world import World

PHASE: Final = 0.03
"""Seconds."""


class Choice(NamedTuple):
    """A change that can happen, and how often."""

    area: Area
    change: Change
    often: int


class Phases:
    """What may happen now: everything, or one change alone."""

    def __init__(self, world: World, choices: list[Choice], seed: int) -> None:
        """Everything, at first."""
        self.world = world
        self.choices = choices
        self.random = random.Random(seed)
        self.only: Choice | None = None
        self.deck: list[Choice | None] = []
        self.condition = threading.Condition()
        self._guests()

    def next(self) -> None:
        """Begin another phase."""
        with self.condition:
            if not self.deck:
                self.deck = [*self.choices, *[None] * (len(self.choices) // 2)]
                self.random.shuffle(self.deck)
            self.only = self.deck.pop()
            self._guests()
            self.condition.notify_all()

    def _guests(self) -> None:
        picked: list[int] = b.spread({area.index: area.weight for area in self.world.areas}, 32)
        if self.only is not None:
            picked = [0] + [self.only.area.accessed] * 31
        self.world.board.put_bytes(b.PICK, bytes(picked))

    def wait(self, mine: list[Choice]) -> Choice | None:
        """Sleep while only others may do something; returns what alone may happen."""
        with self.condition:
            self.condition.wait_for(lambda: self.only is None or self.only in mine or self.world.over())
            return self.only


class Updater:
    """Changes of some areas, one after another, until the world ends."""

    def __init__(self, world: World, choices: list[Choice], seed: int) -> None:
        """Not running yet."""
        self.world = world
        self.random = random.Random(seed)
        self.choices = choices
        self.thread = threading.Thread(target=world.guarded, args=(self.run,))

    def run(self) -> None:
        """Change things."""
        often = [choice.often for choice in self.choices]
        while not self.world.over():
            only = self.world.phases.wait(self.choices)
            chosen = self.random.choices(self.choices, often, k=8) if only is None else [only] * 8
            for choice in chosen:
                if self.world.phases.only is only:
                    choice.change(self.random)
