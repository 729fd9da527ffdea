"""KVM_CHECK_EXTENSION, KVM_ENABLE_CAP and KVM_CREATE_VM: what is offered, and what cannot be enabled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_enable_cap
from anykvm.conformance.machine import Machine, capability
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "capabilities"
NO_VM: Final = -2
"""What is recorded for a VM type that cannot be made."""

_NAMES: Final = (
    "USER_MEMORY",
    "NR_VCPUS",
    "MAX_VCPUS",
    "MAX_VCPU_ID",
    "NR_MEMSLOTS",
    "SYNC_MMU",
    "DESTROY_MEMORY_REGION_WORKS",
    "JOIN_MEMORY_REGIONS_WORKS",
    "COALESCED_MMIO",
    "READONLY_MEM",
    "MULTI_ADDRESS_SPACE",
    "IMMEDIATE_EXIT",
    "SYNC_REGS",
    "ASYNC_PF",
    "ASYNC_PF_INT",
    "USER_MEMORY2",
    "MEMORY_FAULT_INFO",
    "MEMORY_ATTRIBUTES",
    "GUEST_MEMFD",
    "GUEST_MEMFD_FLAGS",
    "VM_TYPES",
    "PRE_FAULT_MEMORY",
    "X86_GUEST_MODE",
    "EXIT_ON_EMULATION_FAILURE",
    "EXIT_HYPERCALL",
    "DIRTY_LOG_RING",
    "MANUAL_DIRTY_LOG_PROTECT2",
    "X86_USER_SPACE_MSR",
    "X86_NOTIFY_VMEXIT",
    "X86_BUS_LOCK_EXIT",
    "VM_GPA_BITS",
    "BINARY_STATS_FD",
    "ENABLE_CAP",
    "ENABLE_CAP_VM",
    "CHECK_EXTENSION_VM",
    "DISABLE_QUIRKS2",
    "NESTED_STATE",
    "X86_DISABLE_EXITS",
)
_UNDEFINED: Final = (252, 260, 100000)
_NOT_ENABLED: Final = (
    c.KVM_CAP_GUEST_MEMFD,
    c.KVM_CAP_MEMORY_ATTRIBUTES,
    c.KVM_CAP_USER_MEMORY2,
    c.KVM_CAP_PRE_FAULT_MEMORY,
    c.KVM_CAP_READONLY_MEM,
    9999,
)
"""Capabilities that are not turned on by KVM_ENABLE_CAP, and one that does not exist."""


@scenario("caps", area=AREA)
def caps(lab: Lab) -> None:
    """Each capability on the system file and on VMs of both types; the annotation of memory faults is always on."""
    m, protected = lab.machine(), lab.protected_machine()
    numbers = [(name, getattr(c, f"KVM_CAP_{name}")) for name in _NAMES]
    for name, number in numbers + [(f"{number}_undefined", number) for number in _UNDEFINED]:
        lab.note(
            name,
            cap=number,
            sys=capability(m.kvm.check_extension, number),
            vm=capability(m.vm.check_extension, number),
            swp_vm=capability(protected.vm.check_extension, number) if protected else NO_VM,
        )
    lab.step(
        "CHECK_EXTENSION_on_vcpu_fd",
        lambda: m.vcpu.ioctl(n.KVM_CHECK_EXTENSION, c.KVM_CAP_MEMORY_FAULT_INFO),
    )
    lab.step("GET_API_VERSION", m.kvm.get_api_version)
    lab.step("VCPU_MMAP_SIZE", m.kvm.get_vcpu_mmap_size)
    _enable(lab, m, protected)
    for type in range(8):
        lab.step("CREATE_VM", _create_vm(m, type), type=type)


def _enable(lab: Lab, m: Machine, protected: Machine | None) -> None:
    fault_info = c.KVM_CAP_MEMORY_FAULT_INFO
    step = "ENABLE_CAP_MEMORY_FAULT_INFO_"
    lab.step(step + "vm", _enable_cap(m.vm.ioctl, fault_info))
    lab.step(step + "vcpu", _enable_cap(m.vcpu.ioctl, fault_info))
    lab.step(step + "sys", _enable_cap(m.kvm.ioctl, fault_info))
    if protected:
        lab.step(step + "swp_vm", _enable_cap(protected.vm.ioctl, fault_info))
        lab.step(step + "swp_vcpu", _enable_cap(protected.vcpu.ioctl, fault_info))
    lab.step(step + "vm_arg1", _enable_cap(m.vm.ioctl, fault_info, first=1))
    lab.step(step + "vm_flags1", _enable_cap(m.vm.ioctl, fault_info, flags=1))
    lab.step(step + "vcpu_flags1", _enable_cap(m.vcpu.ioctl, fault_info, flags=1))
    for number in _NOT_ENABLED:
        lab.step("ENABLE_CAP_vm", _enable_cap(m.vm.ioctl, number), cap=number)
        lab.step("ENABLE_CAP_vcpu", _enable_cap(m.vcpu.ioctl, number), cap=number)


def _enable_cap(ioctl: Callable[[int, kvm_enable_cap], int], number: int, first: int = 0, flags: int = 0) -> Outcome:
    request = kvm_enable_cap(cap=number, flags=flags)
    request.args[0] = first
    return attempt(lambda: ioctl(n.KVM_ENABLE_CAP, request))


def _create_vm(m: Machine, type: int) -> Outcome:
    made = attempt(lambda: m.kvm.ioctl(n.KVM_CREATE_VM, type))
    if made.failed:
        return made
    os.close(made.ret)
    return Outcome(0, 0)
