"""What a guest_memfd refuses: the errno, and the call by Python. Any Python can import this: nothing else is needed."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

PAGE = 4096

CALLS: dict[str, tuple[int, Callable[[int], object]]] = {
    "read": (errno.EINVAL, lambda fd: os.read(fd, 1)),
    "write": (errno.EINVAL, lambda fd: os.write(fd, b"x")),
    "readv": (errno.EINVAL, lambda fd: os.readv(fd, [bytearray(1)])),
    "writev": (errno.EINVAL, lambda fd: os.writev(fd, [b"x"])),
    "pread": (errno.ESPIPE, lambda fd: os.pread(fd, 1, 0)),
    "pwrite": (errno.ESPIPE, lambda fd: os.pwrite(fd, b"x", 0)),
    "preadv": (errno.ESPIPE, lambda fd: os.preadv(fd, [bytearray(1)], 0)),
    "pwritev": (errno.ESPIPE, lambda fd: os.pwritev(fd, [b"x"], 0)),
    "lseek": (errno.ESPIPE, lambda fd: os.lseek(fd, 0, os.SEEK_END)),
    "shrink": (errno.EINVAL, lambda fd: os.ftruncate(fd, PAGE)),
    "grow": (errno.EINVAL, lambda fd: os.ftruncate(fd, 16 * PAGE)),
    "fchmod": (errno.EINVAL, lambda fd: os.chmod(fd, 0o777)),
    "fchown": (errno.EINVAL, lambda fd: os.chown(fd, os.getuid(), os.getgid())),
    "futimens": (errno.EINVAL, lambda fd: os.utime(fd)),
    "fsync": (errno.EINVAL, os.fsync),
    "fdatasync": (errno.EINVAL, os.fdatasync),
    "mmap": (errno.ENODEV, lambda fd: mmap.mmap(fd, PAGE)),
    "posix_fallocate": (errno.ESPIPE, lambda fd: os.posix_fallocate(fd, 0, PAGE)),
}
