"""Pages mapped from a descriptor of a backend, unmapped when nothing refers to them any more."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from anykvm.host.atomic import Finalizer, atomically_or_here

if TYPE_CHECKING:
    from anykvm.backends.base import Backend


def map_pages(backend: Backend, fd: int, length: int, offset: int = 0) -> ctypes.Array[ctypes.c_uint8]:
    """Map pages and give them as a ctypes array; make views of it with ``memoryview`` or ``from_buffer``.

    The pages are unmapped when the array and every view of it are gone: a view that a caller kept can then never point
    at memory that is no longer there.
    Raises OSError as ``Backend.mmap``.
    """
    return atomically_or_here(_map_pages, backend, fd, length, offset)


def _map_pages(backend: Backend, fd: int, length: int, offset: int) -> ctypes.Array[ctypes.c_uint8]:
    address = backend.mmap(fd, length, offset)
    # A class of its own, because only such a one takes weak references.
    kind: Any = type("Pages", (ctypes.c_uint8 * length,), {})
    pages: ctypes.Array[ctypes.c_uint8] = kind.from_address(address)
    Finalizer(pages, backend.munmap, address, length)
    return pages
