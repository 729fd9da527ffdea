"""The life cycle of exits: port and MMIO exits completed by the next KVM_RUN, and immediate_exit in between."""

from __future__ import annotations

from anykvm.abi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, anonymous, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario

AREA = "exits"


@scenario("immediate_exit", area=AREA)
def immediate_exit(lab: Lab) -> None:
    """immediate_exit completes what is pending, does not enter the guest, and leaves exit_reason alone."""
    m = lab.machine()
    _ports(m)
    _mmio(m)
    _after_efault(m)
    _after_memory_fault(lab)
    m.at(code.HALT)
    m.run("hlt")
    m.run_page.immediate_exit = 1
    m.run_as_is("after_hlt_nopoison")
    m.run_page.immediate_exit = 0
    m.at(code.SPIN)
    m.run_page.immediate_exit = 255
    m.run("immediate_exit_255")
    m.run_page.immediate_exit = 0


def _immediate(m: Machine, *steps: str) -> None:
    m.run_page.immediate_exit = 1
    for step in steps:
        m.run(step)
    m.run_page.immediate_exit = 0


def _ports(m: Machine) -> None:
    m.at(code.OUT_OUT)
    _immediate(m, "fresh", "fresh_again")
    m.run("run_pio_0x31")
    m.run_page.immediate_exit = 1
    m.run("after_pio_out")
    m.run("after_pio_out_2", poisoned=False)
    m.run_page.immediate_exit = 0
    m.run("resume_pio_0x32")
    m.at(code.IN)
    m.run("in_exit")
    m.pio_data(1)[0] = 0x5C
    _immediate(m, "after_pio_in_completes")
    m.run("resume")


def _mmio(m: Machine) -> None:
    m.at(code.READ8, TEST)
    m.run("mmio_read_exit")
    m.answer_mmio(0x1234567890)
    _immediate(m, "after_mmio_read_completes", "after_mmio_read_2")
    m.run("resume")
    m.at(code.WRITE8, TEST)
    m.run("mmio_write_exit")
    _immediate(m, "after_mmio_write")
    m.run("resume")
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("mmio_cross_write_frag1")
    _immediate(m, "mmio_cross_ie_frag2", "mmio_cross_ie_done")
    m.run("resume")


def _after_efault(m: Machine) -> None:
    host = inaccessible(PAGE)
    m.slot(1, TEST + 0x100000, PAGE, host)
    m.at(code.WRITE8, TEST + 0x100000)
    m.run("efault")
    m.run_page.exit_reason = 0
    m.run_page.immediate_exit = 1
    m.run_as_is("after_efault_nopoison")
    m.run("after_efault_poison")
    m.run_page.immediate_exit = 0
    host.protect(READ_WRITE)
    m.run("fixed_resume")


def _after_memory_fault(lab: Lab) -> None:
    m = lab.protected_machine()
    if m is None:
        return
    m.slot(1, TEST, PAGE, anonymous(PAGE))
    m.attributes(TEST, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    m.at(code.READ8, TEST)
    m.run("memory_fault_exit")
    m.run_page.immediate_exit = 1
    m.run_as_is("after_memory_fault_nopoison")
    m.run("after_memory_fault_poison")
    m.run_page.immediate_exit = 0
    m.run("memory_fault_again")
    m.attributes(TEST, PAGE, 0)
    m.run("fixed")
