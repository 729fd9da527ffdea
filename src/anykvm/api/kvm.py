"""Kvm: the system file, and ``open`` that makes one."""

from __future__ import annotations

import ctypes
import errno as _errno
from collections.abc import Iterable
from typing import Final

from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_cpuid_entry2, kvm_msr_list
from anykvm.api.flexible import flexible, read_cpuid, read_msrs, tail
from anykvm.api.handle import Handle
from anykvm.api.vm import Vm
from anykvm.backends import backend as make_backend
from anykvm.backends.base import Backend
from anykvm.host.atomic import atomically_or_here

_MAX_ENTRIES: Final = 1 << 16


def open(backend: Backend | str | None = None, profile: str | None = None) -> Kvm:
    """Open KVM: on a backend, or on one chosen by name (``auto`` if None; see ``anykvm.backend``).

    Raises OSError if the system file cannot be opened, ValueError for an unknown name or profile.
    """
    if backend is None or isinstance(backend, str):
        backend = make_backend(backend or "auto", profile)
    elif profile is not None:
        raise ValueError("profile is chosen when a backend is made; this one has " + backend.profile)
    return atomically_or_here(_open, backend)


def _open(backend: Backend) -> Kvm:
    return Kvm(backend, backend.open())


class Kvm(Handle):
    """KVM's system file: capabilities, and the virtual machines made from it. Made by ``anykvm.open()``.

    >>> import anykvm
    >>> from anykvm import abi
    >>> with anykvm.open() as kvm:
    ...     kvm.get_api_version(), kvm.check_extension(abi.KVM_CAP_USER_MEMORY)
    (12, 1)
    """

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""
        return self._call(n.KVM_GET_API_VERSION)

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if this KVM lacks the KVM_CAP_*, else its positive value."""
        return self._call(n.KVM_CHECK_EXTENSION, capability)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM: make a virtual machine of a KVM_X86_*_VM type.

        Raises OSError: EINVAL for a type KVM_CAP_VM_TYPES does not list, EMFILE, ENOMEM.
        """
        return atomically_or_here(self._create_vm, type)

    def _create_vm(self, type: int) -> Vm:
        fd = self._call(n.KVM_CREATE_VM, type, {"type": type})
        return Vm(self, fd)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes to map of a vCPU."""
        return self._call(n.KVM_GET_VCPU_MMAP_SIZE)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID: what ``Vcpu.set_cpuid2`` may offer the guest."""
        return read_cpuid(self, n.KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID: features that KVM emulates, slowly."""
        return read_cpuid(self, n.KVM_GET_EMULATED_CPUID)

    def get_supported_hv_cpuid(self) -> list[kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID: Hyper-V leaves. Raises OSError: EINVAL if there are none."""
        return read_cpuid(self, n.KVM_GET_SUPPORTED_HV_CPUID)

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs a VMM saves and restores."""
        return self._msr_list(n.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs ``get_msrs`` here can read."""
        return self._msr_list(n.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, request: int) -> list[int]:
        # The first call may fail with E2BIG: it then says how many there are.
        count = 0
        while True:
            buffer, header = flexible(kvm_msr_list, ctypes.c_uint32, count)
            header.nmsrs = count
            try:
                self._call(request, buffer)
                return list(tail(buffer, header, ctypes.c_uint32, header.nmsrs))
            except OSError as error:
                if error.errno != _errno.E2BIG or not count < header.nmsrs <= _MAX_ENTRIES:
                    raise
                count = header.nmsrs

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system file: feature MSRs, index -> value.

        KVM stops at the first MSR it cannot read; the result then holds those before it.
        """
        return read_msrs(self, indices)
