"""A long-mode guest with private memory: eight pages at AREA, each with a guest_memfd's page and one of ours."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from anykvm import abi
from anykvm.abi.reading import field
from anykvm.api import GuestMemory
from anykvm.api import open as open_kvm
from anykvm.backends.soft import SoftBackend
from anykvm.testing.machine import PML4, Machine

_FAULT, _FAULT_SIZE = field(abi.kvm_run, "memory_fault")
PAGE, AREA, PAGES = 4096, 0x800000, 8
SIZE = PAGES * PAGE
PRIVATE = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE
FLAG = abi.KVM_MEMORY_EXIT_FLAG_PRIVATE
BIT = 47
ALIAS = 0x20000000  # the same guest-physical AREA (2 MiB from it), by private accesses


class PrivateGuest(Machine):
    """``Machine`` of type KVM_X86_SW_PROTECTED_VM (or another), whose slot 1 has a guest_memfd."""

    def __init__(self, backend: SoftBackend, type: int = abi.KVM_X86_SW_PROTECTED_VM, flags: int = 0) -> None:
        """Make it on a soft backend; ``flags`` are the guest_memfd's."""
        super().__init__(open_kvm(backend), type=type)
        self.gmem = self.vm.create_guest_memfd(SIZE, flags)
        self.shared = GuestMemory(SIZE)
        self.bind()

    def bind(self, slot: int = 1, gpa: int = AREA, size: int = SIZE, offset: int = 0, fd: int | None = None) -> None:
        """Make a slot of the shared memory and the guest_memfd."""
        flag, file = abi.KVM_MEM_GUEST_MEMFD, self.gmem if fd is None else fd
        self.vm.set_user_memory_region2(slot, gpa, size, self.shared.address, flag, file, offset)

    def private(self, gpa: int = AREA, size: int = SIZE) -> None:
        """Make guest frames private."""
        self.vm.set_memory_attributes(gpa, size, PRIVATE)

    def public(self, gpa: int = AREA, size: int = SIZE) -> None:
        """Make guest frames shared."""
        self.vm.set_memory_attributes(gpa, size, 0)

    def load(self, source: str) -> None:
        """Stand before assembled code; RBX is AREA, and at ALIAS the entries of the page tables have the bit."""
        self.long_mode(source)
        self.set_regs(rbx=AREA)

    def private_alias(self) -> None:
        """Map ``ALIAS`` to ``AREA`` with the bit by which the guest chooses private accesses."""
        self.quads(PML4 + 0x2000 + 8 * (ALIAS >> 21), AREA | 0x87 | 1 << BIT)

    def rax(self) -> int:
        """Read RAX."""
        return self.vcpu.get_regs().rax

    def fails(self) -> tuple[int, int, int, int, int]:
        """KVM_RUN fails: errno, exit_reason, and memory_fault as gpa, size, flags."""
        run = self.vcpu.kvm_run
        ctypes.memset(ctypes.addressof(run) + _FAULT, 0xAA, _FAULT_SIZE)
        try:
            self.kvm.backend.ioctl(self.vcpu.fileno(), abi.KVM_RUN)
        except OSError as error:
            fault = run.memory_fault
            return error.errno or 0, run.exit_reason, fault.gpa, fault.size, fault.flags
        raise AssertionError(f"KVM_RUN worked: exit_reason {run.exit_reason}")

    def close(self) -> None:
        """Close all of it."""
        self.vm.close()
        self.kvm.close()
        self.shared.close()
        self.memory.close()
        if self.gmem >= 0:
            os.close(self.gmem)


@contextmanager
def private_guest(backend: SoftBackend | None = None, type: int = 1, flags: int = 0) -> Iterator[PrivateGuest]:
    """Make a ``PrivateGuest`` and close it at the end."""
    guest = PrivateGuest(backend or SoftBackend(), type, flags)
    try:
        yield guest
    finally:
        guest.close()
