"""Plain system calls on /dev/kvm."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from anykvm.abi.names import ioctl_error

_PROT_READ_WRITE: Final = 3
_MAP_SHARED: Final = 1
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# fcntl.ioctl() takes no address; ctypes does, releases the GIL around the call, and keeps errno apart from Python's.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_ioctl: Final = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_ioctl.restype = ctypes.c_int
_mmap: Final = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p
_munmap: Final = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap.restype = ctypes.c_int


def _error(what: str) -> OSError:
    errno = ctypes.get_errno()
    return OSError(errno, f"{what}: {os.strerror(errno)}")


class DeviceBackend:
    """The kernel's KVM; implements ``anykvm.backends.base.Backend`` by one system call a method.

    It adds nothing: arguments go to the kernel as they are, so a wrong address in a structure is the kernel's EFAULT.

    >>> DeviceBackend(path="/nonexistent/kvm").open()
    Traceback (most recent call last):
    ...
    FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent/kvm'
    """

    name: Final = "device"
    profile: Final = "kernel"

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Use the KVM device at ``path``; it is opened by ``open()``, not before."""
        self.path = path

    def __repr__(self) -> str:
        """Show the path."""
        return f"DeviceBackend({self.path!r})"

    def open(self) -> int:
        """Open the device; see ``Backend.open``."""
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Do one ioctl; see ``Backend.ioctl``."""
        result: int = _ioctl(fd, request, arg)
        if result < 0:
            raise ioctl_error(ctypes.get_errno(), request)
        return result

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Map pages of a descriptor; see ``Backend.mmap``."""
        address: int | None = _mmap(None, length, _PROT_READ_WRITE, _MAP_SHARED, fd, offset)
        if address is None or address == _MAP_FAILED:
            raise _error(f"mmap(fd={fd}, length={length:#x}, offset={offset:#x})")
        return address

    def munmap(self, address: int, length: int) -> None:
        """Unmap; see ``Backend.munmap``."""
        if _munmap(address, length) < 0:
            raise _error(f"munmap({address:#x}, {length:#x})")

    def close(self, fd: int) -> None:
        """Close; see ``Backend.close``."""
        os.close(fd)
