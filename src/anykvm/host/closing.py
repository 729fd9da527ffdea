"""Objects that are closed: by ``close``, or at the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """Base of what has a ``close``, and may be used in a ``with`` statement that calls it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what it stands for."""

    def __enter__(self) -> Self:
        """Give the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
