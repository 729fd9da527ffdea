"""Descriptors. Every KVM file is a memfd: a real descriptor that can be polled, duplicated and passed on, whose inode
says which object it stands for. Lifetimes are the kernel's: an object lives while a descriptor or a mapping of its file
lives, in this process, in another, or on the way to one; and what it refers to lives with it.

Which descriptor is which file is known in ``engine/files.c``, which KVM_RUN asks without the interpreter. Here is what
the files are.
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from typing import Final

from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.file_size import set_file_size
from anykvm.backends.soft.run import reap_with
from anykvm.backends.soft.upcall import in_device_fault
from anykvm.host.atomic import atomically_or_here
from anykvm.host.libc import map_shared

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_INT_MAX: Final = 2**31 - 1


class File:
    """What a descriptor stands for: struct file with its operations."""

    kind = "file"
    """As the kernel names it in /proc/self/fd."""
    mmap_size = 0
    """Bytes that can be mapped; 0: mmap() is ENODEV."""

    direct: frozenset[int] = frozenset()
    """Ioctls that change nothing, or one thing by one call into C: they need no worker to be atomic."""

    hidden_fd = -1
    """A descriptor of its inode that is the backend's own, and keeps nothing alive."""

    vcpu_address = 0
    """Of struct ak_vcpu, if KVM_RUN can be done on it."""

    def ioctl(self, request: int, arg: int) -> int:
        """Do an ioctl. Refused: what the file's operations say."""
        raise Refused(errno.ENOTTY)

    def map(self, fd: int, length: int, offset: int) -> int:
        """Map pages of ``mmap_size``; returns the address. Raises OSError as mmap(2)."""
        return map_shared(fd, length, offset)


class FileTable:
    """The KVM files of this process; one table, as there is one kernel."""

    def __init__(self) -> None:
        """An empty table."""
        self._files: dict[int, File] = {}  # by the number that engine/files.c gives them
        reap_with(partial(atomically_or_here, self.reap))

    def create(self, name: str, size: int) -> int:
        """Make a descriptor for a file to be: a memfd whose size nobody can change.

        Raises OSError: EMFILE, ENOMEM; Refused: as ``set_file_size``.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if size:
                set_file_size(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def map(self, fd: int, length: int, offset: int) -> int:
        """Map pages of a file for the backend itself: a mapping that does not keep the object alive.

        Returns the address. Raises OSError: EMFILE, ENOMEM.
        """
        address: int = library().ak_file_map(fd, length, offset)
        if address < 0:
            raise OSError(-address, os.strerror(-address))
        return address

    def install(self, fd: int, file: File) -> None:
        """Let the descriptor, and every duplicate of it, stand for ``file``. Raises OSError: ENOMEM, ENOLCK, EBADF."""
        serial: int = library().ak_file_add(fd, file.vcpu_address, file.hidden_fd)
        if serial < 0:
            raise OSError(-serial, os.strerror(-serial))
        self._files[serial] = file
        self.reap()

    def open(self, name: str, file: File) -> int:
        """Make a descriptor for ``file``, which has no pages. Raises OSError: EMFILE, ENOMEM."""
        fd = self.create(name, file.mmap_size)
        try:
            self.install(fd, file)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def find(self, fd: int) -> File | None:
        """Find what a descriptor stands for; None if it is not open, or no KVM file."""
        return self._files.get(self._serial(fd))

    def _serial(self, fd: int) -> int:
        serial: int = library().ak_file_find(fd) if 0 <= fd <= _INT_MAX else -errno.EBADF
        return serial

    def get(self, fd: int) -> File:
        """Find what a descriptor stands for. Refused: EBADF (not open), ENOTTY (open, but no KVM file)."""
        serial = self._serial(fd)
        file = self._files.get(serial)
        if file is not None:
            return file
        if serial:
            raise Refused(errno.EBADF)  # not open, or just closed by another thread
        raise Refused(errno.ENOTTY, f"descriptor {fd} is not a KVM file of the soft backend")

    def close(self, fd: int) -> None:
        """Close a descriptor; objects whose last descriptor is gone go with it. Refused: EBADF."""
        result: int = library().ak_file_close(fd) if 0 <= fd <= _INT_MAX else -errno.EBADF
        self.reap()
        if result:
            raise Refused(-result)

    def reap(self) -> None:
        """Let go of the files that are over, also those whose descriptors were closed behind our back.

        In a device's fault handler nothing goes: the end of an object may have to wait for the vCPU in whose fault we
        are. The next ``close``, ``install`` or KVM_RUN of another thread lets go of it.
        """
        if in_device_fault():
            return
        engine = library()
        while serial := engine.ak_file_dead():
            self._files.pop(serial, None)
            engine.ak_file_free(serial)

    def __len__(self) -> int:
        """How many files exist."""
        return len(self._files)


FILES: Final = FileTable()
"""The files of this process."""
