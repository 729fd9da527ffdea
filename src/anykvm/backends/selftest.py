"""A short guest that every usable backend must run: a real-mode OUT, then HLT. Written against the waist alone."""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

from anykvm import abi
from anykvm.backends.base import Backend
from anykvm.host.ranges import PAGE_SIZE

_CODE: Final = bytes.fromhex("b05ae6f1f4")  # mov al,0x5a; out 0xf1,al; hlt


def self_test(backend: Backend) -> str | None:
    """Run the guest; returns None when it did what it must, else one line that says what went wrong.

    Never raises OSError: an errno of any step is the answer.
    """
    opened: list[int] = []
    page = mmap.mmap(-1, PAGE_SIZE)
    page[: len(_CODE)] = _CODE
    base = ctypes.c_uint8.from_buffer(page)
    try:
        return _run(backend, ctypes.addressof(base), opened)
    except OSError as error:
        return str(error)
    finally:
        for fd in reversed(opened):
            backend.close(fd)
        del base  # a mapping cannot be closed while a ctypes object points into it
        page.close()


def _run(backend: Backend, memory: int, opened: list[int]) -> str | None:
    opened.append(system := backend.open())
    version = backend.ioctl(system, abi.KVM_GET_API_VERSION)
    if version != abi.KVM_API_VERSION:
        return f"KVM_GET_API_VERSION is {version}, not {abi.KVM_API_VERSION}"
    length = backend.ioctl(system, abi.KVM_GET_VCPU_MMAP_SIZE)
    if length < ctypes.sizeof(abi.kvm_run):
        return f"KVM_GET_VCPU_MMAP_SIZE is {length}, less than kvm_run's {ctypes.sizeof(abi.kvm_run)}"
    opened.append(vm := backend.ioctl(system, abi.KVM_CREATE_VM))
    region = abi.kvm_userspace_memory_region(memory_size=PAGE_SIZE, userspace_addr=memory)
    backend.ioctl(vm, abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))
    opened.append(vcpu := backend.ioctl(vm, abi.KVM_CREATE_VCPU))
    address = backend.mmap(vcpu, length, 0)
    try:
        return _drive(backend, vcpu, abi.kvm_run.from_address(address), (address, length))
    finally:
        backend.munmap(address, length)


def _drive(backend: Backend, vcpu: int, run: abi.kvm_run, mapped: tuple[int, int]) -> str | None:
    address, length = mapped
    sregs = abi.kvm_sregs()
    backend.ioctl(vcpu, abi.KVM_GET_SREGS, ctypes.addressof(sregs))
    sregs.cs.base = sregs.cs.selector = 0
    backend.ioctl(vcpu, abi.KVM_SET_SREGS, ctypes.addressof(sregs))
    regs = abi.kvm_regs(rip=0, rflags=2)
    backend.ioctl(vcpu, abi.KVM_SET_REGS, ctypes.addressof(regs))
    backend.ioctl(vcpu, abi.KVM_RUN)
    if run.exit_reason != abi.KVM_EXIT_IO or (run.io.direction, run.io.port) != (abi.KVM_EXIT_IO_OUT, 0xF1):
        return f"a guest's OUT gave {abi.exit_name(run.exit_reason)}, not KVM_EXIT_IO for port 0xf1"
    if run.io.data_offset >= length:
        return f"kvm_run.io.data_offset is {run.io.data_offset:#x}, beyond the mapped {length:#x} bytes"
    value = ctypes.c_uint8.from_address(address + run.io.data_offset).value
    if value != 0x5A:
        return f"a guest's OUT of 0x5a arrived as {value:#x}"
    backend.ioctl(vcpu, abi.KVM_RUN)
    if run.exit_reason != abi.KVM_EXIT_HLT:
        return f"a guest's HLT gave {abi.exit_name(run.exit_reason)}, not KVM_EXIT_HLT"
    return None
