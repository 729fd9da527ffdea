"""The state ioctls of a vCPU: copying from and to the caller around ``ioctl.c:ak_vcpu_ioctl()``, which does the rest.

Source: kvm_main.c:kvm_vcpu_ioctl(), x86.c:kvm_arch_vcpu_ioctl(). Errno where a structure cannot be read or written is
EFAULT throughout; the others stand with each ioctl.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.backends.soft.cpuid import KVM_MAX_CPUID_ENTRIES
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import IN_DEVICE_FAULT, Refused
from anykvm.backends.soft.pre_fault import pre_fault_memory
from anykvm.backends.soft.upcall import check, in_device_fault
from anykvm.backends.soft.usercopy import bytes_from_user, copy_from_user, copy_to_user, tail_of

if TYPE_CHECKING:
    from anykvm.backends.soft.vcpu import VcpuFile

MAX_IO_MSRS: Final = 256
"""KVM_GET_MSRS and KVM_SET_MSRS take fewer than this."""
_TSC_TOLERANCE_PPM: Final = 250  # a frequency so near needs no scaling (x86.c:tsc_tolerance_ppm)
_SIGSET_SIZE: Final = 8
_MSRS_HEADER: Final = ctypes.sizeof(s.kvm_msrs)
_CPUID_HEADER: Final = ctypes.sizeof(s.kvm_cpuid2)
_ENTRY2: Final = ctypes.sizeof(s.kvm_cpuid_entry2)

# What is wrong when the engine says EINVAL, where it can be one thing only.
_WHY: Final[dict[int, str]] = {
    n.KVM_SET_SREGS: "CR0, CR3, CR4, EFER, APIC base and CS.L do not fit together, or have reserved bits",
    n.KVM_SET_SREGS2: "CR0, CR3, CR4, EFER, APIC base, CS.L and flags do not fit together, or have reserved bits",
    n.KVM_SET_XCRS: "nr_xcrs, flags or the value of XCR0 (x87 and SSE, by CPUID leaf 0xd)",
    n.KVM_SET_XSAVE: "xstate_bv, xcomp_bv, mxcsr or the header's reserved bytes",
    n.KVM_SET_DEBUGREGS: "flags, or the upper half of dr6 or dr7",
    n.KVM_SET_VCPU_EVENTS: "flags, exception.nr or smi",
    n.KVM_SET_CPUID2: "another table after the first KVM_RUN, or address bits of leaf 0x80000008",
    n.KVM_SET_MP_STATE: "mp_state: only KVM_MP_STATE_RUNNABLE without an in-kernel APIC",
    n.KVM_INTERRUPT: "irq is above 255",
}

_Buffer = ctypes.Structure | ctypes.Array[ctypes.c_uint8]


def _engine(file: VcpuFile, request: int, data: _Buffer | None) -> int:
    address = None if data is None else ctypes.addressof(data)
    if in_device_fault() and library().ak_vm_in_device_fault(file.vm.address):
        raise Refused(errno.EDEADLK, IN_DEVICE_FAULT)
    result: int = library().ak_vcpu_ioctl(file, request, address)
    check()
    if result < 0:
        raise Refused(-result, _WHY.get(request, "") if result == -errno.EINVAL else "")
    return result


def _getter(request: int, kind: type[ctypes.Structure]) -> Callable[[VcpuFile, int], int]:
    def get(file: VcpuFile, arg: int) -> int:
        data = kind()
        result = _engine(file, request, data)
        copy_to_user(arg, data)
        return result

    return get


def _setter(request: int, kind: type[ctypes.Structure]) -> Callable[[VcpuFile, int], int]:
    def set_(file: VcpuFile, arg: int) -> int:
        return _engine(file, request, copy_from_user(kind, arg))

    return set_


def _translate(file: VcpuFile, arg: int) -> int:
    data = copy_from_user(s.kvm_translation, arg)
    _engine(file, n.KVM_TRANSLATE, data)
    copy_to_user(arg, data)
    return 0


def _nmi(file: VcpuFile, arg: int) -> int:
    return _engine(file, n.KVM_NMI, None)


def _set_signal_mask(file: VcpuFile, arg: int) -> int:
    """A null pointer: the thread's own mask again. EINVAL when len is not 8."""
    mask = None
    if arg:
        header = copy_from_user(s.kvm_signal_mask, arg)
        if header.len != _SIGSET_SIZE:
            raise Refused(errno.EINVAL, f"len is {header.len}, not {_SIGSET_SIZE}")
        mask = bytes_from_user(arg + ctypes.sizeof(s.kvm_signal_mask), _SIGSET_SIZE)
    return _engine(file, n.KVM_SET_SIGNAL_MASK, mask)


