"""Signals and KVM_RUN: before entry, while the guest runs, after an exit; with and without KVM_SET_SIGNAL_MASK."""

from __future__ import annotations

import ctypes
import signal

from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_signal_mask
from anykvm.api.flexible import flexible
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "signals"
_INTERRUPT_FLAG = 0x200


@scenario("signal", area=AREA)
def signals(lab: Lab) -> None:
    """A pending signal ends KVM_RUN with EINTR, if it is open during KVM_RUN; what was pending is completed first."""
    m = lab.machine()
    user = {signal.SIGUSR1}
    m.at(code.SPIN)
    m.run("spin_alarm_300ms", timeout=0.3)

    signal.pthread_sigmask(signal.SIG_BLOCK, user)
    signal.raise_signal(signal.SIGUSR1)
    m.at(code.OUT_OUT)
    m.run("blocked_pending_no_kvm_mask_runs")
    lab.step("SET_SIGNAL_MASK_empty", _set_mask(m, 8))
    m.at(code.OUT_OUT)
    m.run("pending_and_open_in_kvm_mask")
    lab.note("after", still_pending=int(signal.SIGUSR1 in signal.sigpending()), handler_ran=lab.signals.users)
    m.run("again")
    m.slot(1, TEST, PAGE, inaccessible(PAGE))
    m.at(code.WRITE8, TEST)
    m.run("pending_vs_efault")

    signal.sigtimedwait(user, 0)
    m.at(code.READ8, TEST + 0x100000)
    m.run("consumed_mmio_read")
    m.answer_mmio(0x77)
    signal.raise_signal(signal.SIGUSR1)
    m.run("pending_after_mmio_read_completes")
    signal.sigtimedwait(user, 0)
    m.run("resume")

    m.at(code.OUT_OUT)
    m.run("pio")
    signal.raise_signal(signal.SIGUSR1)
    m.run("pending_after_pio")
    m.run_page.immediate_exit = 1
    m.run("pending_and_immediate_exit")
    m.run_page.immediate_exit = 0
    lab.step("SET_SIGNAL_MASK_len4", _set_mask(m, 4))
    lab.step("SET_SIGNAL_MASK_NULL", lambda: m.vcpu.ioctl(n.KVM_SET_SIGNAL_MASK, 0))
    m.at(code.OUT_OUT)
    m.run("mask_removed_runs")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, user)
    lab.note("unblocked", handler_ran=lab.signals.users)

    m.at(code.SPIN)
    m.change(rflags=m.vcpu.get_regs().rflags | _INTERRUPT_FLAG)
    m.run_page.request_interrupt_window = 1
    m.run("irq_window", timeout=0.5)
    m.run_page.request_interrupt_window = 0


def _set_mask(m: Machine, length: int) -> Outcome:
    """KVM_SET_SIGNAL_MASK with no signal blocked, and a length that may be wrong."""
    buffer, header = flexible(kvm_signal_mask, ctypes.c_uint8, 8)
    header.len = length
    return attempt(lambda: m.vcpu.ioctl(n.KVM_SET_SIGNAL_MASK, buffer))
