"""Interrupts, events, signals and debugging of a vCPU."""

from __future__ import annotations

import ctypes
import errno as _errno
from collections.abc import Iterable

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.api.flexible import flexible, tail
from anykvm.api.handle import Handle


class VcpuEvents(Handle):
    """The ioctls of ``Vcpu`` about what may interrupt it."""

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue external interrupt ``irq``.

        Raises OSError: EINVAL above 255, ENXIO with an in-kernel irqchip, EEXIST while one is queued.
        """
        self._call(n.KVM_INTERRUPT, s.kvm_interrupt(irq=irq), {"irq": irq}, _why_interrupt)

    def nmi(self) -> None:
        """KVM_NMI: queue an NMI."""
        self._call(n.KVM_NMI)

    def smi(self) -> None:
        """KVM_SMI: queue an SMI."""
        self._call(n.KVM_SMI)

    def get_vcpu_events(self) -> s.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS: pending and injected exceptions, interrupts, NMIs, SMIs."""
        return self._get(n.KVM_GET_VCPU_EVENTS, s.kvm_vcpu_events)

    def set_vcpu_events(self, events: s.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS. Raises OSError: EINVAL for unknown flags or an impossible exception."""
        self._call(n.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a KVM_MP_STATE_* value."""
        return self._get(n.KVM_GET_MP_STATE, s.kvm_mp_state).mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE.

        Raises OSError: EINVAL for an unknown state, or other than RUNNABLE without an in-kernel local APIC.
        """
        self._call(n.KVM_SET_MP_STATE, s.kvm_mp_state(mp_state=mp_state), {"mp_state": mp_state})

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked during KVM_RUN in place of the thread's mask.

        A signal not blocked by it ends ``run`` with ``Intr``. None goes back to the thread's own mask.
        Raises ValueError for a signal not in 1..64.
        """
        if signals is None:
            self._call(n.KVM_SET_SIGNAL_MASK, 0)
            return
        mask = 0
        for signal in signals:
            if not 1 <= signal <= 64:
                raise ValueError(f"no signal has number {signal}")
            mask |= 1 << signal - 1
        buffer, header = flexible(s.kvm_signal_mask, ctypes.c_uint8, 8)
        header.len = 8
        tail(buffer, header, ctypes.c_uint8, 8)[:] = list(mask.to_bytes(8, "little"))
        self._call(n.KVM_SET_SIGNAL_MASK, buffer, {"mask": mask})

    def set_guest_debug(self, debug: s.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG: breakpoints and single step. Raises OSError: EBUSY, EINVAL."""
        self._call(n.KVM_SET_GUEST_DEBUG, debug, {"control": debug.control})

    def get_lapic(self) -> s.kvm_lapic_state:
        """KVM_GET_LAPIC: the in-kernel local APIC's registers. Raises OSError: EINVAL without one."""
        return self._get(n.KVM_GET_LAPIC, s.kvm_lapic_state)

    def set_lapic(self, lapic: s.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC. Raises OSError: EINVAL without an in-kernel local APIC."""
        self._call(n.KVM_SET_LAPIC, lapic)

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING: make the guest's TPR accesses exit (``TprAccess``). EINVAL without a local APIC."""
        self._call(n.KVM_TPR_ACCESS_REPORTING, s.kvm_tpr_access_ctl(enabled=int(enabled)))

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR: where KVM shares the virtual APIC state. Raises OSError: EINVAL without a local APIC."""
        address = s.kvm_vapic_addr(vapic_addr=vapic_addr)
        self._call(n.KVM_SET_VAPIC_ADDR, address, {"vapic_addr": vapic_addr})

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE: the vCPU's MCG_CAP. Raises OSError: EINVAL for unsupported bits."""
        value = (ctypes.c_uint8 * 8).from_buffer_copy(mcg_cap.to_bytes(8, "little"))
        self._call(n.KVM_X86_SETUP_MCE, value, {"mcg_cap": mcg_cap})

    def x86_set_mce(self, mce: s.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE: inject a machine check. Raises OSError: EINVAL."""
        self._call(n.KVM_X86_SET_MCE, mce, {"bank": mce.bank, "status": mce.status})


def _why_interrupt(errno: int) -> str | None:
    return {
        _errno.ENXIO: "there is an in-kernel interrupt controller",
        _errno.EEXIST: "an interrupt is queued already",
        _errno.EINVAL: "irq is above 255",
    }.get(errno)
