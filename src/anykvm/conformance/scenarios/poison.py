"""Poisoned pages of ordinary host memory: a SIGBUS to the vCPU's thread and EINTR, never a memory fault.

This poisons real pages of the machine's memory (MADV_HWPOISON, as root): run it in a virtual machine.
"""

from __future__ import annotations

import signal

from anykvm.abi.ioctls import KVM_PRE_FAULT_MEMORY
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.conformance import guest_code as code
from anykvm.conformance import sigbus
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "poison"
SIZE = 8 * PAGE
_MADV_HWPOISON = 100
_BUS = {signal.SIGBUS}


@scenario("hwpoison", area=AREA, needs=("poison", "pre_fault"))
def hwpoison(lab: Lab) -> None:
    """Accesses of every kind to a poisoned page, with SIGBUS open, blocked, open only in KVM_RUN, and ignored."""
    m, host = lab.machine(), anonymous(SIZE)
    host.put(0, b"\x11" * SIZE)
    m.slot(1, TEST, SIZE, host)
    with sigbus.caught(lab.signals):
        if not _poison(lab, host, PAGE, "madvise_HWPOISON"):
            return
        m.at(code.READ8, TEST + PAGE + 0x18)
        m.run("read_never_mapped_by_guest")
        m.run("again")
        for guest, address, step in (
            (code.WRITE8, TEST + PAGE + 0x18, "write"),
            (code.JUMP, TEST + PAGE, "exec"),
            (code.READ8, TEST + PAGE - 4, "read_cross_into_poison"),
        ):
            m.at(guest, address)
            m.run(step)
        lab.note("hva_base", h=hex(host.address))
        m.at(code.READ_WRITE_READ, TEST + 2 * PAGE)
        m.run("page2_read_ok")
        _poison(lab, host, 2 * PAGE, "madvise_HWPOISON_mapped_in_guest")
        m.run("page2_write_after_poison")
        _blocked(lab, m)
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
    m.at(code.READ8, TEST + PAGE)
    m.run("read_SIGBUS_ignored_alarm1s", timeout=1)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    with sigbus.caught(lab.signals):
        _emulator_and_pre_fault(lab, m, host)


def _poison(lab: Lab, host: Host, offset: int, step: str) -> bool:
    lab.signals.clear()
    outcome = attempt(lambda: host.advise(_MADV_HWPOISON, offset, PAGE))
    lab.step(step, outcome, sigbus_during=len(lab.signals.bus_errors))
    return not outcome.failed


def _blocked(lab: Lab, m: Machine) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _BUS)
    m.at(code.READ8, TEST + PAGE)
    m.run("read_SIGBUS_blocked_alarm1s", timeout=1)
    lab.note("pending", sigbus_pending=int(signal.SIGBUS in signal.sigpending()))
    for info in sigbus.take_pending():
        lab.note("dequeued", si_code=info["si_code"], lsb=info["addr_lsb"], addr=hex(info["addr"]))
    m.vcpu.set_signal_mask(())
    m.at(code.READ8, TEST + PAGE)
    m.run("read_SIGBUS_blocked_but_open_in_KVM_mask", timeout=1)
    m.vcpu.set_signal_mask(None)
    for info in sigbus.take_pending():
        lab.note("dequeued", si_code=info["si_code"], lsb=info["addr_lsb"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BUS)


def _emulator_and_pre_fault(lab: Lab, m: Machine, host: Host) -> None:
    host.fix(PAGE, PAGE)
    m.at(code.READ8, TEST + PAGE)
    m.run("read_after_mmap_fixed_over_poison")
    m.string(code.REP_OUTSB, 0, TEST + 2 * PAGE, 4)
    m.run("rep_outsb_from_poison_emulator")
    m.string(code.REP_INSB, TEST + 2 * PAGE, 0, 4)
    m.run("rep_insb_to_poison_emulator")
    m.run("rep_insb_to_poison_emulator_resume")
    request = kvm_pre_fault_memory(gpa=TEST + 2 * PAGE, size=PAGE)
    lab.signals.clear()
    outcome = attempt(lambda: m.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, request))
    lab.step("pre_fault_poison", outcome, size_left=request.size, sigbus=len(lab.signals.bus_errors))
