"""The less frequent exits of KVM_RUN; see ``exits`` for what all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.abi import constants as c
from anykvm.api.exits import Answerable, Exit

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu


class Hlt(Exit):
    """KVM_EXIT_HLT: the guest executed HLT and there is no in-kernel interrupt controller to wake it.

    >>> Hlt()
    Hlt()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_HLT


class Shutdown(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault. The vCPU's state is undefined, it may even have been reset.

    >>> Shutdown()
    Shutdown()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_SHUTDOWN


class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: ``request_interrupt_window`` was set, and the guest can take an interrupt now.

    >>> IrqWindowOpen()
    IrqWindowOpen()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_IRQ_WINDOW_OPEN


class DirtyRingFull(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the ring and ``Vm.reset_dirty_rings()``, or every run ends so.

    >>> DirtyRingFull()
    DirtyRingFull()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_DIRTY_RING_FULL


class Nmi(Exit):
    """KVM_EXIT_NMI: an NMI arrived while the guest ran.

    >>> Nmi()
    Nmi()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_NMI


class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered its TPR (``kvm_run.cr8``) and there is no in-kernel APIC.

    >>> SetTpr()
    SetTpr()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_SET_TPR


class X86BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT).

    >>> X86BusLock()
    X86BusLock()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_X86_BUS_LOCK


class ApResetHold(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES guest's AP waits for its start.

    >>> ApResetHold()
    ApResetHold()
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_AP_RESET_HOLD


class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: the guest ended interrupt ``vector`` and the I/O APIC is in user space.

    >>> IoapicEoi(0x30)
    IoapicEoi(vector=0x30)
    """

    __slots__ = ("vector",)
    __match_args__ = ("vector",)
    exit_reason = c.KVM_EXIT_IOAPIC_EOI

    def __init__(self, vector: int) -> None:
        """Make one."""
        self.vector = vector


class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS: the guest accessed its TPR at ``rip`` (KVM_TPR_ACCESS_REPORTING).

    >>> TprAccess(0x7C00, True)
    TprAccess(rip=0x7c00, is_write=True)
    """

    __slots__ = ("is_write", "rip")
    __match_args__ = ("rip", "is_write")
    exit_reason = c.KVM_EXIT_TPR_ACCESS

    def __init__(self, rip: int, is_write: bool) -> None:
        """Make one."""
        self.rip = rip
        self.is_write = is_write


class Notify(Exit):
    """KVM_EXIT_NOTIFY: no event window for too long (KVM_CAP_X86_NOTIFY_VMEXIT).

    >>> Notify(1)
    Notify(flags=1)
    """

    __slots__ = ("flags",)
    __match_args__ = ("flags",)
    exit_reason = c.KVM_EXIT_NOTIFY

    def __init__(self, flags: int) -> None:
        """Make one."""
        self.flags = flags


class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest.

    >>> FailEntry(0x80000021, 0)
    FailEntry(hardware_entry_failure_reason=0x80000021, cpu=0)
    """

    __slots__ = ("cpu", "hardware_entry_failure_reason")
    __match_args__ = ("hardware_entry_failure_reason", "cpu")
    exit_reason = c.KVM_EXIT_FAIL_ENTRY

    def __init__(self, hardware_entry_failure_reason: int, cpu: int) -> None:
        """Make one."""
        self.hardware_entry_failure_reason = hardware_entry_failure_reason
        self.cpu = cpu


class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on; ``suberror`` is a KVM_INTERNAL_ERROR_* value.

    >>> InternalError(c.KVM_INTERNAL_ERROR_EMULATION, (1, 0x0B0F02)).instruction
    b'\\x0f\\x0b'
    """

    __slots__ = ("data", "suberror")
    __match_args__ = ("suberror", "data")
    exit_reason = c.KVM_EXIT_INTERNAL_ERROR

    def __init__(self, suberror: int, data: tuple[int, ...]) -> None:
        """Make one; ``data`` are the first ``ndata`` 64-bit values."""
        self.suberror = suberror
        self.data = data

    @property
    def instruction(self) -> bytes:
        """The bytes of the instruction that could not be emulated, if KVM gave them, else empty."""
        flag = c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if self.suberror != c.KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 2 or not self.data[0] & flag:
            return b""
        raw = b"".join(value.to_bytes(8, "little") for value in self.data[1:3])
        return raw[1 : 1 + raw[0]]


class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or single step of KVM_SET_GUEST_DEBUG.

    >>> Debug(1, 0x7C00, 0x4000, 0x400)
    Debug(exception=1, pc=0x7c00, dr6=0x4000, dr7=0x400)
    """

    __slots__ = ("dr6", "dr7", "exception", "pc")
    __match_args__ = ("exception", "pc", "dr6", "dr7")
    exit_reason = c.KVM_EXIT_DEBUG

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        """Make one."""
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: shutdown, reset, crash...; ``type`` is a KVM_SYSTEM_EVENT_* value.

    >>> SystemEvent(c.KVM_SYSTEM_EVENT_RESET, ())
    SystemEvent(type=2, data=())
    """

    __slots__ = ("data", "type")
    __match_args__ = ("type", "data")
    exit_reason = c.KVM_EXIT_SYSTEM_EVENT

    def __init__(self, type: int, data: tuple[int, ...]) -> None:
        """Make one; ``data`` are the first ``ndata`` 64-bit values."""
        self.type = type
        self.data = data


class Hypercall(Answerable):
    """KVM_EXIT_HYPERCALL: the guest called hypercall ``nr`` (KVM_CAP_EXIT_HYPERCALL). Answer with ``respond``.

    >>> Hypercall(12, (0x1000, 1, 0, 0, 0, 0), 0)
    Hypercall(nr=0xc, args=(4096, 1, 0, 0, 0, 0), flags=0)
    """

    __slots__ = ("args", "flags", "nr")
    __match_args__ = ("nr", "args", "flags")
    exit_reason = c.KVM_EXIT_HYPERCALL
    RET = slice(88, 96)

    def __init__(self, nr: int, args: tuple[int, ...], flags: int, vcpu: Vcpu | None = None, serial: int = 0) -> None:
        """Make one; without a vCPU it cannot be answered."""
        self.nr = nr
        self.args = args
        self.flags = flags
        self._vcpu = vcpu
        self._serial = serial

    def respond(self, value: int) -> None:
        """Set the guest's RAX. Raises StaleExit when the vCPU has been run again or closed."""
        self._page()[self.RET] = (value & (1 << 64) - 1).to_bytes(8, "little")


class _Msr(Answerable):
    __slots__ = ("data", "index", "reason")
    __match_args__ = ("index", "data", "reason")
    ERROR = 32
    DATA = slice(48, 56)

    def __init__(self, index: int, data: int, reason: int, vcpu: Vcpu | None = None, serial: int = 0) -> None:
        """Make one; ``reason`` is a KVM_MSR_EXIT_REASON_* bit; without a vCPU it cannot be answered."""
        self.index = index
        self.data = data
        self.reason = reason
        self._vcpu = vcpu
        self._serial = serial

    def fail(self) -> None:
        """Make the access fault: #GP in the guest. Raises StaleExit as ``respond``."""
        self._page()[self.ERROR] = 1


class X86Rdmsr(_Msr):
    """KVM_EXIT_X86_RDMSR: the guest reads an MSR that user space asked to handle (KVM_CAP_X86_USER_SPACE_MSR).

    >>> X86Rdmsr(0x1234, 0, c.KVM_MSR_EXIT_REASON_FILTER)
    X86Rdmsr(index=0x1234, data=0, reason=4)
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_X86_RDMSR

    def respond(self, value: int) -> None:
        """Give the MSR's 64-bit value. Raises StaleExit when the vCPU has been run again or closed."""
        page = self._page()
        page[self.ERROR] = 0
        page[self.DATA] = value.to_bytes(8, "little")
        self.data = value


class X86Wrmsr(_Msr):
    """KVM_EXIT_X86_WRMSR: the guest writes ``data`` to an MSR that user space asked to handle.

    >>> X86Wrmsr(0x1234, 7, c.KVM_MSR_EXIT_REASON_UNKNOWN)
    X86Wrmsr(index=0x1234, data=7, reason=2)
    """

    __slots__ = ()
    exit_reason = c.KVM_EXIT_X86_WRMSR

    def respond(self) -> None:
        """Accept the write. Raises StaleExit when the vCPU has been run again or closed."""
        self._page()[self.ERROR] = 0
