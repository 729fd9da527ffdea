"""Threads that change things: each has areas of its own, and chooses by a seed."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stress.area import Area
    from stress.world import World


class Updater:
    """Changes of some areas, one after another, until the world ends."""

    def __init__(self, world: World, areas: list[Area], seed: int) -> None:
        """Not running yet."""
        self.world = world
        self.random = random.Random(seed)
        self.changes = [change for area in areas for change in area.changes()]
        self.done = 0
        self.thread = threading.Thread(target=world.guarded, args=(self.run,))

    def run(self) -> None:
        """Change things."""
        weights, changes = zip(*self.changes, strict=True)
        while not self.world.over():
            for change in self.random.choices(changes, weights, k=16):
                change(self.random)
                self.done += 1
