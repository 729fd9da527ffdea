"""Poisoned pages without broken memory, and without being root: failures of ordinary host memory, injected."""

from __future__ import annotations

import os
from typing import Protocol

from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.vm import VmFile
from anykvm.host.atomic import atomically
from anykvm.host.ranges import PAGE_SIZE, check_pages


class _Descriptor(Protocol):
    def fileno(self) -> int: ...


class _Mapped(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...


def poison(vm: _Descriptor, memory: _Mapped, offset: int = 0, length: int = PAGE_SIZE) -> None:
    """Let pages of host memory count as poisoned for a VM: what madvise(MADV_HWPOISON) does, without being root.

    A guest's access then gives what KVM gives for a broken page of ordinary memory: SIGBUS with BUS_MCEERR_AR and the
    page's host address to the vCPU's thread, and KVM_RUN ends with EINTR, KVM_EXIT_INTR (ABI.md 3.2,
    kvm_send_hwpoison_signal()). Nobody in the process can touch the pages either; to them it is SIGSEGV, an EFAULT for
    ``GuestMemory.read``. Mapping other memory over a page, as a VMM that recovers does, lifts its poison.

    ``vm`` is an ``anykvm.Vm`` of the soft backend. In force for every vCPU when it returns. Raises ValueError when
    ``vm`` is not one, or the range is not of whole pages; IndexError when it is not in ``memory``; OSError: ENOMEM for
    pages that are not mapped; EDEADLK in a device's fault handler that a vCPU of the VM waits for.
    """
    atomically(_poison, vm, memory, offset, length, True)


def unpoison(vm: _Descriptor, memory: _Mapped, offset: int = 0, length: int = PAGE_SIZE) -> None:
    """Undo ``poison``: the pages are there again, readable and writable, with their contents. Raises as ``poison``."""
    atomically(_poison, vm, memory, offset, length, False)


def _poison(vm: _Descriptor, memory: _Mapped, offset: int, length: int, poisoned: bool) -> None:
    try:
        file: File | None = FILES.get(vm.fileno())
    except Refused:
        file = None
    if not isinstance(file, VmFile):
        raise ValueError("not a VM of the soft backend")
    check_pages(offset, length, memory.size)
    try:
        file.vm.check_not_in_device_fault()
    except Refused as refused:
        raise OSError(refused.errno, f"poison: {refused.detail}") from None
    for page in range(offset, offset + length, PAGE_SIZE):
        if result := library().ak_poison(file.vm.address, memory.address + page, poisoned):
            raise OSError(-result, f"poison of offset {page:#x}: {os.strerror(-result)}")
