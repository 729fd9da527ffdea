"""SoftBackend: the waist's five methods over the objects of this package."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import suppress
from dataclasses import replace
from typing import Final

from anykvm.abi.ioctls import KVM_RUN
from anykvm.abi.names import ioctl_error
from anykvm.backends.soft import profiles
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.profiles import Profile
from anykvm.backends.soft.run import kvm_run
from anykvm.backends.soft.system import open_system
from anykvm.host.atomic import NoThread, atomically, atomically_or_here
from anykvm.host.libc import munmap
from anykvm.host.ranges import PAGE_SIZE

_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF
_KVM_RUN: Final = KVM_RUN


class SoftBackend:
    """KVM in user space; implements ``anykvm.backends.base.Backend``.

    Descriptors are the process's, not this object's: as with the kernel, any SoftBackend takes them.

    >>> backend = SoftBackend()
    >>> backend.name, backend.profile
    ('soft', 'documented')
    >>> fd = backend.open()
    >>> backend.ioctl(fd, 0xAE00)  # KVM_GET_API_VERSION
    12
    >>> backend.close(fd)
    """

    name: Final = "soft"

    def __init__(self, profile: str | Profile = profiles.DOCUMENTED, *, private_gpa_bit: int | None = None) -> None:
        """Be the KVM that ``profile`` describes: one of ``profiles.PROFILES`` by name, or one of your own.

        ``private_gpa_bit`` (40 to 51) is the profile's with another value: in VMs of type KVM_X86_SW_PROTECTED_VM the
        guest then says by that bit of its page table entries which accesses are private.
        Raises ValueError for an unknown name or another bit; ImportError when the engine is not installed.
        """
        self._profile = profiles.profile(profile)
        if private_gpa_bit is not None:
            self._profile = replace(self._profile, private_gpa_bit=private_gpa_bit)
        library()

    def __repr__(self) -> str:
        """Show the profile."""
        return f"SoftBackend({self.profile!r})"

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self._profile.name

    def open(self) -> int:
        """Open /dev/kvm; see ``Backend.open``."""
        return atomically(open_system, self._profile)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Do one ioctl; see ``Backend.ioctl``. KVM_RUN on what is a vCPU goes first and straight.

        As in a kernel no signal handler runs in the middle of an ioctl, and no exception of another thread's or a
        debugger's making arrives there. What changes more than one thing is done on a worker.
        """
        if request == _KVM_RUN:
            try:
                if kvm_run(fd, arg):
                    return 0
            except OverflowError:  # no descriptor has such a number
                pass
        request &= _U32
        try:
            file = FILES.get(fd)
            if request in file.direct:
                return file.ioctl(request, arg & _U64)
            if request != _KVM_RUN or not file.vcpu_address:
                return atomically(_ioctl, file, request, arg & _U64)
        except Refused as refused:
            raise ioctl_error(refused.errno, request, refused.detail) from None
        except NoThread as error:
            raise ioctl_error(error.errno or errno.EAGAIN, request, "no thread to do it on") from None
        except OSError as error:  # of a system call on the way: EMFILE, ENOMEM
            if error.__cause__ is not None:
                raise
            raise ioctl_error(error.errno or errno.EIO, request) from error
        except MemoryError as error:
            raise ioctl_error(errno.ENOMEM, request) from error
        except ctypes.ArgumentError as error:
            if "MemoryError" not in str(error):
                raise
            raise ioctl_error(errno.ENOMEM, request) from error  # in which ctypes wraps it
        return 0 if kvm_run(fd, arg) else self.ioctl(fd, request, arg)  # the request had upper bits

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Map a vCPU's pages, or a guest_memfd; see ``Backend.mmap``."""
        return atomically(_mmap, fd, length, offset)

    def munmap(self, address: int, length: int) -> None:
        """Unmap; see ``Backend.munmap``."""
        munmap(address, length)

    def close(self, fd: int) -> None:
        """Close; see ``Backend.close``. In a device's fault handler objects that go with it go at a later ``close``."""
        try:
            atomically_or_here(FILES.close, fd)
        except Refused as refused:
            raise OSError(refused.errno, os.strerror(refused.errno)) from None


def _ioctl(file: File, request: int, arg: int) -> int:
    try:
        return file.ioctl(request, arg)
    except MemoryError:
        raise Refused(errno.ENOMEM, "no memory") from None


def _mmap(fd: int, length: int, offset: int) -> int:
    """Map by a duplicate: another thread may give the number to another file meanwhile, with dup2(2).

    Where there is no number for a duplicate, what was mapped is looked up once more.
    """
    what = f"mmap(fd={fd}, length={length:#x}, offset={offset:#x})"
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, ValueError, OverflowError):  # also of what is no descriptor, as _map() says
        file = _mappable(fd, what, length, offset)
        address = file.map(fd, length, offset)
        if FILES.find(fd) is not file:
            munmap(address, length)
            raise OSError(errno.EBADF, f"{what}: the descriptor was closed meanwhile") from None
        return address
    try:
        return _mappable(own, what, length, offset).map(own, length, offset)
    finally:
        with suppress(Refused):
            FILES.close(own)


def _mappable(fd: int, what: str, length: int, offset: int) -> File:
    """Find the file of which this can be mapped. Raises OSError: as ``Backend.mmap``."""
    try:
        file = FILES.get(fd)
        size = file.mmap_size
    except Refused as refused:
        if refused.errno == errno.ENOTTY:
            raise OSError(errno.ENODEV, f"{what}: not a KVM file of the soft backend") from None
        raise OSError(refused.errno, f"{what}: {os.strerror(refused.errno)}") from None
    if not size:
        raise OSError(errno.ENODEV, f"{what}: only a vCPU, and a guest_memfd made for it, can be mapped")
    pages = -(-length // PAGE_SIZE) * PAGE_SIZE
    if length <= 0 or offset < 0 or offset % PAGE_SIZE or offset + pages > size:
        raise OSError(errno.EINVAL, f"{what}: it has {size:#x} bytes")
    return file
