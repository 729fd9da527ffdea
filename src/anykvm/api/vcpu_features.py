"""What a vCPU offers its guest, and what may be asked about its memory."""

from __future__ import annotations

import ctypes
import errno as _errno
from collections.abc import Sequence

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.api.enable import enable_cap
from anykvm.api.flexible import read_cpuid, write_cpuid
from anykvm.api.handle import Handle


class VcpuFeatures(Handle):
    """The ioctls of ``Vcpu`` about CPUID, capabilities, the TSC, translation and device attributes."""

    def set_cpuid2(self, entries: Sequence[s.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: what CPUID tells the guest.

        Raises OSError: EINVAL for entries KVM refuses, or that differ once the vCPU has run; E2BIG above 256.
        """
        write_cpuid(self, entries)

    def get_cpuid2(self) -> list[s.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2: what ``set_cpuid2`` set."""
        return read_cpuid(self, n.KVM_GET_CPUID2)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP of a vCPU. Raises OSError: EINVAL as ``Vm.enable_cap``."""
        return enable_cap(self, cap, args, flags)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the vCPU's TSC rate. Raises OSError: EIO if it is unknown."""
        return self._call(n.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ. Raises OSError: EINVAL for a rate KVM cannot give."""
        self._call(n.KVM_SET_TSC_KHZ, khz, {"khz": khz})

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest it was paused. Raises OSError: EINVAL without kvmclock."""
        self._call(n.KVM_KVMCLOCK_CTRL)

    def translate(self, linear_address: int) -> s.kvm_translation:
        """KVM_TRANSLATE by the guest's own page tables: ``.valid`` and ``.physical_address``."""
        translation = s.kvm_translation(linear_address=linear_address)
        self._call(n.KVM_TRANSLATE, translation, {"linear_address": linear_address})
        return translation

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> s.kvm_pre_fault_memory:
        """KVM_PRE_FAULT_MEMORY: fault in guest memory as a read would; returns what remains.

        ``.size`` is 0 when all was done. An error means that nothing was.
        Raises OSError: ENOENT where no slot is, EFAULT, EHWPOISON, ENOMEM, EINVAL, EAGAIN, EINTR, EOPNOTSUPP. It may
        write kvm_run's memory_fault though it is not KVM_RUN.
        """
        fields = {"gpa": gpa, "size": size, "flags": flags}
        what = s.kvm_pre_fault_memory(**fields)
        self._call(
            n.KVM_PRE_FAULT_MEMORY, what, fields, lambda errno: "no slot at gpa" if errno == _errno.ENOENT else None
        )
        return what

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a descriptor to read binary statistics from; the caller closes it."""
        return self._call(n.KVM_GET_STATS_FD)

    def set_device_attr(self, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR with a 64-bit value. Raises OSError: ENXIO for an unknown attribute."""
        data = ctypes.c_uint64(value)
        self._attr(n.KVM_SET_DEVICE_ATTR, group, attr, ctypes.addressof(data))

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR of a 64-bit value. Raises OSError: ENXIO for an unknown attribute."""
        data = ctypes.c_uint64()
        self._attr(n.KVM_GET_DEVICE_ATTR, group, attr, ctypes.addressof(data))
        return data.value

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR."""
        try:
            self._attr(n.KVM_HAS_DEVICE_ATTR, group, attr, 0)
        except OSError as error:
            if error.errno != _errno.ENXIO:
                raise
            return False
        return True

    def _attr(self, request: int, group: int, attr: int, addr: int) -> None:
        what = s.kvm_device_attr(group=group, attr=attr, addr=addr)
        self._call(request, what, {"group": group, "attr": attr})