def _msrs_from_user(arg: int) -> ctypes.Array[ctypes.c_uint8]:
    count = copy_from_user(s.kvm_msrs, arg).nmsrs
    if count >= MAX_IO_MSRS:
        raise Refused(errno.E2BIG, f"nmsrs is {count}; the limit is {MAX_IO_MSRS - 1}")
    data = bytes_from_user(arg, _MSRS_HEADER + count * ctypes.sizeof(s.kvm_msr_entry))
    s.kvm_msrs.from_buffer(data).nmsrs = count  # the caller's memory may have changed since
    return data


def _get_msrs(file: VcpuFile, arg: int) -> int:
    """Returns how many were read; the first that does not exist ends it. E2BIG for 256 or more."""
    data = _msrs_from_user(arg)
    done = _engine(file, n.KVM_GET_MSRS, data)
    copy_to_user(arg + _MSRS_HEADER, tail_of(data, _MSRS_HEADER))  # msr_io() writes the entries alone
    return done


def _set_msrs(file: VcpuFile, arg: int) -> int:
    """Returns how many were written; the first that does not exist or does not take its value ends it. E2BIG."""
    return _engine(file, n.KVM_SET_MSRS, _msrs_from_user(arg))


def _check_nent(nent: int) -> None:
    if nent > KVM_MAX_CPUID_ENTRIES:
        raise Refused(errno.E2BIG, f"more than {KVM_MAX_CPUID_ENTRIES} entries")


def _set_cpuid2(file: VcpuFile, arg: int) -> int:
    nent = copy_from_user(s.kvm_cpuid2, arg).nent
    _check_nent(nent)
    data = bytes_from_user(arg, _CPUID_HEADER + nent * _ENTRY2)
    s.kvm_cpuid2.from_buffer(data).nent = nent
    return _engine(file, n.KVM_SET_CPUID2, data)


def _set_cpuid(file: VcpuFile, arg: int) -> int:
    """The older form: entries without an index."""
    nent = copy_from_user(s.kvm_cpuid, arg).nent
    _check_nent(nent)
    size = ctypes.sizeof(s.kvm_cpuid_entry)
    raw = bytes_from_user(arg + ctypes.sizeof(s.kvm_cpuid), nent * size)
    data = (ctypes.c_uint8 * (_CPUID_HEADER + nent * _ENTRY2))()
    s.kvm_cpuid2.from_buffer(data).nent = nent
    for i in range(nent):
        old = s.kvm_cpuid_entry.from_buffer(raw, i * size)
        new = s.kvm_cpuid_entry2.from_buffer(data, _CPUID_HEADER + i * _ENTRY2)
        new.function, new.eax, new.ebx, new.ecx, new.edx = old.function, old.eax, old.ebx, old.ecx, old.edx
    return _engine(file, n.KVM_SET_CPUID2, data)


