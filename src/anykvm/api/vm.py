"""Vm: a virtual machine's descriptor; its memory is in ``vm_memory``, its interrupts and devices in ``vm_irq``."""

from __future__ import annotations

import ctypes
import errno as _errno
from typing import TYPE_CHECKING

from anykvm.abi import ioctls as n
from anykvm.abi.limits import KVM_MIN_ALLOC_MMU_PAGES
from anykvm.abi.structures import kvm_clock_data, kvm_msr_filter
from anykvm.api.enable import enable_cap
from anykvm.api.vcpu import Vcpu
from anykvm.api.vm_irq import VmIrq
from anykvm.api.vm_memory import Slot, VmMemory
from anykvm.host.atomic import atomically_or_here

if TYPE_CHECKING:
    from anykvm.api.kvm import Kvm


class Vm(VmMemory, VmIrq):
    """A virtual machine, made by ``Kvm.create_vm``.

    >>> import anykvm
    >>> with anykvm.open() as kvm, kvm.create_vm() as vm:
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.get_regs().rip == 0xFFF0  # the reset vector
    True
    >>> vcpu.closed
    True
    """

    def __init__(self, kvm: Kvm, fd: int) -> None:
        """Own the VM descriptor ``fd``; use ``Kvm.create_vm``."""
        super().__init__(kvm._backend, fd, kvm)
        self.kvm = kvm
        """The ``Kvm`` this was made from."""
        self._slots: dict[int, Slot] = {}

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU, and map its kvm_run. ``vcpu_id`` becomes the APIC id.

        Raises OSError: EEXIST for an id in use, EINVAL for one not below KVM_CAP_MAX_VCPU_ID or for too many vCPUs.
        """
        return atomically_or_here(self._create_vcpu, vcpu_id)

    def _create_vcpu(self, vcpu_id: int) -> Vcpu:
        size = self.kvm.get_vcpu_mmap_size()
        fd = self._call(n.KVM_CREATE_VCPU, vcpu_id, {"vcpu_id": vcpu_id}, _why_vcpu)
        return Vcpu(self, fd, vcpu_id, size)

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION of this VM, whose type can make it differ from the system's."""
        return self._call(n.KVM_CHECK_EXTENSION, capability)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP: turn on a KVM_CAP_* with up to four arguments.

        Raises OSError: EINVAL for a capability that cannot be enabled (KVM_CAP_MEMORY_FAULT_INFO is always on) or for
        wrong arguments.
        """
        return enable_cap(self, cap, args, flags)

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR: three guest-physical pages for KVM's own use on Intel.

        Raises OSError: EINVAL if they would reach over 4 GiB.
        """
        self._call(n.KVM_SET_TSS_ADDR, addr, {"addr": addr})

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one guest-physical page for KVM's own use on Intel.

        Raises OSError: EINVAL once a vCPU exists.
        """
        self._call(n.KVM_SET_IDENTITY_MAP_ADDR, _u64(addr), {"addr": addr})

    def get_clock(self) -> kvm_clock_data:
        """KVM_GET_CLOCK: the VM's clock in ns."""
        return self._get(n.KVM_GET_CLOCK, kvm_clock_data)

    def set_clock(self, clock: kvm_clock_data) -> None:
        """KVM_SET_CLOCK. Raises OSError: EINVAL for unknown flags."""
        self._call(n.KVM_SET_CLOCK, clock)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the default TSC rate of new vCPUs."""
        return self._call(n.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ for vCPUs made later. Raises OSError: EINVAL, for a rate KVM cannot give."""
        self._call(n.KVM_SET_TSC_KHZ, khz, {"khz": khz})

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: bound KVM's shadow pages.

        Raises OSError: EINVAL below ``abi.limits.KVM_MIN_ALLOC_MMU_PAGES``.
        """
        self._call(n.KVM_SET_NR_MMU_PAGES, pages, {"pages": pages}, _why_mmu_pages)

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID. Raises OSError: EBUSY once a vCPU exists."""
        self._call(n.KVM_SET_BOOT_CPU_ID, vcpu_id, {"vcpu_id": vcpu_id})

    def x86_set_msr_filter(self, msr_filter: kvm_msr_filter) -> None:
        """KVM_X86_SET_MSR_FILTER: choose the MSRs KVM leaves to user space. Raises OSError: EINVAL."""
        self._call(n.KVM_X86_SET_MSR_FILTER, msr_filter)

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a descriptor to read binary statistics from; the caller closes it."""
        return self._call(n.KVM_GET_STATS_FD)

    def _release(self) -> None:
        self._slots.clear()


def _why_mmu_pages(errno: int) -> str | None:
    return f"fewer than {KVM_MIN_ALLOC_MMU_PAGES} pages" if errno == _errno.EINVAL else None


def _u64(value: int) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * 8).from_buffer_copy(value.to_bytes(8, "little"))


def _why_vcpu(errno: int) -> str | None:
    return {_errno.EEXIST: "this vcpu_id is in use", _errno.EINVAL: "vcpu_id is too large, or there are too many"}.get(
        errno
    )
