"""From the kvm_run page to exit objects. The only module of the API that reads kvm_run's exit union."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.validity import MEMORY_FAULT_ERRNOS, memory_fault_valid
from anykvm.api import exits_more as more
from anykvm.api.exits import Exit, Intr, MemoryFault, Mmio, Unknown

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu

    Decoder = Callable[[memoryview, Vcpu | None, int], Exit]

UNION: Final = 32
"""Offset of the exit union in kvm_run."""
UNION_SIZE: Final = 256

_new: Final = object.__new__
EXIT_REASON: Final = Struct("<8xI").unpack_from
# exit_reason, and for KVM_EXIT_IO {direction, size, port, count, data_offset}: one unpacking for the hot path.
REASON_AND_IO: Final = Struct("<8xI20xBBHIQ").unpack_from
_MMIO: Final = Struct("<Q8sIB").unpack_from
# exit_reason and memory_fault {flags, gpa, size}, for the same reason.
_REASON_AND_FAULT: Final = Struct("<8xI20xQQQ").unpack_from
_FAIL_ENTRY: Final = Struct("<QI").unpack_from
_DEBUG: Final = Struct("<I4xQQQ").unpack_from
_COUNTED: Final = Struct("<II16Q").unpack_from
_HYPERCALL: Final = Struct("<Q6Q8xQ").unpack_from
_MSR: Final = Struct("<8xIIQ").unpack_from
_TPR_ACCESS: Final = Struct("<QI").unpack_from
_U32: Final = Struct("<I").unpack_from


def _mmio(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    phys_addr, data, length, is_write = _MMIO(page, UNION)
    return Mmio(phys_addr, data[:length] if is_write else b"", length, bool(is_write), vcpu, serial)


def _fail_entry(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return more.FailEntry(*_FAIL_ENTRY(page, UNION))


def _debug(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return more.Debug(*_DEBUG(page, UNION))


def _internal_error(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    suberror, count, *data = _COUNTED(page, UNION)
    return more.InternalError(suberror, tuple(data[:count]))


def _system_event(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    kind, count, *data = _COUNTED(page, UNION)
    return more.SystemEvent(kind, tuple(data[:count]))


def _hypercall(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    nr, *args, flags = _HYPERCALL(page, UNION)
    return more.Hypercall(nr, tuple(args), flags, vcpu, serial)


def _rdmsr(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    reason, index, _ = _MSR(page, UNION)
    return more.X86Rdmsr(index, 0, reason, vcpu, serial)  # data is an output here: what is there is not this MSR's


def _wrmsr(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    reason, index, data = _MSR(page, UNION)
    return more.X86Wrmsr(index, data, reason, vcpu, serial)


def _tpr_access(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    rip, is_write = _TPR_ACCESS(page, UNION)
    return more.TprAccess(rip, bool(is_write))


def _ioapic_eoi(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return more.IoapicEoi(page[UNION])


def _notify(page: memoryview, vcpu: Vcpu | None, serial: int) -> Exit:
    return more.Notify(_U32(page, UNION)[0])


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
            more.Hlt,
            more.Shutdown,
            more.IrqWindowOpen,
            more.DirtyRingFull,
            more.Nmi,
            more.SetTpr,
            more.X86BusLock,
            more.ApResetHold,
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
