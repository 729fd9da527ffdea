"""copy_from_user() and copy_to_user(): the caller's memory, with EFAULT where it cannot be reached, never a crash.

They go upwards: when a page refuses, what is before it was copied, and nothing behind it.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TypeVar

from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused

_Data = TypeVar("_Data", bound=ctypes.Structure)


def read_into(data: ctypes.Structure | ctypes.Array[ctypes.c_uint8], address: int) -> None:
    """Fill ``data`` from the caller's memory. Refused: EFAULT."""
    size = ctypes.sizeof(data)
    if library().ak_copy_in(ctypes.addressof(data), address, size):
        raise Refused(errno.EFAULT, f"Bad address: cannot read {size} bytes at {address:#x}")


def copy_from_user(kind: type[_Data], address: int) -> _Data:
    """Read a structure from the caller's memory. Refused: EFAULT."""
    data = kind()
    read_into(data, address)
    return data


def bytes_from_user(address: int, size: int) -> ctypes.Array[ctypes.c_uint8]:
    """Read ``size`` bytes of the caller's memory into a new buffer. Refused: EFAULT."""
    data = (ctypes.c_uint8 * size)()
    read_into(data, address)
    return data


def copy_to_user(address: int, data: ctypes.Structure | ctypes.Array[ctypes.c_uint8], size: int | None = None) -> None:
    """Write a structure or buffer (or its first ``size`` bytes) to the caller's memory. Refused: EFAULT."""
    length = ctypes.sizeof(data) if size is None else size
    if library().ak_copy_out(address, ctypes.addressof(data), length):
        raise Refused(errno.EFAULT, f"Bad address: cannot write {length} bytes at {address:#x}")


def tail_of(data: ctypes.Array[ctypes.c_uint8], offset: int) -> ctypes.Array[ctypes.c_uint8]:
    """Give the bytes of a buffer from ``offset`` on, without copying them."""
    return (ctypes.c_uint8 * (ctypes.sizeof(data) - offset)).from_buffer(data, offset)
