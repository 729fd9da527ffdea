"""KVM_PRE_FAULT_MEMORY. Source: kvm_main.c:kvm_vcpu_pre_fault_memory()."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Final

from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import DEVICE_FAILED, IN_DEVICE_FAULT, Refused
from anykvm.backends.soft.upcall import check
from anykvm.backends.soft.usercopy import copy_from_user
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.backends.soft.vcpu import VcpuFile

_U64: Final = (1 << 64) - 1


def pre_fault_memory(file: VcpuFile, arg: int) -> int:
    """KVM_PRE_FAULT_MEMORY: reach the host page of every guest page of a range as a guest's read would.

    ``gpa`` and ``size`` are moved past what was done, and the result is 0 if that is anything. A page that fails as
    private or guest_memfd memory sets ``exit_reason`` and ``memory_fault`` in kvm_run, even then.
    Refused, at the first page: ENOENT (no slot), EFAULT, EHWPOISON, ENOMEM, EINTR (a signal; a poisoned page of
    ordinary memory, with SIGBUS); EFAULT, and EINVAL for flags and a range that is empty, unaligned or wraps.
    """
    request = copy_from_user(kvm_pre_fault_memory, arg)
    gpa, size = request.gpa, request.size
    if request.flags:
        raise Refused(errno.EINVAL, f"flags: {request.flags:#x}, not 0")
    if gpa % PAGE_SIZE or size % PAGE_SIZE:
        raise Refused(errno.EINVAL, "gpa or size is not page aligned")
    if size == 0 or gpa + size > _U64:
        raise Refused(errno.EINVAL, "size is 0, or gpa + size wraps")
    result: int = library().ak_pre_fault_memory(file, ctypes.addressof(request), arg)
    check(result, f"KVM_PRE_FAULT_MEMORY: {DEVICE_FAILED}")
    if result == -errno.EDEADLK:
        raise Refused(errno.EDEADLK, IN_DEVICE_FAULT)
    if result:
        raise Refused(-result, "no slot at gpa" if result == -errno.ENOENT else "the page at gpa cannot be had")
    return 0
