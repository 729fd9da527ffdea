"""The bases of all structures of the ABI: ctypes' own, but with no attributes beside the kernel's members."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Never


class Structure(ctypes.Structure):
    """A structure. A name that is none of its members is an AttributeError: a misspelt register is not lost in silence.

    It can be copied and pickled, as any ctypes structure without pointers.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        # ctypes' own lets any name be set; with this a type checker refuses it too.
        def __setattr__(self, name: str, value: Never, /) -> None:
            """Refuse what is not declared."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle by the bytes. ctypes' own way needs the ``__dict__`` that there is not."""
        return _restored, (type(self), bytes(self))


class Union(ctypes.Union):
    """A union, as ``Structure``."""

    __slots__ = ()

    if TYPE_CHECKING:
        # ctypes' own lets any name be set; with this a type checker refuses it too.
        def __setattr__(self, name: str, value: Never, /) -> None:
            """Refuse what is not declared."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """As ``Structure.__reduce__``."""
        return _restored, (type(self), bytes(self))


def _restored(kind: type[Structure | Union], data: bytes) -> Structure | Union:
    return kind.from_buffer_copy(data)
