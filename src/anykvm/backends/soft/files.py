"""Descriptors. Every KVM file is a memfd: a real descriptor that can be polled, duplicated and passed on, whose inode
says which object it stands for. Lifetimes are the kernel's: an object lives while a descriptor of it lives in this
process, and what it refers to lives with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from typing import TYPE_CHECKING, Final

from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.file_size import set_file_size
from anykvm.backends.soft.upcall import in_device_fault
from anykvm.host.libc import map_shared

if TYPE_CHECKING:
    from anykvm.backends.soft.vcpu import VcpuFile

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_INT_MAX: Final = 2**31 - 1

_Inode = tuple[int, int]


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

    def ioctl(self, request: int, arg: int) -> int:
        """Do an ioctl. Refused: what the file's operations say."""
        raise Refused(errno.ENOTTY)

    def map(self, fd: int, length: int, offset: int) -> int:
        """Map pages of ``mmap_size``; returns the address. Raises OSError as mmap(2)."""
        return map_shared(fd, length, offset)

    def released(self) -> bool:
        """Say whether a file without descriptors is over; it may yet be mapped."""
        return True


class FileTable:
    """The KVM files of this process, by inode; one table, as there is one kernel."""

    def __init__(self) -> None:
        """An empty table."""
        self._files: dict[_Inode, File] = {}
        self.running: dict[int, VcpuFile] = {}
        """Descriptors that KVM_RUN was done on: all that its fast path looks at. An entry whose descriptor was closed
        by a close(2) past ``close`` stays until that number is used again here, or any KVM file is closed."""
        self._lock = threading.RLock()  # taken on workers only: see anykvm.host.atomic
        self._unswept = False  # a close in a device's fault handler left what it found to do to the next
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # another thread may have held it when this process was made

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

    def install(self, fd: int, file: File) -> None:
        """Let the descriptor, and every duplicate of it, stand for ``file``."""
        inode = _inode(fd)
        self.running.pop(fd, None)  # of a descriptor of this number that was closed behind our back
        with self._lock:
            self._files[inode] = file
        if self._unswept and not in_device_fault():
            self._sweep()

    def open(self, name: str, file: File) -> int:
        """Make a descriptor for ``file``, which has no pages. Raises OSError: EMFILE, ENOMEM."""
        fd = self.create(name, file.mmap_size)
        try:
            self.install(fd, file)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def get(self, fd: int) -> File:
        """Find what a descriptor stands for. Refused: EBADF (not open), ENOTTY (open, but no KVM file)."""
        file = self._files.get(_inode(fd))
        if file is None:
            raise Refused(errno.ENOTTY, f"descriptor {fd} is not a KVM file of the soft backend")
        return file

    def close(self, fd: int) -> None:
        """Close a descriptor; objects whose last descriptor is gone go with it. Refused: EBADF."""
        known = _inode(fd) in self._files
        self.running.pop(fd, None)
        os.close(fd)
        if in_device_fault():
            self._unswept |= known  # the end of an object may have to wait for the vCPU in whose fault we are
        elif known or self._unswept:
            self._sweep()

    def _sweep(self) -> None:
        """Forget files that have no descriptor any more, also those whose descriptors were closed behind our back."""
        self._unswept = False
        try:
            names = os.listdir("/proc/self/fd")
        except OSError:
            return  # no /proc: keep everything
        with self._lock:
            candidates = dict(self._files)
            hidden = {file.hidden_fd for file in candidates.values()}
            for name in names:
                try:
                    if int(name) not in hidden:
                        candidates.pop(_inode(int(name)), None)
                except Refused:
                    continue  # the descriptor of the listing itself, or one just closed by another thread
            candidates = {inode: file for inode, file in candidates.items() if file.released()}
            for inode in candidates:
                del self._files[inode]
            gone = {id(file) for file in candidates.values()}
            for fd in [fd for fd, file in self.running.items() if id(file) in gone]:
                del self.running[fd]
        candidates.clear()  # here, without the lock, the objects themselves go

    def __len__(self) -> int:
        """How many files exist."""
        return len(self._files)


def _inode(fd: int) -> _Inode:
    """Identify the file behind a descriptor. Refused: EBADF."""
    if not 0 <= fd <= _INT_MAX:
        raise Refused(errno.EBADF)
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise Refused(error.errno or errno.EBADF) from None
    return status.st_dev, status.st_ino


FILES: Final = FileTable()
"""The files of this process."""
