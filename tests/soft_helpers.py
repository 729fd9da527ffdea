"""What tests of the soft backend's ioctl layer share: a backend on the waist, without the Python API."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from anykvm import abi
from anykvm.backends.soft import SoftBackend

PAGE = 4096
_S = TypeVar("_S", bound=ctypes.Structure)


class Guest:
    """A VM with one vCPU, by descriptor."""

    def __init__(self, backend: SoftBackend) -> None:
        self.backend = backend
        self.kvm = backend.open()
        self.vm = backend.ioctl(self.kvm, abi.KVM_CREATE_VM)
        self.vcpu = backend.ioctl(self.vm, abi.KVM_CREATE_VCPU)

    def close(self) -> None:
        for fd in (self.vcpu, self.vm, self.kvm):
            self.backend.close(fd)

    def get(self, request: int, kind: type[_S]) -> _S:
        data = kind()
        self.backend.ioctl(self.vcpu, request, ctypes.addressof(data))
        return data

    def set(self, request: int, data: ctypes.Structure | ctypes.Array[Any]) -> int:
        return self.backend.ioctl(self.vcpu, request, ctypes.addressof(data))

    def slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0, v2: bool = False) -> int:
        """errno of setting a slot; 0: done."""
        kind = abi.kvm_userspace_memory_region2 if v2 else abi.kvm_userspace_memory_region
        region = kind(slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva)
        request = abi.KVM_SET_USER_MEMORY_REGION2 if v2 else abi.KVM_SET_USER_MEMORY_REGION
        return error_of(self.backend, self.vm, request, ctypes.addressof(region))


def error_of(backend: SoftBackend, fd: int, request: int, arg: int = 0) -> int:
    """Errno of an ioctl, 0 when it works; its message must begin with the ioctl's name."""
    try:
        backend.ioctl(fd, request, arg)
    except OSError as error:
        assert str(error.strerror).startswith(abi.ioctl_name(request) + ":")
        return error.errno or -1
    return 0


@contextmanager
def refused(code: int, match: str | None = None) -> Iterator[None]:
    """The block raises OSError with this errno."""
    with pytest.raises(OSError, match=match) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]
