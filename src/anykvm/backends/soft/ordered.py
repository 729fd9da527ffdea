"""A sorted set of integers, in chunks: adding one among ten thousand moves a few hundred, not all of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import Final

CHUNK: Final = 512
"""A chunk is split in two when it has grown to so many."""


class SortedNumbers:
    """Integers in order; none twice.

    >>> numbers = SortedNumbers()
    >>> for number in (30, 10, 20):
    ...     numbers.add(number)
    >>> numbers.at_or_below(25), numbers.at_or_below(20), numbers.at_or_below(9)
    (20, 20, None)
    >>> numbers.remove(20)
    >>> numbers.at_or_below(25)
    10
    """

    def __init__(self) -> None:
        """None."""
        self._chunks: list[list[int]] = []  # none is empty
        self._firsts: list[int] = []  # of each chunk

    def at_or_below(self, number: int) -> int | None:
        """Find the largest that is not above ``number``."""
        at = bisect_right(self._firsts, number) - 1
        if at < 0:
            return None
        chunk = self._chunks[at]
        return chunk[bisect_right(chunk, number) - 1]

    def add(self, number: int) -> None:
        """Put in a number that is not there. After a MemoryError the set is to be made anew."""
        if not self._chunks:
            self._chunks.append([])
            self._firsts.append(number)
        at = max(bisect_right(self._firsts, number) - 1, 0)
        chunk = self._chunks[at]
        insort(chunk, number)
        self._firsts[at] = chunk[0]
        if len(chunk) >= CHUNK:
            self._chunks[at : at + 1] = [chunk[: CHUNK // 2], chunk[CHUNK // 2 :]]
            self._firsts.insert(at + 1, chunk[CHUNK // 2])

    def remove(self, number: int) -> None:
        """Take out a number that is there."""
        at = bisect_right(self._firsts, number) - 1
        chunk = self._chunks[at]
        del chunk[bisect_left(chunk, number)]
        if chunk:
            self._firsts[at] = chunk[0]
        else:
            del self._chunks[at], self._firsts[at]
