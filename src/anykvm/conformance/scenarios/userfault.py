"""Host memory whose faults a userfaultfd resolves: KVM_RUN sleeps until it is, or until a signal."""

from __future__ import annotations

from anykvm.abi.ioctls import KVM_PRE_FAULT_MEMORY
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.conformance import guest_code as code
from anykvm.conformance import sigbus, uffd
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.pre_fault import pre_fault
from anykvm.conformance.uffd import Userfaultfd

AREA = "userfault"
SIZE = 16 * PAGE
_ALARM = 0.3


def registered(
    lab: Lab, m: Machine, host: Host, mode: int = uffd.MODE_MISSING, features: int = 0
) -> Userfaultfd | None:
    """Make a slot at TEST of ``host`` and register it; None, and a record, where this kernel does not allow it."""
    m.slot(1, TEST, SIZE, host)
    try:
        return Userfaultfd(host, mode, features, faults_of_the_kernel=lab.backend.name == "device")
    except OSError as error:
        lab.step("userfaultfd", Outcome(-1, error.errno or 0))
        return None


@scenario("uffd_missing", area=AREA, needs=("userfaultfd", "pre_fault"))
def uffd_missing(lab: Lab) -> None:
    """Without a handler a signal ends KVM_RUN; with one the guest, the emulator and a pre-fault go on."""
    m, host = lab.machine(), anonymous(SIZE)
    faults = registered(lab, m, host)
    if faults is None:
        return
    m.at(code.READ8, TEST)
    m.run("read_no_handler_alarm1s", timeout=1)
    m.at(code.WRITE8, TEST)
    m.run("write_no_handler_alarm1s", timeout=1)
    for message in faults.pending():
        lab.note("uffd_msg", **message)
    faults.handle()
    m.at(code.READ8, TEST)
    m.run("read_with_handler")
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_with_handler")
    lab.note("handler", msgs=faults.messages, flags=faults.flags)
    m.string(code.REP_INSB, TEST + 2 * PAGE, 0, 4)
    m.run("rep_insb_exit")
    m.run("rep_insb_emulator_write_with_handler")
    m.at(code.READ8, TEST + 3 * PAGE)
    request = kvm_pre_fault_memory(gpa=TEST + 4 * PAGE, size=PAGE)
    lab.step("pre_fault_with_handler", lambda: m.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, request), x=0)


@scenario("uffd_pre_fault", area=AREA, needs=("userfaultfd", "pre_fault"))
def uffd_pre_fault(lab: Lab) -> None:
    """KVM_PRE_FAULT_MEMORY of a page that nobody brings sleeps until a signal: EINTR, or what was done before it."""
    m, host = lab.machine(), anonymous(SIZE)
    faults = registered(lab, m, host)
    if faults is None:
        return
    faults.zero_page(4 * PAGE)
    for step, page, pages in (("first_page", 0, 2), ("second_page", 4, 2)):
        lab.signals.start(_ALARM)
        pre_fault(lab, m, step, TEST + page * PAGE, pages * PAGE)
        lab.signals.stop()
        lab.note("signals", **lab.signals.fields())


@scenario("uffd_sigbus", area=AREA, needs=("userfaultfd",))
def uffd_sigbus(lab: Lab) -> None:
    """With UFFD_FEATURE_SIGBUS a fault is an error at once, and no SIGBUS."""
    m, host = lab.machine(), anonymous(SIZE)
    faults = registered(lab, m, host, features=uffd.FEATURE_SIGBUS)
    if faults is None:
        return
    m.at(code.READ8, TEST)
    m.run("FEATURE_SIGBUS_read")
    m.at(code.WRITE8, TEST)
    m.run("FEATURE_SIGBUS_write")
    faults.zero_page(0)
    m.run("after_zeropage_resume")


@scenario("uffd_wp", area=AREA, needs=("userfaultfd",))
def uffd_wp(lab: Lab) -> None:
    """A write to a write-protected page waits like a missing one."""
    m, host = lab.machine(), anonymous(SIZE)
    host.put(0, b"\x01" * SIZE)
    faults = registered(lab, m, host, uffd.MODE_WP, uffd.FEATURE_WP)
    if faults is None:
        return
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    lab.step("writeprotect", lambda: faults.write_protect(0, SIZE))
    m.run("write_no_handler_alarm1s", timeout=1)
    faults.handle(lambda offset: _allow(faults, offset))
    m.run("write_with_handler")
    m.run("readback")


def _allow(faults: Userfaultfd, offset: int) -> None:
    faults.write_protect(offset, PAGE, on=False)


@scenario("uffd_poison", area=AREA, needs=("userfaultfd", "poison"))
def uffd_poison(lab: Lab) -> None:
    """A page marked with UFFDIO_POISON is a poisoned page: SIGBUS and EINTR."""
    m, host = lab.machine(), anonymous(SIZE)
    faults = registered(lab, m, host, features=uffd.FEATURE_POISON)
    if faults is None:
        return
    with sigbus.caught(lab.signals):
        lab.step("UFFDIO_POISON", lambda: faults.poison(0))
        m.at(code.READ8, TEST + 0x20)
        m.run("read")
        m.at(code.WRITE8, TEST + 0x20)
        m.run("write")


@scenario("uffd_apf", area=AREA, needs=("userfaultfd", "irqchip"))
def uffd_apf(lab: Lab) -> None:
    """With an in-kernel interrupt controller, where KVM may fault asynchronously, it looks the same."""
    m, host = lab.irqchip_machine(), anonymous(SIZE)
    if m is None:
        return
    faults = registered(lab, m, host)
    if faults is None:
        return
    m.at(code.READ8, TEST)
    m.run("irqchip_read_no_handler_alarm1s", timeout=1)
    faults.handle()
    m.run("irqchip_with_handler")
