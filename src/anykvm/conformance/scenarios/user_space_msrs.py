"""MSR accesses that user space answers: KVM_CAP_X86_USER_SPACE_MSR, ABI.md 1.3."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "user_space_msrs"
NEEDS: Final = ("user_space_msr",)
_UNKNOWN: Final = 0x12345678
_EFER: Final = 0xC0000080
_RDMSR: Final = bytes.fromhex("0f32e610f4")  # rdmsr; out 0x10, al; hlt
_WRMSR: Final = bytes.fromhex("0f30e610f4")  # wrmsr; out 0x10, al; hlt


def _seen(lab: Lab, m: Machine) -> None:
    msr = m.run_page.msr
    lab.note("msr", index=hex(msr.index), reason=msr.reason, data=hex(msr.data), error=msr.error)


def _enabled(lab: Lab, reasons: int) -> Machine | None:
    m = lab.machine()
    enabled = lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_X86_USER_SPACE_MSR, reasons))
    return None if enabled.failed else m


@scenario("msr_exits_enable", area=AREA, needs=NEEDS)
def msr_exits_enable(lab: Lab) -> None:
    """Which reasons may be asked for."""
    m = lab.machine()
    for bit in (0, 1, 2, 3, 31, 63):
        lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_X86_USER_SPACE_MSR, 1 << bit), bit=bit)


@scenario("msr_exit_read", area=AREA, needs=NEEDS)
def msr_exit_read(lab: Lab) -> None:
    """RDMSR of an MSR that KVM does not know: user space gives its value, or #GP."""
    m = _enabled(lab, c.KVM_MSR_EXIT_REASON_UNKNOWN)
    if m is None:
        return
    m.at(_RDMSR, rcx=_UNKNOWN)
    m.run("read")
    _seen(lab, m)
    m.run_page.msr.data = 0x1122334455667788
    m.run_page.msr.error = 0
    m.run("answered")
    lab.note("rdx", rdx=hex(m.vcpu.get_regs().rdx))
    m.at(_RDMSR, rcx=_UNKNOWN)
    m.run("read_again")
    m.run_page.msr.error = 1
    m.run("refused")


@scenario("msr_exit_write", area=AREA, needs=NEEDS)
def msr_exit_write(lab: Lab) -> None:
    """WRMSR of an unknown MSR, and of a known one to a bad value, which is another reason; completion by itself."""
    m = _enabled(lab, c.KVM_MSR_EXIT_REASON_UNKNOWN | c.KVM_MSR_EXIT_REASON_INVAL)
    if m is None:
        return
    m.at(_WRMSR, rcx=_UNKNOWN, rax=0x55667788, rdx=0x11223344)
    m.run("write")
    _seen(lab, m)
    m.run_page.msr.error = 0
    m.run_page.immediate_exit = 1
    m.run("answered_immediate_exit")
    m.run_page.immediate_exit = 0
    m.run("goes_on")
    m.at(_WRMSR, rcx=_EFER, rax=0xD02)
    m.run("bad_value")
    _seen(lab, m)
    m.run_page.msr.error = 1
    m.run("refused")
