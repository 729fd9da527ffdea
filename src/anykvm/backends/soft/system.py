"""The ioctls of /dev/kvm. Source: kvm_main.c:kvm_dev_ioctl(), x86.c:kvm_arch_dev_ioctl()."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Sequence
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_entry, kvm_msr_list, kvm_msrs
from anykvm.backends.soft import cpuid, msrs
from anykvm.backends.soft.capabilities import check_extension
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.profiles import Profile
from anykvm.backends.soft.usercopy import bytes_from_user, copy_from_user, copy_to_user
from anykvm.backends.soft.vcpu import MAX_IO_MSRS, VCPU_MMAP_SIZE
from anykvm.backends.soft.vm import create_vm

DIRECT: Final = frozenset(
    (
        n.KVM_GET_API_VERSION,
        n.KVM_GET_VCPU_MMAP_SIZE,
        n.KVM_CHECK_EXTENSION,
        n.KVM_GET_SUPPORTED_CPUID,
        n.KVM_GET_EMULATED_CPUID,
        n.KVM_GET_MSR_INDEX_LIST,
        n.KVM_GET_MSR_FEATURE_INDEX_LIST,
        n.KVM_GET_MSRS,
    )
)
"""They read constants."""


class SystemFile(File):
    """An open /dev/kvm. It works in a forked child too, as the kernel's does."""

    kind = "/dev/kvm"
    direct = DIRECT

    def __init__(self, profile: Profile) -> None:
        """``profile`` is for every VM made from this file."""
        self.profile = profile

    def ioctl(self, request: int, arg: int) -> int:
        """Do a system ioctl. Refused: EINVAL for one that /dev/kvm does not have, and as each says."""
        handler = _HANDLERS.get(request)
        if handler is None:
            raise Refused(errno.EINVAL, "not an ioctl of /dev/kvm")
        return handler(self, arg)


def _no_argument(arg: int) -> None:
    if arg:
        raise Refused(errno.EINVAL, f"arg is {arg:#x}, not 0")


def _get_api_version(file: SystemFile, arg: int) -> int:
    _no_argument(arg)
    return c.KVM_API_VERSION


def _get_vcpu_mmap_size(file: SystemFile, arg: int) -> int:
    _no_argument(arg)
    return VCPU_MMAP_SIZE


def _create_vm(file: SystemFile, arg: int) -> int:
    types = check_extension(file.profile, c.KVM_CAP_VM_TYPES) or 1 << c.KVM_X86_DEFAULT_VM
    if arg not in (c.KVM_X86_DEFAULT_VM, c.KVM_X86_SW_PROTECTED_VM) or not types >> arg & 1:  # kvm_arch_init_vm()
        raise Refused(errno.EINVAL, f"VM type {arg} is not offered (KVM_CAP_VM_TYPES)")
    return create_vm(file.profile, arg)


def _check_extension(file: SystemFile, arg: int) -> int:
    return check_extension(file.profile, arg)


def _give_cpuid(entries: Sequence[kvm_cpuid_entry2], arg: int) -> int:
    """kvm_dev_ioctl_get_cpuid(): E2BIG, with nent untouched, when the caller's array is too short."""
    header = copy_from_user(kvm_cpuid2, arg)
    if header.nent < len(entries):
        raise Refused(errno.E2BIG, f"nent is {header.nent}; there are {len(entries)} entries")
    array = (kvm_cpuid_entry2 * len(entries))(*entries)
    copy_to_user(arg + ctypes.sizeof(kvm_cpuid2), (ctypes.c_uint8 * ctypes.sizeof(array)).from_buffer(array))
    header.nent = len(entries)
    copy_to_user(arg, header)
    return 0


def _get_supported_cpuid(file: SystemFile, arg: int) -> int:
    return _give_cpuid(cpuid.supported_cpuid(), arg)


def _get_emulated_cpuid(file: SystemFile, arg: int) -> int:
    """sanity_check_entries(): the padding of the caller's entries must be zero."""
    header = copy_from_user(kvm_cpuid2, arg)
    count = min(header.nent, cpuid.KVM_MAX_CPUID_ENTRIES)
    size = ctypes.sizeof(kvm_cpuid_entry2)
    for i in range(count):
        entry = copy_from_user(kvm_cpuid_entry2, arg + ctypes.sizeof(kvm_cpuid2) + i * size)
        if any(entry.padding):
            raise Refused(errno.EINVAL, f"entries[{i}].padding is not zero")
    return _give_cpuid(cpuid.emulated_cpuid(), arg)


def _give_msr_list(indices: Sequence[int], arg: int) -> int:
    """The number is written even when the caller's array is too short (E2BIG): that is how it is asked for."""
    header = copy_from_user(kvm_msr_list, arg)
    room = header.nmsrs
    header.nmsrs = len(indices)
    copy_to_user(arg, header)
    if room < len(indices):
        raise Refused(errno.E2BIG, f"nmsrs is {room}; there are {len(indices)} indices")
    array = (ctypes.c_uint32 * len(indices))(*indices)
    copy_to_user(arg + ctypes.sizeof(kvm_msr_list), (ctypes.c_uint8 * ctypes.sizeof(array)).from_buffer(array))
    return 0


def _get_msr_index_list(file: SystemFile, arg: int) -> int:
    return _give_msr_list(msrs.MSRS_TO_SAVE, arg)


def _get_msr_feature_index_list(file: SystemFile, arg: int) -> int:
    return _give_msr_list(tuple(msrs.FEATURE_MSRS), arg)


def _get_msrs(file: SystemFile, arg: int) -> int:
    """Feature MSRs: x86.c:msr_io() stops at the first that is none, and returns how many were read."""
    header = copy_from_user(kvm_msrs, arg)
    if header.nmsrs >= MAX_IO_MSRS:
        raise Refused(errno.E2BIG, f"nmsrs is {header.nmsrs}; the limit is {MAX_IO_MSRS - 1}")
    start = arg + ctypes.sizeof(kvm_msrs)
    data = bytes_from_user(start, header.nmsrs * ctypes.sizeof(kvm_msr_entry))
    entries = (kvm_msr_entry * header.nmsrs).from_buffer(data)
    done = 0
    for entry in entries:
        if entry.index not in msrs.FEATURE_MSRS:
            break
        entry.data = msrs.FEATURE_MSRS[entry.index]
        done += 1
    copy_to_user(start, data)
    return done


_HANDLERS: Final[dict[int, Callable[[SystemFile, int], int]]] = {
    n.KVM_GET_API_VERSION: _get_api_version,
    n.KVM_GET_VCPU_MMAP_SIZE: _get_vcpu_mmap_size,
    n.KVM_CREATE_VM: _create_vm,
    n.KVM_CHECK_EXTENSION: _check_extension,
    n.KVM_GET_SUPPORTED_CPUID: _get_supported_cpuid,
    n.KVM_GET_EMULATED_CPUID: _get_emulated_cpuid,
    n.KVM_GET_MSR_INDEX_LIST: _get_msr_index_list,
    n.KVM_GET_MSR_FEATURE_INDEX_LIST: _get_msr_feature_index_list,
    n.KVM_GET_MSRS: _get_msrs,
}


def open_system(profile: Profile) -> int:
    """Open /dev/kvm: returns a descriptor. Raises OSError: EMFILE, ENOMEM."""
    return FILES.open("kvm", SystemFile(profile))
