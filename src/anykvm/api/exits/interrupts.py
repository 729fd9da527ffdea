"""Interrupts and their controllers in user space."""

from __future__ import annotations

from dataclasses import dataclass

from anykvm.abi import constants as c
from anykvm.api.exits.base import Exit


@dataclass(slots=True, repr=False)
class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: ``request_interrupt_window`` was set, and the guest can take an interrupt now.

    >>> IrqWindowOpen()
    IrqWindowOpen()
    """

    exit_reason = c.KVM_EXIT_IRQ_WINDOW_OPEN


@dataclass(slots=True, repr=False)
class Nmi(Exit):
    """KVM_EXIT_NMI: an NMI arrived while the guest ran.

    >>> Nmi()
    Nmi()
    """

    exit_reason = c.KVM_EXIT_NMI


@dataclass(slots=True, repr=False)
class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered its TPR (``kvm_run.cr8``) and there is no in-kernel APIC.

    >>> SetTpr()
    SetTpr()
    """

    exit_reason = c.KVM_EXIT_SET_TPR


@dataclass(slots=True, repr=False)
class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: the guest ended interrupt ``vector`` and the I/O APIC is in user space.

    >>> IoapicEoi(0x30)
    IoapicEoi(vector=0x30)
    """

    exit_reason = c.KVM_EXIT_IOAPIC_EOI
    vector: int


@dataclass(slots=True, repr=False)
class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS: the guest accessed its TPR at ``rip`` (KVM_TPR_ACCESS_REPORTING).

    >>> TprAccess(0x7C00, True)
    TprAccess(rip=0x7c00, is_write=True)
    """

    exit_reason = c.KVM_EXIT_TPR_ACCESS
    rip: int
    is_write: bool


@dataclass(slots=True, repr=False)
class ApResetHold(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES guest's AP waits for its start.

    >>> ApResetHold()
    ApResetHold()
    """

    exit_reason = c.KVM_EXIT_AP_RESET_HOLD
