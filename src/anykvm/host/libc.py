"""System calls on memory that Python's ``mmap`` module lacks: fixed addresses, plain mappings, and safe copies."""

from __future__ import annotations

import ctypes
import errno as _errno
import mmap as _pymmap
import os
from collections.abc import Callable
from typing import Any, Final

PROT_NONE: Final = 0
PROT_READ: Final = _pymmap.PROT_READ
PROT_WRITE: Final = _pymmap.PROT_WRITE
MAP_SHARED: Final = _pymmap.MAP_SHARED
MAP_PRIVATE: Final = _pymmap.MAP_PRIVATE
MAP_ANONYMOUS: Final = _pymmap.MAP_ANONYMOUS
MAP_NORESERVE: Final = 0x4000
MAP_FIXED: Final = 0x10
MAP_FIXED_NOREPLACE: Final = 0x100000
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2

_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_MMAP_TYPES: Final = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap: Final = _libc.mmap
_mmap.argtypes = _MMAP_TYPES
_mmap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.mremap.restype = ctypes.c_void_p


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_IOVEC = ctypes.POINTER(_Iovec)
_vm_types: Final = (ctypes.c_int, _IOVEC, ctypes.c_ulong, _IOVEC, ctypes.c_ulong, ctypes.c_ulong)
for _name in ("process_vm_readv", "process_vm_writev"):
    getattr(_libc, _name).argtypes = _vm_types
    getattr(_libc, _name).restype = ctypes.c_ssize_t
for _name in ("mprotect", "madvise"):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _fail(what: str) -> OSError:
    errno = ctypes.get_errno()
    return OSError(errno, f"{what}: {os.strerror(errno)}")


def _on_file(name: str, types: tuple[Any, ...], result: Any) -> Callable[..., Any]:
    """Look a function up anew: a backend may by now stand in front of it, for files of its own (guest_memfd)."""
    call = _libc[name]
    call.argtypes, call.restype = types, result
    return call


def mmap(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): returns the address. Raises OSError with mmap's errno."""
    call = _mmap if fd < 0 else _on_file("mmap", _MMAP_TYPES, ctypes.c_void_p)
    result: int | None = call(address or None, length, prot, flags, fd, offset)
    if result is None or result == _FAILED:
        raise _fail(f"mmap({address:#x}, {length:#x})")
    return result


def map_shared(fd: int, length: int, offset: int) -> int:
    """Map a file read-write and shared; returns the address. Raises OSError with mmap(2)'s errno.

    Python's ``mmap`` would keep a duplicate of the descriptor, which counts: what it stands for would never be over.
    It is the system's mmap: what the backends themselves map with, whatever one of them stands in front of.
    """
    result: int | None = _mmap(None, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)
    if result is None or result == _FAILED:
        raise _fail(f"mmap(fd={fd}, length={length:#x}, offset={offset:#x})")
    return result


def munmap(address: int, length: int) -> None:
    """munmap(2). Raises OSError with its errno."""
    if _libc.munmap(address, length):
        raise _fail(f"munmap({address:#x}, {length:#x})")


def mremap(address: int, old_length: int, length: int, flags: int, to: int = 0) -> int:
    """mremap(2): returns the new address. Raises OSError with its errno."""
    result: int | None = _libc.mremap(address, old_length, length, flags, to)
    if result is None or result == _FAILED:
        raise _fail(f"mremap({address:#x}, {old_length:#x}, {length:#x})")
    return result


def mprotect(address: int, length: int, prot: int) -> None:
    """mprotect(2). Raises OSError with its errno."""
    if _libc.mprotect(address, length, prot):
        raise _fail(f"mprotect({address:#x}, {length:#x}, {prot})")


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2). Raises OSError with its errno."""
    if _libc.madvise(address, length, advice):
        raise _fail(f"madvise({address:#x}, {length:#x}, {advice})")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python has without modes. Raises OSError with its errno."""
    call = _on_file("fallocate", (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64), ctypes.c_int)
    if call(fd, mode, offset, length):
        raise _fail(f"fallocate({fd}, {mode}, {offset:#x}, {length:#x})")


def copy_out(address: int, length: int) -> bytes:
    """Read this process's memory, with EFAULT instead of a crash where it cannot be read."""
    buffer = ctypes.create_string_buffer(length)
    _copy(_libc.process_vm_readv, ctypes.addressof(buffer), address, length)
    return buffer.raw


def copy_in(address: int, data: bytes | bytearray | memoryview) -> None:
    """Write this process's memory, with EFAULT instead of a crash where it cannot be written."""
    if not isinstance(data, bytes):
        data = bytes(data)
    local = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    _copy(_libc.process_vm_writev, local, address, len(data))


def _copy(call: object, local: int, remote: int, length: int) -> None:
    # process_vm_readv and _writev go through get_user_pages and so fail where a plain access would kill the process.
    done = 0
    while done < length:
        mine, theirs = _Iovec(local + done, length - done), _Iovec(remote + done, length - done)
        moved: int = call(os.getpid(), mine, 1, theirs, 1, 0)  # type: ignore[operator]
        if moved <= 0:
            errno = ctypes.get_errno() if moved < 0 else _errno.EFAULT
            raise OSError(errno, f"host memory at {remote + done:#x}: {os.strerror(errno)}")
        done += moved
