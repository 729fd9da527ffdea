"""Host memory for scenarios: mappings at addresses the scenario chooses, changed in every way mmap(2) allows."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from anykvm.host import libc
from anykvm.host.libc import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE

PAGE: Final = 4096
PROT_EXEC: Final = 4
READ_WRITE: Final = PROT_READ | PROT_WRITE
_MADV_NOHUGEPAGE: Final = 15


class Host:
    """A range of this process's addresses that a slot maps; what is behind them changes under the guest.

    Nothing is ever given back: a scenario runs in a process of its own, and an address that became someone else's
    mapping would make its results a matter of luck. Offsets and lengths are in bytes.

    >>> host = anonymous(2 * PAGE)
    >>> host.put64(8, 0x1234)
    >>> host.unmap(PAGE, PAGE)
    >>> hex(host.get64(8))
    '0x1234'
    """

    def __init__(self, address: int, size: int) -> None:
        """Speak of ``size`` bytes at ``address``, whatever is mapped there."""
        self.address = address
        self.size = size

    def put(self, offset: int, data: bytes) -> None:
        """Write bytes. Raises OSError (EFAULT) where the host cannot write."""
        libc.copy_in(self.address + offset, data)

    def get(self, offset: int, length: int) -> bytes:
        """Read bytes. Raises OSError (EFAULT) where the host cannot read."""
        return libc.copy_out(self.address + offset, length)

    def put64(self, offset: int, value: int) -> None:
        """Write 8 bytes, little endian."""
        self.put(offset, value.to_bytes(8, "little"))

    def get64(self, offset: int) -> int:
        """Read 8 bytes."""
        return int.from_bytes(self.get(offset, 8), "little")

    def get32(self, offset: int) -> int:
        """Read 4 bytes."""
        return int.from_bytes(self.get(offset, 4), "little")

    def unmap(self, offset: int = 0, length: int | None = None) -> None:
        """munmap: no mapping is left there."""
        libc.munmap(self.address + offset, self._length(length))

    def protect(self, prot: int, offset: int = 0, length: int | None = None) -> None:
        """mprotect."""
        libc.mprotect(self.address + offset, self._length(length), prot)

    def fix(self, offset: int = 0, length: int | None = None) -> None:
        """Map fresh zeroed memory there, over whatever is there."""
        address, length = self.address + offset, self._length(length)
        libc.mmap(address, length, READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
        _no_huge_pages(address, length)

    def map_file(self, fd: int, offset: int = 0, length: int | None = None, prot: int = READ_WRITE) -> None:
        """Map a file's first bytes there, shared, over whatever is there."""
        libc.mmap(self.address + offset, self._length(length), prot, MAP_SHARED | MAP_FIXED, fd)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise. Raises OSError with its errno."""
        libc.madvise(self.address + offset, self._length(length), advice)

    def move_away(self, offset: int, length: int) -> None:
        """mremap the range to another address: no mapping is left there."""
        move(self.address + offset, anonymous(length).address, length)

    def _length(self, length: int | None) -> int:
        return self.size if length is None else length


def anonymous(size: int, prot: int = READ_WRITE) -> Host:
    """Map fresh private memory, of small pages: which page is touched must not decide what its neighbours do."""
    address = libc.mmap(0, size, prot, MAP_PRIVATE | MAP_ANONYMOUS)
    _no_huge_pages(address, size)
    return Host(address, size)


def inaccessible(size: int) -> Host:
    """Map private memory that nothing may touch (PROT_NONE)."""
    return Host(libc.mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS), size)


def file_mapping(fd: int, size: int, prot: int = READ_WRITE, shared: bool = True, offset: int = 0) -> Host:
    """Map ``size`` bytes of a file; more than the file has is allowed. Raises OSError as mmap(2)."""
    return Host(libc.mmap(0, size, prot, MAP_SHARED if shared else MAP_PRIVATE, fd, offset), size)


def memfd(size: int) -> int:
    """Make a memory file of ``size`` bytes; returns its descriptor."""
    fd = os.memfd_create("conformance", 0)
    os.ftruncate(fd, size)
    return fd


def move(source: int, target: int, length: int) -> None:
    """mremap a range of addresses to another, over what is mapped there. Raises OSError with its errno."""
    libc.mremap(source, length, length, libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED, target)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2), as a step: returns 0. Raises OSError with its errno."""
    libc.fallocate(fd, mode, offset, length)
    return 0


def _no_huge_pages(address: int, size: int) -> None:
    with contextlib.suppress(OSError):  # EINVAL: this kernel has no transparent huge pages at all
        libc.madvise(address, size, _MADV_NOHUGEPAGE)
