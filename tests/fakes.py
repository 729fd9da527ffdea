"""A backend in Python for tests of the API alone: real descriptors, crafted kvm_run pages, a log of calls."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

from anykvm import abi

MMAP_SIZE = 12288


class FakeBackend:
    """Answers what is needed to make a vCPU; KVM_RUN calls ``on_run(page)``, which may raise."""

    name = "soft"
    profile = "fake"

    def __init__(self, on_run: Callable[[memoryview], None] = lambda page: None) -> None:
        self.on_run = on_run
        self.log: list[str] = []
        self.page = mmap.mmap(-1, MMAP_SIZE)
        self.view = memoryview(self.page)
        self._address = ctypes.addressof(ctypes.c_uint8.from_buffer(self.page))
        self.fds: dict[int, str] = {}

    def _fd(self, kind: str) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.fds[fd] = kind
        return fd

    def open(self) -> int:
        return self._fd("kvm")

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if fd not in self.fds:
            raise abi.ioctl_error(9, request)
        if request == abi.KVM_RUN:
            self.on_run(self.view)
            return 0
        if request == abi.KVM_GET_VCPU_MMAP_SIZE:
            return MMAP_SIZE
        if request == abi.KVM_CREATE_VM:
            return self._fd("vm")
        if request == abi.KVM_CREATE_VCPU:
            return self._fd("vcpu")
        raise abi.ioctl_error(25, request)

    def mmap(self, fd: int, length: int, offset: int) -> int:
        self.log.append("mmap")
        return self._address

    def munmap(self, address: int, length: int) -> None:
        self.log.append("munmap")

    def close(self, fd: int) -> None:
        self.log.append(f"close {self.fds.pop(fd)}")
        os.close(fd)
