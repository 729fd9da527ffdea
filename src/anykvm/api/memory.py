"""GuestMemory: host memory for a guest, and the page games a VMM plays with it."""

from __future__ import annotations

import ctypes
import errno as _errno
from typing import Any, Final

from anykvm.host import libc
from anykvm.host.atomic import Finalizer, atomically_or_here
from anykvm.host.closing import Closing
from anykvm.host.libc import PROT_READ, PROT_WRITE
from anykvm.host.ranges import PAGE_SIZE, check_bytes, check_pages, check_size

READ_WRITE: Final = PROT_READ | PROT_WRITE


class GuestMemory(Closing):
    """``size`` bytes of host memory: anonymous and shared, or a file's; to be put into a VM with ``Vm.map``.

    The bytes are read and written by slices, bounds checked. An access to a page that the host cannot serve (unmapped,
    protected, beyond the end of the file) raises OSError with EFAULT, it does not crash. The mapping goes when it is
    closed or dropped; a VM keeps the memory in its slots.

    >>> with GuestMemory(8192) as memory:
    ...     memory[0:5] = b"hello"
    ...     memory.protect(4096, 4096, 0)
    ...     memory[0:5], memory[0]
    (b'hello', 104)
    """

    def __init__(
        self,
        size: int,
        *,
        fd: int | None = None,
        offset: int = 0,
        shared: bool = True,
        prot: int = READ_WRITE,
        hint: int = 0,
    ) -> None:
        """Map ``size`` bytes, or as many of file ``fd`` from ``offset`` on; the descriptor may be closed afterwards.

        ``shared`` False gives a private mapping: writes do not reach the file. ``hint``, if given, is the address where
        the host is to put it if it can. Raises ValueError for a size that is 0 or not page aligned; OSError as mmap(2).
        """
        check_size(size)
        self._size = size
        self._shared = shared
        flags = _flags(shared, fd) | libc.MAP_NORESERVE
        self._holes = bytearray()  # one byte a page, 1 where unmap() gave the address range back; made when needed
        self._bytes: ctypes.Array[ctypes.c_uint8] | None = None
        atomically_or_here(self._make, hint, prot, flags, -1 if fd is None else fd, offset)

    def _make(self, hint: int, prot: int, flags: int, fd: int, offset: int) -> None:
        self._address = libc.mmap(hint, self._size, prot, flags, fd, offset)
        # The mapping lives until this and all views are gone: a view must never point at memory of someone else.
        kind: Any = type("Memory", (ctypes.c_uint8 * self._size,), {})
        self._bytes = kind.from_address(self._address)
        Finalizer(self._bytes, _unmap_all, self._address, self._size, self._holes)

    @property
    def address(self) -> int:
        """Host virtual address of the first byte; what ``userspace_addr`` wants. Raises ValueError when closed."""
        self._check_open()
        return self._address

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def view(self) -> memoryview:
        """All of it as a memoryview, fast and unchecked: touching a page that is not there kills the process."""
        self._check_open()
        return memoryview(self._bytes).cast("B")  # type: ignore[arg-type]

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out. Raises IndexError out of bounds, OSError (EFAULT) where the host cannot read."""
        self._check(offset, length)
        self._check_holes(offset, length)
        return libc.copy_out(self._address + offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes in. Raises IndexError out of bounds, OSError (EFAULT) where the host cannot write."""
        length = len(data) if not isinstance(data, memoryview) else data.nbytes
        self._check(offset, length)
        self._check_holes(offset, length)
        libc.copy_in(self._address + offset, data)

    def __getitem__(self, key: int | slice) -> bytes | int:
        """Read a slice as bytes, or one byte as an integer."""
        if isinstance(key, int):
            return self.read(key, 1)[0]
        start, length = self._range(key)
        return self.read(start, length)

    def __setitem__(self, key: int | slice, value: int | bytes | bytearray | memoryview) -> None:
        """Write a slice (of exactly its length), or one byte."""
        if isinstance(key, int):
            self.write(key, bytes((value,)) if isinstance(value, int) else value)
            return
        if isinstance(value, int):
            raise TypeError("a slice takes bytes")
        start, length = self._range(key)
        if len(value) != length:
            raise ValueError(f"{len(value)} bytes given to a slice of {length}")
        self.write(start, value)

    def __len__(self) -> int:
        """Give the size in bytes."""
        return self._size

    def protect(self, offset: int, length: int, prot: int) -> None:
        """mprotect a page range: 0, PROT_READ or both. The guest's next access is decided by it.

        Raises IndexError out of bounds, ValueError unaligned, OSError (ENOMEM) for pages that were unmapped.
        """
        self._pages(offset, length)
        self._check_holes(offset, length, _errno.ENOMEM)
        libc.mprotect(self._address + offset, length, prot)

    def discard(self, offset: int, length: int) -> None:
        """Throw the contents of a page range away: the next access finds zeros, or the file's bytes if private.

        A shared mapping loses its backing too (MADV_REMOVE): a file gets a hole there.
        Raises as ``protect``; EOPNOTSUPP for a file system without holes.
        """
        self._pages(offset, length)
        self._check_holes(offset, length, _errno.ENOMEM)
        libc.madvise(self._address + offset, length, libc.MADV_REMOVE if self._shared else libc.MADV_DONTNEED)

    def unmap(self, offset: int, length: int) -> None:
        """Munmap a page range: a guest access there is then a fault.

        The addresses are free for any mmap of the process from then on, and what lands there the guest can reach.
        ``protect(offset, length, 0)`` faults as well and keeps them. Raises as ``protect``.
        """
        first, last = self._pages(offset, length)
        if not self._holes:
            self._holes.extend(bytes(self._size // PAGE_SIZE))
        for begin, end in _runs(self._holes, first, last, 0):
            libc.munmap(self._address + begin * PAGE_SIZE, (end - begin) * PAGE_SIZE)
        self._holes[first:last] = b"\1" * (last - first)

    def map(
        self,
        offset: int,
        length: int,
        prot: int = READ_WRITE,
        *,
        fd: int | None = None,
        fd_offset: int = 0,
        shared: bool | None = None,
    ) -> None:
        """Put new memory at a page range: fresh zeros, or a file's bytes; whether it was unmapped before or not.

        Raises as ``protect``; OSError (EEXIST) if something else has come to use addresses that were unmapped.
        """
        first, last = self._pages(offset, length)
        flags = _flags(self._shared if shared is None else shared, fd) | libc.MAP_NORESERVE
        for hole in (0, 1) if self._holes else (0,):
            how = flags | (libc.MAP_FIXED_NOREPLACE if hole else libc.MAP_FIXED)
            for begin, end in _runs(self._holes, first, last, hole) if self._holes else ((first, last),):
                start = fd_offset + (begin - first) * PAGE_SIZE
                address = self._address + begin * PAGE_SIZE
                libc.mmap(address, (end - begin) * PAGE_SIZE, prot, how, -1 if fd is None else fd, start)
        if self._holes:
            self._holes[first:last] = bytes(last - first)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._bytes is None

    def close(self) -> None:
        """Unmap all of it, once no view of it is left. A guest that still has it in a slot faults. Idempotent."""
        self._bytes = None

    def _check_open(self) -> None:
        if self._bytes is None:
            raise ValueError("this GuestMemory is closed")

    def _check(self, offset: int, length: int) -> None:
        self._check_open()
        check_bytes(offset, length, self._size)

    def _check_holes(self, offset: int, length: int, errno: int = _errno.EFAULT) -> None:
        # An unmapped range may hold someone else's memory by now: it is not ours to touch.
        if self._holes and length:
            page = self._holes.find(1, offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1)
            if page >= 0:
                raise OSError(errno, f"offset {page * PAGE_SIZE:#x} is unmapped")

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        self._check_open()
        check_pages(offset, length, self._size, empty=False)
        return offset // PAGE_SIZE, (offset + length) // PAGE_SIZE

    def _range(self, key: slice) -> tuple[int, int]:
        # Unlike a bytearray's, a slice that reaches out of bounds is an error: a guest image must not be cut silently.
        if key.step not in (None, 1):
            raise ValueError("slices have no step")
        start = 0 if key.start is None else key.start
        stop = self._size if key.stop is None else key.stop
        return start, stop - start

    def __repr__(self) -> str:
        """Show where it is."""
        return f"<GuestMemory {'closed' if self.closed else f'at {self._address:#x}'}, {self._size:#x} bytes>"


def _flags(shared: bool, fd: int | None) -> int:
    return (libc.MAP_SHARED if shared else libc.MAP_PRIVATE) | (libc.MAP_ANONYMOUS if fd is None else 0)


def _runs(holes: bytearray, first: int, last: int, value: int) -> list[tuple[int, int]]:
    """Find the runs of pages in [first, last) that are (1) or are not (0) holes."""
    runs = []
    while (begin := holes.find(value, first, last)) >= 0:
        end = holes.find(1 - value, begin, last)
        first = last if end < 0 else end
        runs.append((begin, first))
    return runs


def _unmap_all(address: int, size: int, holes: bytearray) -> None:
    for begin, end in _runs(holes, 0, len(holes), 0) if holes else ((0, size // PAGE_SIZE),):
        libc.munmap(address + begin * PAGE_SIZE, (end - begin) * PAGE_SIZE)
