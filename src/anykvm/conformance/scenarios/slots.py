"""Slots that are deleted, moved and made while the guest uses their addresses."""

from __future__ import annotations

from anykvm.abi.constants import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP
from anykvm.abi.structures import kvm_guest_debug
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE

AREA = "slots"


@scenario("slot_deleted", area=AREA)
def slot_deleted(lab: Lab) -> None:
    """Where a slot was, there is MMIO for data and no emulation for code; where it moved to, its memory."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    host.put64(0, 0x123)
    host.put(PAGE, code.TARGET)
    m.slot(1, TEST, 4 * PAGE, host)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    lab.step("delete", m.delete_slot(1))
    m.run("write_mmio")
    m.run("next_read_mmio")
    m.answer_mmio(0x4242)
    m.run("read_completed")
    for guest, address, steps in (
        (code.JUMP, TEST + PAGE, ("exec_no_slot", "exec_no_slot_again")),
        (code.LOCK_CMPXCHG, TEST, ("cmpxchg_no_slot",)),
        (code.PUSH, TEST + 0x800, ("push_no_slot",)),
        (code.MOVDQU, TEST, ("movdqu_no_slot", "movdqu_no_slot2")),
        (code.FXSAVE, TEST, ("fxsave_no_slot",)),
    ):
        m.at(guest, address)
        for step in steps:
            m.run(step)
    lab.step("recreate_other_gpa", m.slot(1, TEST + 0x100000, 4 * PAGE, host))
    m.at(code.READ8, TEST + 0x100000)
    m.run("read_new_gpa")
    lab.step("move", m.slot(1, TEST + 0x200000, 4 * PAGE, host))
    m.at(code.READ8, TEST + 0x100000)
    m.run("old_gpa_mmio")
    m.answer_mmio(1)
    m.run("done")
    m.at(code.READ8, TEST + 0x200000)
    m.run("moved_gpa_read")


@scenario("misc", area=AREA)
def misc(lab: Lab) -> None:
    """Between a fault and the next KVM_RUN: single step, a changed RIP, a deleted slot, a new slot."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host)
    host.protect(PROT_NONE)
    _single_step(m)
    m.at(code.WRITE8, TEST)
    m.run("singlestep_efault")
    host.protect(READ_WRITE, 0, PAGE)
    m.run("singlestep_fixed")
    _single_step(m, False)
    host.protect(PROT_NONE, 0, PAGE)

    m.at(code.READ8, TEST)
    m.run("efault")
    m.change(rip=m.vcpu.get_regs().rip + 3, rax=0xFEE1)
    m.run("skip_insn_by_SET_REGS")

    m.at(code.READ8, TEST)
    m.run("efault_then_delete_slot")
    m.delete_slot(1)
    m.run("becomes_mmio")
    m.answer_mmio(5)
    m.run("done")

    m.at(code.READ8, TEST)
    m.run("mmio_pending")
    other = anonymous(PAGE)
    other.put64(0, 0x1111)
    m.slot(1, TEST, PAGE, other)
    m.answer_mmio(0x2222)
    m.run("mmio_read_then_slot_added_value_from_run_or_mem")
    m.at(code.READ8, TEST)
    m.run("now_memory")

    m.at(code.UD2)
    m.memory.put(0x40060, bytes.fromhex("e6 e6 f4").ljust(16, b"\0"))  # the #UD handler: out 0xe6, al; hlt
    m.run("ud2_handler")


def _single_step(machine: Machine, on: bool = True) -> None:
    control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP if on else 0
    attempt(lambda: machine.vcpu.set_guest_debug(kvm_guest_debug(control=control)))
