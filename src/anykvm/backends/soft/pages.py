"""Shared mappings of a vCPU's pages. Python's own ``mmap`` keeps a duplicate of the descriptor, which would count."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_PROT_READ_WRITE: Final = 3
_MAP_SHARED: Final = 1
_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_mmap: Final = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p
_munmap: Final = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap.restype = ctypes.c_int


def map_shared(fd: int, length: int, offset: int) -> int:
    """Map a file read-write and shared; returns the address. Raises OSError with mmap(2)'s errno."""
    address: int | None = _mmap(None, length, _PROT_READ_WRITE, _MAP_SHARED, fd, offset)
    if address is None or address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap(fd={fd}, length={length:#x}, offset={offset:#x}): {os.strerror(code)}")
    return address


def unmap(address: int, length: int) -> None:
    """Undo ``map_shared``. Raises OSError with munmap(2)'s errno."""
    if _munmap(address, length):
        code = ctypes.get_errno()
        raise OSError(code, f"munmap({address:#x}, {length:#x}): {os.strerror(code)}")
