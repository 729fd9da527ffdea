"""Plain system calls on /dev/kvm."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from anykvm.abi.names import ioctl_error
from anykvm.host import libc

# fcntl.ioctl() takes no address; ctypes does, releases the GIL around the call, and keeps errno apart from Python's.
_ioctl: Final = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_ioctl.restype = ctypes.c_int


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
        return libc.map_shared(fd, length, offset)

    def munmap(self, address: int, length: int) -> None:
        """Unmap; see ``Backend.munmap``."""
        libc.munmap(address, length)

    def close(self, fd: int) -> None:
        """Close; see ``Backend.close``."""
        os.close(fd)
