"""KVM_SET_MEMORY_ATTRIBUTES, and what else concerns guests that say which of their memory is private.

Source: kvm_main.c:kvm_vm_ioctl_set_mem_attributes(), x86.c:kvm_vm_ioctl_enable_cap().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.structures import kvm_enable_cap, kvm_memory_attributes
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.usercopy import copy_from_user
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.backends.soft.vm import Vm

_U64: Final = (1 << 64) - 1
KVM_HC_MAP_GPA_RANGE: Final = 12
"""include/uapi/linux/kvm_para.h: the hypercall by which a guest asks for a conversion."""
KVM_EXIT_HYPERCALL_VALID_MASK: Final = 1 << KVM_HC_MAP_GPA_RANGE
"""Hypercalls that user space can answer: the value of KVM_CAP_EXIT_HYPERCALL."""


def set_memory_attributes(vm: Vm, arg: int) -> int:
    """KVM_SET_MEMORY_ATTRIBUTES: 0, or KVM_MEMORY_ATTRIBUTE_PRIVATE in a VM with private memory.

    In force for every vCPU on return. No slot need be there, and what slots hold is not touched: both memories of a
    page keep their data. Refused: EFAULT, ENOMEM; EINVAL for flags, attributes this VM does not have, and a range that
    is empty, unaligned or wraps.
    """
    request = copy_from_user(kvm_memory_attributes, arg)
    valid = vm.check_extension(c.KVM_CAP_MEMORY_ATTRIBUTES)
    if request.flags:
        raise Refused(errno.EINVAL, f"flags: {request.flags:#x}, not 0")
    if request.attributes & ~valid:
        raise Refused(errno.EINVAL, f"attributes: {request.attributes & ~valid:#x} is not among those of this VM")
    if request.size == 0 or request.address + request.size > _U64:
        raise Refused(errno.EINVAL, "size is 0, or address + size wraps")
    for name in ("address", "size"):
        if getattr(request, name) % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"{name} is not page aligned")
    gfn, npages = request.address // PAGE_SIZE, request.size // PAGE_SIZE
    result: int = library().ak_set_memory_attributes(vm.address, gfn, npages, bool(request.attributes))
    if result:
        raise Refused(-result)
    return 0


def enable_exit_hypercall(vm: Vm, cap: kvm_enable_cap) -> int:
    """KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL): args[0] has a bit for each hypercall that becomes KVM_EXIT_HYPERCALL.

    Refused: EINVAL for a hypercall that cannot.
    """
    mask: int = cap.args[0]
    if mask & ~KVM_EXIT_HYPERCALL_VALID_MASK:
        raise Refused(errno.EINVAL, f"args[0]: {mask:#x}; the mask is {KVM_EXIT_HYPERCALL_VALID_MASK:#x}")
    library().ak_vm_set_hypercall_exits(vm.address, mask)
    return 0
