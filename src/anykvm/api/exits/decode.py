"""From the kvm_run page to exit objects. The only module of the API that reads kvm_run's exit union."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.reading import field, reader
from anykvm.abi.structures import kvm_run
from anykvm.abi.validity import MEMORY_FAULT_ERRNOS, memory_fault_valid
from anykvm.api.exits.accesses import Mmio
from anykvm.api.exits.base import Exit
from anykvm.api.exits.ends import Debug, FailEntry, Hlt, InternalError, Shutdown, SystemEvent
from anykvm.api.exits.interrupts import ApResetHold, IoapicEoi, IrqWindowOpen, Nmi, SetTpr, TprAccess
from anykvm.api.exits.intr import Intr, Unknown
from anykvm.api.exits.memory_fault import MemoryFault
from anykvm.api.exits.notifications import DirtyRingFull, Notify, X86BusLock
from anykvm.api.exits.requests import Hypercall, X86Rdmsr, X86Wrmsr

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu

    Decoder = Callable[[memoryview, Vcpu | None, int], Exit]

UNION, UNION_SIZE = field(kvm_run, "padding")
"""Offset and size of the exit union in kvm_run."""

_new: Final = object.__new__
EXIT_REASON: Final = reader(kvm_run, "exit_reason").unpack_from
"""``(exit_reason,)``"""
REASON_AND_IO: Final = reader(
    kvm_run, "exit_reason", "io.direction", "io.size", "io.port", "io.count", "io.data_offset"
).unpack_from
"""exit_reason and what KVM_EXIT_IO has: one unpacking on the hot path."""
_REASON_AND_FAULT: Final = reader(
    kvm_run, "exit_reason", "memory_fault.flags", "memory_fault.gpa", "memory_fault.size"
).unpack_from
_MMIO: Final = reader(kvm_run, "mmio.phys_addr", "mmio.data", "mmio.len", "mmio.is_write").unpack_from
_FAIL_ENTRY: Final = reader(kvm_run, "fail_entry.hardware_entry_failure_reason", "fail_entry.cpu").unpack_from
_DEBUG: Final = reader(kvm_run, *(f"debug.arch.{name}" for name in ("exception", "pc", "dr6", "dr7"))).unpack_from
_INTERNAL: Final = reader(kvm_run, "internal.suberror", "internal.ndata", "internal.data").unpack_from
_SYSTEM_EVENT: Final = reader(kvm_run, "system_event.type", "system_event.ndata", "system_event.data").unpack_from
_HYPERCALL: Final = reader(kvm_run, "hypercall.nr", "hypercall.args", "hypercall.flags").unpack_from
_MSR: Final = reader(kvm_run, "msr.reason", "msr.index", "msr.data").unpack_from
_TPR_ACCESS: Final = reader(kvm_run, "tpr_access.rip", "tpr_access.is_write").unpack_from
_EOI_VECTOR: Final = reader(kvm_run, "eoi.vector").unpack_from
_NOTIFY: Final = reader(kvm_run, "notify.flags").unpack_from


def _mmio(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    phys_addr, data, length, is_write = _MMIO(page)
    return Mmio(phys_addr, data[:length] if is_write else b"", length, bool(is_write), vcpu, serial)


def _fail_entry(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return FailEntry(*_FAIL_ENTRY(page))


def _debug(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return Debug(*_DEBUG(page))


def _internal_error(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    suberror, count, *data = _INTERNAL(page)
    return InternalError(suberror, tuple(data[:count]))


def _system_event(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    kind, count, *data = _SYSTEM_EVENT(page)
    return SystemEvent(kind, tuple(data[:count]))


def _hypercall(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    nr, *args, flags = _HYPERCALL(page)
    return Hypercall(nr, tuple(args), flags, vcpu, serial)


def _rdmsr(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    reason, index, _ = _MSR(page)
    return X86Rdmsr(index, 0, reason, vcpu, serial)  # data is an output here: what is there is not this MSR's


def _wrmsr(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    reason, index, data = _MSR(page)
    return X86Wrmsr(index, data, reason, vcpu, serial)


def _tpr_access(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    rip, is_write = _TPR_ACCESS(page)
    return TprAccess(rip, bool(is_write))


def _ioapic_eoi(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return IoapicEoi(*_EOI_VECTOR(page))


def _notify(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return Notify(*_NOTIFY(page))


def _plain(kind: type[Exit]) -> Decoder:
    return lambda page, vcpu, serial: kind()


DECODERS: Final[dict[int, Decoder]] = {
    c.KVM_EXIT_MMIO: _mmio,
    c.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    c.KVM_EXIT_DEBUG: _debug,
    c.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    c.KVM_EXIT_SYSTEM_EVENT: _system_event,
    c.KVM_EXIT_HYPERCALL: _hypercall,
    c.KVM_EXIT_X86_RDMSR: _rdmsr,
    c.KVM_EXIT_X86_WRMSR: _wrmsr,
    c.KVM_EXIT_TPR_ACCESS: _tpr_access,
    c.KVM_EXIT_IOAPIC_EOI: _ioapic_eoi,
    c.KVM_EXIT_NOTIFY: _notify,
    **{
        kind.exit_reason: _plain(kind)
        for kind in (
            Hlt,
            Shutdown,
            IrqWindowOpen,
            DirtyRingFull,
            Nmi,
            SetTpr,
            X86BusLock,
            ApResetHold,
        )
    },
}
"""Exit reason -> decoder, for a KVM_RUN that returned 0; KVM_EXIT_IO is decoded in ``Vcpu.run`` itself."""


def decode_unknown(page: memoryview, reason: int) -> Exit:
    """Make the exit for a reason without a class."""
    return Unknown(reason, bytes(page[UNION : UNION + UNION_SIZE]))


def decode_fault(page: memoryview, errno: int) -> MemoryFault | None:
    """Make the memory fault of a KVM_RUN that failed with ``errno``, if the validity rule holds."""
    reason, flags, gpa, size = _REASON_AND_FAULT(page)
    if not memory_fault_valid(errno, reason):
        return None
    fault = _new(MemoryFault)
    fault.gpa = gpa
    fault.size = size
    fault.flags = flags
    fault.errno = errno
    return fault


def decode_failure(page: memoryview, errno: int) -> Exit | None:
    """Make the exit of a KVM_RUN that failed with ``errno``, or None when the failure is an error and no exit.

    EINTR is an exit. EFAULT and EHWPOISON are one only under the validity rule (``anykvm.abi.validity``).

    >>> page = memoryview(bytearray(4096))
    >>> decode_failure(page, 14) is None  # a bare EFAULT says nothing about memory_fault
    True
    """
    if errno in MEMORY_FAULT_ERRNOS:
        return decode_fault(page, errno)
    return Intr(EXIT_REASON(page)[0]) if errno == _errno.EINTR else None