def _get_cpuid2(file: VcpuFile, arg: int) -> int:
    """E2BIG, and nothing written, when nent is less than the table has. The entries are written before nent."""
    header = copy_from_user(s.kvm_cpuid2, arg)
    data = (ctypes.c_uint8 * (_CPUID_HEADER + KVM_MAX_CPUID_ENTRIES * _ENTRY2))()
    table = s.kvm_cpuid2.from_buffer(data)
    table.nent = min(header.nent, KVM_MAX_CPUID_ENTRIES)
    _engine(file, n.KVM_GET_CPUID2, data)
    header.nent = table.nent
    copy_to_user(arg + _CPUID_HEADER, tail_of(data, _CPUID_HEADER), header.nent * _ENTRY2)
    copy_to_user(arg, header)
    return 0


def _get_tsc_khz(file: VcpuFile, arg: int) -> int:
    return file.vm.tsc_khz


def _set_tsc_khz(file: VcpuFile, arg: int) -> int:
    """kvm_set_tsc_khz() without scaling (KVM_CAP_TSC_CONTROL is 0): EINVAL for a frequency that is not the VM's."""
    khz = arg & 0xFFFFFFFF
    if khz and abs(khz - file.vm.tsc_khz) * 1_000_000 > file.vm.tsc_khz * _TSC_TOLERANCE_PPM:
        raise Refused(errno.EINVAL, f"{khz} kHz: the VM's frequency is {file.vm.tsc_khz} kHz; set it on the VM")
    return 0


def _enable_cap(file: VcpuFile, arg: int) -> int:
    """kvm_vcpu_ioctl_enable_cap(): none of its capabilities is offered, and informational ones cannot be enabled."""
    cap = copy_from_user(s.kvm_enable_cap, arg)
    raise Refused(errno.EINVAL, f"cap: {cap.cap} is not one that can be enabled on a vCPU")


_PLAIN: Final[tuple[tuple[int, int, type[ctypes.Structure]], ...]] = (
    (n.KVM_GET_REGS, n.KVM_SET_REGS, s.kvm_regs),
    (n.KVM_GET_SREGS, n.KVM_SET_SREGS, s.kvm_sregs),
    (n.KVM_GET_SREGS2, n.KVM_SET_SREGS2, s.kvm_sregs2),
    (n.KVM_GET_FPU, n.KVM_SET_FPU, s.kvm_fpu),
    (n.KVM_GET_XSAVE, n.KVM_SET_XSAVE, s.kvm_xsave),
    (n.KVM_GET_XCRS, n.KVM_SET_XCRS, s.kvm_xcrs),
    (n.KVM_GET_DEBUGREGS, n.KVM_SET_DEBUGREGS, s.kvm_debugregs),
    (n.KVM_GET_VCPU_EVENTS, n.KVM_SET_VCPU_EVENTS, s.kvm_vcpu_events),
    (n.KVM_GET_MP_STATE, n.KVM_SET_MP_STATE, s.kvm_mp_state),
)

HANDLERS: Final[dict[int, Callable[[VcpuFile, int], int]]] = {
    **{get: _getter(get, kind) for get, _, kind in _PLAIN},
    **{set_: _setter(set_, kind) for _, set_, kind in _PLAIN},
    n.KVM_GET_XSAVE2: _getter(n.KVM_GET_XSAVE2, s.kvm_xsave),
    n.KVM_INTERRUPT: _setter(n.KVM_INTERRUPT, s.kvm_interrupt),
    n.KVM_NMI: _nmi,
    n.KVM_TRANSLATE: _translate,
    n.KVM_SET_SIGNAL_MASK: _set_signal_mask,
    n.KVM_GET_MSRS: _get_msrs,
    n.KVM_SET_MSRS: _set_msrs,
    n.KVM_SET_CPUID: _set_cpuid,
    n.KVM_SET_CPUID2: _set_cpuid2,
    n.KVM_GET_CPUID2: _get_cpuid2,
    n.KVM_GET_TSC_KHZ: _get_tsc_khz,
    n.KVM_SET_TSC_KHZ: _set_tsc_khz,
    n.KVM_ENABLE_CAP: _enable_cap,
    n.KVM_PRE_FAULT_MEMORY: pre_fault_memory,
}
"""Request -> handler, for every vCPU ioctl but KVM_RUN."""
