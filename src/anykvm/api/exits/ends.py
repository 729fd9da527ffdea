"""The guest stopped, was reset, or could not go on."""

from __future__ import annotations

from dataclasses import dataclass

from anykvm.abi import constants as c
from anykvm.api.exits.base import Exit


@dataclass(slots=True, repr=False)
class Hlt(Exit):
    """KVM_EXIT_HLT: the guest executed HLT and there is no in-kernel interrupt controller to wake it.

    >>> Hlt()
    Hlt()
    """

    exit_reason = c.KVM_EXIT_HLT


@dataclass(slots=True, repr=False)
class Shutdown(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault. The vCPU's state is undefined, it may even have been reset.

    >>> Shutdown()
    Shutdown()
    """

    exit_reason = c.KVM_EXIT_SHUTDOWN


@dataclass(slots=True, repr=False)
class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: shutdown, reset, crash...; ``type`` is a KVM_SYSTEM_EVENT_* value.

    >>> SystemEvent(c.KVM_SYSTEM_EVENT_RESET, ())
    SystemEvent(type=2, data=())
    """

    exit_reason = c.KVM_EXIT_SYSTEM_EVENT
    type: int
    data: tuple[int, ...]
    """The first ``ndata`` 64-bit values."""


@dataclass(slots=True, repr=False)
class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest.

    >>> FailEntry(0x80000021, 0)
    FailEntry(hardware_entry_failure_reason=0x80000021, cpu=0)
    """

    exit_reason = c.KVM_EXIT_FAIL_ENTRY
    hardware_entry_failure_reason: int
    cpu: int


@dataclass(slots=True, repr=False)
class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on; ``suberror`` is a KVM_INTERNAL_ERROR_* value.

    >>> InternalError(c.KVM_INTERNAL_ERROR_EMULATION, (1, 0x0B0F02)).instruction
    b'\\x0f\\x0b'
    """

    exit_reason = c.KVM_EXIT_INTERNAL_ERROR
    suberror: int
    data: tuple[int, ...]
    """The first ``ndata`` 64-bit values."""

    @property
    def instruction(self) -> bytes:
        """The bytes of the instruction that could not be emulated, if KVM gave them, else empty."""
        flag = c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if self.suberror != c.KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 2 or not self.data[0] & flag:
            return b""
        raw = b"".join(value.to_bytes(8, "little") for value in self.data[1:3])
        return raw[1 : 1 + raw[0]]


@dataclass(slots=True, repr=False)
class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or single step of KVM_SET_GUEST_DEBUG.

    >>> Debug(1, 0x7C00, 0x4000, 0x400)
    Debug(exception=1, pc=0x7c00, dr6=0x4000, dr7=0x400)
    """

    exit_reason = c.KVM_EXIT_DEBUG
    exception: int
    pc: int
    dr6: int
    dr7: int
