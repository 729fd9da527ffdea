"""IDT, GDT and stack in memory that is not there while an exception or interrupt is delivered."""

from __future__ import annotations

import ctypes

from anykvm.abi.ioctls import KVM_INTERRUPT
from anykvm.abi.structures import kvm_interrupt, kvm_sregs
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous
from anykvm.conformance.layout import GDT, IDT, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE

AREA = "descriptor_tables"
_INTERRUPT_FLAG = 0x200
_STACK = TEST + PAGE + 0x800
_PAGE_FAULT = 14


@scenario("idt_stack", area=AREA)
def idt_stack(lab: Lab) -> None:
    """A delivery that faults leaves what was to be delivered to be delivered again; each then succeeds."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host)
    original = m.vcpu.get_sregs()
    m.at(code.INT3)
    m.run("int3_ok")
    _idt(lab, m, host)
    m.vcpu.set_sregs(original)
    m.at(code.INT3_ON_STACK, _STACK)
    host.protect(PROT_NONE, PAGE, PAGE)
    m.run("int3_stack_unbacked")
    _exception(lab, m)
    host.protect(READ_WRITE, PAGE, PAGE)
    m.run("stack_fixed_resume")
    _gdt(m, host, original)
    m.vcpu.set_sregs(original)
    _interrupt(lab, m, host)
    _injected_page_fault(m, host)


def _idt(lab: Lab, m: Machine, host: Host) -> None:
    host.put(0, m.memory.get(IDT, PAGE))
    sregs = m.vcpu.get_sregs()
    sregs.idt.base = TEST
    m.vcpu.set_sregs(sregs)
    host.protect(PROT_NONE, 0, PAGE)
    m.at(code.INT3)
    m.run("int3_IDT_unbacked")
    _exception(lab, m)
    host.protect(READ_WRITE, 0, PAGE)
    m.run("IDT_fixed_resume")
    m.at(code.UD2)
    host.protect(PROT_NONE, 0, PAGE)
    m.run("ud2_IDT_unbacked")
    _exception(lab, m)
    host.protect(READ_WRITE, 0, PAGE)
    m.run("ud2_IDT_fixed_resume")


def _gdt(m: Machine, host: Host, original: kvm_sregs) -> None:
    sregs = kvm_sregs.from_buffer_copy(original)
    host.put(2 * PAGE, m.memory.get(GDT, 0x40))
    sregs.gdt.base = TEST + 2 * PAGE
    m.vcpu.set_sregs(sregs)
    m.at(code.LOAD_DS)
    host.protect(PROT_NONE, 2 * PAGE, PAGE)
    m.run("mov_ds_GDT_unbacked")
    host.protect(READ_WRITE, 2 * PAGE, PAGE)
    m.run("GDT_fixed_resume")


def _interrupt(lab: Lab, m: Machine, host: Host) -> None:
    m.at(code.SPIN)
    m.change(rflags=m.vcpu.get_regs().rflags | _INTERRUPT_FLAG, rsp=_STACK)
    host.protect(PROT_NONE, PAGE, PAGE)
    request = kvm_interrupt(0x40)
    lab.step("KVM_INTERRUPT", attempt(lambda: m.vcpu.ioctl(KVM_INTERRUPT, request)))
    m.run("external_irq_stack_unbacked")
    interrupt = m.vcpu.get_vcpu_events().interrupt
    lab.note("events", irq_injected=interrupt.injected, irq_nr=interrupt.nr)
    host.protect(READ_WRITE, PAGE, PAGE)
    m.run("irq_stack_fixed_resume")


def _injected_page_fault(m: Machine, host: Host) -> None:
    events = m.vcpu.get_vcpu_events()
    ctypes.memset(ctypes.addressof(events.exception), 0, ctypes.sizeof(events.exception))
    events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, _PAGE_FAULT, 1
    m.vcpu.set_vcpu_events(events)
    m.at(code.SPIN)
    m.change(rsp=_STACK)
    host.protect(PROT_NONE, PAGE, PAGE)
    m.run("injected_PF_stack_unbacked")
    host.protect(READ_WRITE, PAGE, PAGE)
    m.run("injected_PF_stack_fixed_resume")


def _exception(lab: Lab, m: Machine) -> None:
    exception = m.vcpu.get_vcpu_events().exception
    lab.note("events", pending=exception.pending, injected=exception.injected, nr=exception.nr)
