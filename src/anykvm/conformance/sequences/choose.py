"""Choices that depend on a seed and on nothing else: the same in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Choose:
    """A source of choices. Only ``Random.random`` is used: it alone is promised to give the same numbers for ever.

    >>> choose = Choose(7)
    >>> choose.below(100), choose.of("abc"), choose.chance(0.5)
    (32, 'a', False)
    """

    def __init__(self, seed: int) -> None:
        """Begin with a seed."""
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """Choose a number from 0 to ``limit`` - 1."""
        return int(self._random() * limit)

    def between(self, first: int, last: int) -> int:
        """Choose a number, both ends included."""
        return first + self.below(last - first + 1)

    def chance(self, probability: float) -> bool:
        """Say yes this often."""
        return self._random() < probability

    def of(self, things: Sequence[_T]) -> _T:
        """Choose one of them."""
        return things[self.below(len(things))]

    def weighted(self, weights: Mapping[_T, float]) -> _T:
        """Choose a key by its weight."""
        left = self._random() * sum(weights.values())
        for thing, weight in weights.items():
            left -= weight
            if left < 0:
                return thing
        return thing

    def bits(self, count: int) -> int:
        """Choose any number of so many bits."""
        value = 0
        for _ in range(-(-count // 16)):
            value = value << 16 | self.below(1 << 16)
        return value & (1 << count) - 1
