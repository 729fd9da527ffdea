"""Requests that user space answers in registers: hypercalls and MSRs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.reading import field, span
from anykvm.abi.structures import kvm_run
from anykvm.api.exits.base import Answerable

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu


class Hypercall(Answerable):
    """KVM_EXIT_HYPERCALL: the guest called hypercall ``nr`` (KVM_CAP_EXIT_HYPERCALL). Answer with ``respond``.

    >>> Hypercall(12, (0x1000, 1, 0, 0, 0, 0), 0)
    Hypercall(nr=0xc, args=(4096, 1, 0, 0, 0, 0), flags=0)
    """

    __slots__ = ("args", "flags", "nr")
    __match_args__ = ("nr", "args", "flags")
    exit_reason = c.KVM_EXIT_HYPERCALL
    RET: Final = span(kvm_run, "hypercall.ret")
    """Where the answer goes in kvm_run."""

    def __init__(self, nr: int, args: tuple[int, ...], flags: int, vcpu: Vcpu | None = None, serial: int = 0) -> None:
        """Make one; without a vCPU it cannot be answered."""
        self.nr = nr
        self.args = args
        self.flags = flags
        self._comes_from(vcpu, serial)

    def respond(self, value: int) -> None:
        """Set the guest's RAX. Raises StaleExit when the vCPU has been run again or closed."""
        self._page()[self.RET] = (value & (1 << 64) - 1).to_bytes(8, "little")


class _Msr(Answerable):
    """Base of the accesses to an MSR."""

    __slots__ = ("data", "index", "reason")
    __match_args__ = ("index", "data", "reason")
    ERROR: Final = field(kvm_run, "msr.error")[0]
    DATA: Final = span(kvm_run, "msr.data")

    def __init__(self, index: int, data: int, reason: int, vcpu: Vcpu | None = None, serial: int = 0) -> None:
        """Make one; ``reason`` is a KVM_MSR_EXIT_REASON_* bit; without a vCPU it cannot be answered."""
        self.index = index
        self.data = data
        self.reason = reason
        self._comes_from(vcpu, serial)

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
