"""Structures that end in a flexible array: room behind a header, and the calls that fill them."""

from __future__ import annotations

import ctypes
import errno as _errno
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_entry, kvm_msrs

if TYPE_CHECKING:
    from anykvm.api.handle import Handle

    Buffer = ctypes.Array[ctypes.c_uint8]

_H = TypeVar("_H", bound=ctypes.Structure)
_MAX_CPUID_ENTRIES: Final = 256  # KVM_MAX_CPUID_ENTRIES of arch/x86/include/asm/kvm_host.h


def flexible(header: type[_H], element: Any, count: int) -> tuple[Buffer, _H]:
    """Allocate ``header`` and ``count`` elements behind it; returns the buffer and the header in it."""
    buffer = (ctypes.c_uint8 * (ctypes.sizeof(header) + count * ctypes.sizeof(element)))()
    return buffer, header.from_buffer(buffer)


def tail(buffer: Buffer, header: ctypes.Structure, element: Any, count: int) -> Any:
    """Give the elements behind the header as a ctypes array."""
    return (element * count).from_buffer(buffer, ctypes.sizeof(header))


def read_cpuid(handle: Handle, request: int) -> list[kvm_cpuid_entry2]:
    """Do one of the KVM_GET_*_CPUID ioctls: E2BIG means that there are more entries than there was room for."""
    count = 64
    while True:
        buffer, header = flexible(kvm_cpuid2, kvm_cpuid_entry2, count)
        header.nent = count
        try:
            handle._call(request, buffer, {"nent": count})
        except OSError as error:
            if error.errno != _errno.E2BIG or count >= _MAX_CPUID_ENTRIES:
                raise
            count = min(2 * count, _MAX_CPUID_ENTRIES)
            continue
        entries = tail(buffer, header, kvm_cpuid_entry2, header.nent)
        return [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in entries]


def write_cpuid(handle: Handle, entries: Sequence[kvm_cpuid_entry2]) -> None:
    """Do KVM_SET_CPUID2."""
    buffer, header = flexible(kvm_cpuid2, kvm_cpuid_entry2, len(entries))
    header.nent = len(entries)
    tail(buffer, header, kvm_cpuid_entry2, len(entries))[:] = list(entries)
    handle._call(n.KVM_SET_CPUID2, buffer, {"nent": len(entries)}, _why_cpuid)


def _why_cpuid(errno: int) -> str | None:
    if errno == _errno.E2BIG:
        return f"more than {_MAX_CPUID_ENTRIES} entries"
    if errno == _errno.EINVAL:
        return "entries this KVM refuses, or the vCPU has run and they change what it offers"
    return None


def read_msrs(handle: Handle, indices: Iterable[int]) -> dict[int, int]:
    """Do KVM_GET_MSRS: index -> value of those read, up to the first that KVM refuses."""
    wanted = list(indices)
    buffer, header = flexible(kvm_msrs, kvm_msr_entry, len(wanted))
    header.nmsrs = len(wanted)
    entries = tail(buffer, header, kvm_msr_entry, len(wanted))
    for entry, index in zip(entries, wanted, strict=True):
        entry.index = index
    done = handle._call(n.KVM_GET_MSRS, buffer, {"nmsrs": len(wanted)})
    return {entry.index: entry.data for entry in entries[:done]}


def write_msrs(handle: Handle, values: Mapping[int, int]) -> int:
    """Do KVM_SET_MSRS: returns how many were set, in order, before the first that KVM refused."""
    buffer, header = flexible(kvm_msrs, kvm_msr_entry, len(values))
    header.nmsrs = len(values)
    for entry, (index, value) in zip(tail(buffer, header, kvm_msr_entry, len(values)), values.items(), strict=True):
        entry.index, entry.data = index, value
    return handle._call(n.KVM_SET_MSRS, buffer, {"nmsrs": len(values)})
