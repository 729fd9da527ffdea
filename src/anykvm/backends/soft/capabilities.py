"""KVM_CHECK_EXTENSION: what the soft backend can do. A capability that is not here is 0, and its ioctls are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from anykvm.abi import constants as c
from anykvm.backends.soft.attributes import KVM_EXIT_HYPERCALL_VALID_MASK
from anykvm.backends.soft.profiles import Profile

KVM_USER_MEM_SLOTS: Final = 32764
"""SHRT_MAX less three internal slots: memslots per address space."""
KVM_ADDRESS_SPACES: Final = 2
"""0: everything; 1: what only a vCPU in system management mode sees."""
KVM_DIRTY_RING_MAX_BYTES: Final = 65536 * 16
"""Of a vCPU's dirty ring: KVM_DIRTY_RING_MAX_ENTRIES of 16 bytes."""
KVM_MAX_VCPUS: Final = 256
"""vCPUs per VM: each is an engine instance of about 3 MiB."""
KVM_MAX_VCPU_IDS: Final = 1024
"""vCPU ids are below this: KVM_VCPU_ID_RATIO (4) times the vCPUs."""

CAPABILITIES: Final[Mapping[int, int]] = MappingProxyType(
    {
        # memory
        c.KVM_CAP_USER_MEMORY: 1,
        c.KVM_CAP_USER_MEMORY2: 1,
        c.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
        c.KVM_CAP_MULTI_ADDRESS_SPACE: KVM_ADDRESS_SPACES,
        c.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
        c.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
        c.KVM_CAP_SYNC_MMU: 1,
        c.KVM_CAP_READONLY_MEM: 1,
        c.KVM_CAP_MEMORY_FAULT_INFO: 1,
        c.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
        c.KVM_CAP_MEMORY_ATTRIBUTES: c.KVM_MEMORY_ATTRIBUTE_PRIVATE,
        c.KVM_CAP_GUEST_MEMFD: 1,
        c.KVM_CAP_GUEST_MEMFD_FLAGS: c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED,
        c.KVM_CAP_PRE_FAULT_MEMORY: 1,
        c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | c.KVM_DIRTY_LOG_INITIALLY_SET,
        c.KVM_CAP_DIRTY_LOG_RING: KVM_DIRTY_RING_MAX_BYTES,
        c.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: KVM_DIRTY_RING_MAX_BYTES,
        # VM
        c.KVM_CAP_VM_TYPES: 1 << c.KVM_X86_DEFAULT_VM | 1 << c.KVM_X86_SW_PROTECTED_VM,
        c.KVM_CAP_EXIT_HYPERCALL: KVM_EXIT_HYPERCALL_VALID_MASK,
        c.KVM_CAP_CHECK_EXTENSION_VM: 1,
        c.KVM_CAP_ENABLE_CAP_VM: 1,
        c.KVM_CAP_SET_TSS_ADDR: 1,
        c.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
        c.KVM_CAP_SET_BOOT_CPU_ID: 1,
        c.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
        c.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
        c.KVM_CAP_VM_TSC_CONTROL: 1,
        # vCPU
        c.KVM_CAP_HLT: 1,
        c.KVM_CAP_NOP_IO_DELAY: 1,
        c.KVM_CAP_EXT_CPUID: 1,
        c.KVM_CAP_EXT_EMUL_CPUID: 1,
        c.KVM_CAP_GET_MSR_FEATURES: 1,
        c.KVM_CAP_MP_STATE: 1,
        c.KVM_CAP_USER_NMI: 1,
        c.KVM_CAP_VCPU_EVENTS: 1,
        c.KVM_CAP_DEBUGREGS: 1,
        c.KVM_CAP_ENABLE_CAP: 1,
        c.KVM_CAP_XSAVE: 1,
        c.KVM_CAP_XSAVE2: 4096,
        c.KVM_CAP_XCRS: 1,
        c.KVM_CAP_SREGS2: 1,
        c.KVM_CAP_GET_TSC_KHZ: 1,
        c.KVM_CAP_SYNC_REGS: c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS | c.KVM_SYNC_X86_EVENTS,
        c.KVM_CAP_IMMEDIATE_EXIT: 1,
        c.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    }
)
"""Capability -> value; profiles may differ (``Profile.capabilities``)."""


OF_VM_TYPE: Final[Mapping[int | None, Mapping[int, int]]] = MappingProxyType(
    {
        None: {},
        c.KVM_X86_DEFAULT_VM: {c.KVM_CAP_MEMORY_ATTRIBUTES: 0},
        c.KVM_X86_SW_PROTECTED_VM: {
            c.KVM_CAP_MULTI_ADDRESS_SPACE: 1,
            c.KVM_CAP_GUEST_MEMFD_FLAGS: c.GUEST_MEMFD_FLAG_MMAP,
        },
    }
)
"""What a VM of a type says otherwise than /dev/kvm (None)."""


def check_extension(profile: Profile, capability: int, vm_type: int | None = None) -> int:
    """kvm_vm_ioctl_check_extension(): the value of a capability, 0 for one that is not offered."""
    if capability == c.KVM_CAP_NR_VCPUS:
        return min(os.cpu_count() or 1, KVM_MAX_VCPUS)  # the recommended number
    of_vm = profile.vm_capabilities if vm_type == c.KVM_X86_DEFAULT_VM else {}
    sources = (of_vm, profile.capabilities, OF_VM_TYPE[vm_type], CAPABILITIES)
    return next((values[capability] for values in sources if capability in values), 0)
