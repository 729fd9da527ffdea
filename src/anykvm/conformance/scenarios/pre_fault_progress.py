"""KVM_PRE_FAULT_MEMORY on plain memory: how far it gets, and what it leaves alone: ABI.md 4.5."""

from __future__ import annotations

import signal
import threading
import time
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.pre_fault import pre_fault
from anykvm.host.libc import PROT_READ

AREA = "pre_fault"
NEEDS: Final = ("pre_fault",)
_SIZE: Final = 16 * PAGE
_ALARM: Final = 0.5
_SETTLE: Final = 0.2


def _machine(lab: Lab) -> Machine:
    m = lab.machine()
    m.slot(1, TEST, _SIZE, anonymous(_SIZE))
    return m


@scenario("pre_fault_ends", area=AREA, needs=NEEDS)
def pre_fault_ends(lab: Lab) -> None:
    """At the end of a slot it stops with what it has done; the next call there is ENOENT."""
    m = _machine(lab)
    for step, gpa, size in (
        ("last_page", TEST + _SIZE - PAGE, PAGE),
        ("over_the_end", TEST + _SIZE - PAGE, 2 * PAGE),
        ("at_the_end", TEST + _SIZE, PAGE),
        ("before_the_slot", TEST - PAGE, 2 * PAGE),
        ("largest", TEST, (1 << 64) - PAGE - TEST),
    ):
        pre_fault(lab, m, step, gpa, size)


@scenario("pre_fault_fields", area=AREA, needs=NEEDS)
def pre_fault_fields(lab: Lab) -> None:
    """Each flag bit is refused, the padding is not looked at, and the structure is given back on errors too."""
    m = _machine(lab)
    for bit in (0, 1, 31, 63):
        pre_fault(lab, m, f"flag_{bit}", TEST, PAGE, flags=1 << bit)
    request = kvm_pre_fault_memory(gpa=TEST, size=PAGE)
    for at in range(5):
        request.padding[at] = 0xFFFF
    outcome = attempt(m.vcpu.ioctl, n.KVM_PRE_FAULT_MEMORY, request)
    lab.step("padding", outcome, gpa=hex(request.gpa), left=request.size, padding=hex(request.padding[4]))
    for size in (1, PAGE - 1, PAGE + 1):
        pre_fault(lab, m, f"size_{size}", TEST, size)


@scenario("pre_fault_signal", area=AREA, needs=NEEDS)
def pre_fault_signal(lab: Lab) -> None:
    """A pending signal that the thread has blocked does not end it, whatever KVM_SET_SIGNAL_MASK opens for KVM_RUN."""
    m = _machine(lab)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.raise_signal(signal.SIGUSR1)
    pre_fault(lab, m, "blocked", TEST, PAGE)
    m.vcpu.set_signal_mask(())
    pre_fault(lab, m, "open_in_KVM_RUN_only", TEST, PAGE)
    lab.note("after", still_pending=signal.SIGUSR1 in signal.sigpending())


@scenario("pre_fault_signal_at_entry", area=AREA, needs=(*NEEDS, "smp"))
def pre_fault_signal_at_entry(lab: Lab) -> None:
    """A signal that came while it waited for the vCPU, which another thread ran, ends it before the first page."""
    m = _machine(lab)
    m.at(code.SPIN)
    waiting = threading.main_thread().ident or 0
    began = threading.Event()

    def run_guest() -> None:
        began.set()
        attempt(m.vcpu.ioctl, n.KVM_RUN)

    runner = threading.Thread(target=run_guest)

    def kick() -> None:
        began.wait()
        time.sleep(_SETTLE)
        signal.pthread_kill(waiting, signal.SIGUSR1)
        time.sleep(_SETTLE)
        signal.pthread_kill(runner.ident or 0, signal.SIGALRM)

    kicker = threading.Thread(target=kick)
    runner.start()
    kicker.start()
    began.wait()
    time.sleep(_SETTLE / 2)
    request = kvm_pre_fault_memory(gpa=TEST, size=2 * PAGE)
    outcome = attempt(m.vcpu.ioctl, n.KVM_PRE_FAULT_MEMORY, request)
    runner.join()
    kicker.join()
    lab.step("signal_while_it_waited", outcome, gpa=hex(request.gpa), left=request.size, users=lab.signals.users)
    pre_fault(lab, m, "again", TEST, 2 * PAGE)


@scenario("pre_fault_pending_exit", area=AREA, needs=NEEDS)
def pre_fault_pending_exit(lab: Lab) -> None:
    """Between an exit and its completion it changes nothing, whether it succeeds or fails."""
    m = _machine(lab)
    m.at(code.READ8, TEST + 0x1000000)
    m.run("device_read")
    m.answer_mmio(0x5151515151515151)
    for step, gpa in (("ok", TEST), ("no_slot", TEST + 0x2000000)):
        request = kvm_pre_fault_memory(gpa=gpa, size=PAGE)
        lab.ioctl(step, m.vcpu, n.KVM_PRE_FAULT_MEMORY, request)
        lab.note("kvm_run", reason=m.run_page.exit_reason, data=bytes(m.run_page.mmio.data).hex())
    m.run("completed", poisoned=False)


@scenario("pre_fault_slots", area=AREA, needs=NEEDS)
def pre_fault_slots(lab: Lab) -> None:
    """It goes from slot to slot, does not write, and sees a deleted slot at once."""
    m, host = _machine(lab), anonymous(4 * PAGE, PROT_READ)
    m.slot(2, TEST + _SIZE, 4 * PAGE, host, c.KVM_MEM_READONLY)
    pre_fault(lab, m, "two_slots", TEST + _SIZE - 2 * PAGE, 4 * PAGE)
    m.delete_slot(2)
    lab.signals.start(_ALARM)  # Linux 6.12 tries a page of a deleted slot again and again
    pre_fault(lab, m, "one_deleted", TEST + _SIZE - 2 * PAGE, 4 * PAGE)
    lab.signals.stop()
    m.slot(3, TEST + 0x100000, PAGE, 0x700000000000)
    pre_fault(lab, m, "never_mapped", TEST + 0x100000, PAGE)
    m.at(code.READ8, TEST + 0x100000)
    m.run("guest_is_told_the_same")
