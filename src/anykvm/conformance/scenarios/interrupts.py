"""Interrupts that user space injects, the interrupt window, NMI, and signals that compete with them: row 30."""

from __future__ import annotations

import ctypes
import signal
from typing import Final

from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_interrupt
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import catch_error_code
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "interrupts"
_OPEN: Final = 0x202
_STI_SHADOW: Final = bytes.fromhex("fbe620e621f4")  # sti; out 0x20, al; out 0x21, al; hlt
_MOV_SS: Final = bytes.fromhex("8ed0e620e621f4")  # mov ss, eax; out 0x20, al; out 0x21, al; hlt
_STI_NOP: Final = bytes.fromhex("fb90ebfe")  # sti; nop; jmp .
_CLI: Final = bytes.fromhex("faebfe")  # cli; jmp .
_IRETQ: Final = bytes.fromhex("48cf")  # iretq
_HLT: Final = bytes.fromhex("f4e622f4")  # hlt; out 0x22, al; hlt
_LOWER_CR8: Final = bytes.fromhex(
    "b809000000440f22c0b805000000440f22c0e610f4"
)  # mov eax, 9; mov cr8, rax; mov eax, 5; mov cr8, rax; out 0x10, al; hlt
_SHORT: Final = 0.1
"""Seconds for what does not end by itself."""
_LONG: Final = 2.0


def _interrupt(lab: Lab, m: Machine, step: str, irq: int) -> Outcome:
    return lab.ioctl(step, m.vcpu, n.KVM_INTERRUPT, kvm_interrupt(irq))


@scenario("interrupt_numbers", area=AREA)
def interrupt_numbers(lab: Lab) -> None:
    """KVM_INTERRUPT: vectors 0 to 255; a second replaces the first."""
    m = lab.machine()
    for irq in (255, 256, 0xFFFFFFFF, 0):
        m.at(code.SPIN, rflags=_OPEN)
        queued = _interrupt(lab, m, f"irq_{irq:#x}", irq)
        m.run("run", timeout=_SHORT if queued.failed else _LONG)
    m.at(code.SPIN, rflags=_OPEN)
    _interrupt(lab, m, "first", 0x40)
    _interrupt(lab, m, "second", 0x50)
    lab.note("queued", nr=m.vcpu.get_vcpu_events().interrupt.nr)
    m.run("which")


@scenario("interrupt_while_closed", area=AREA)
def interrupt_while_closed(lab: Lab) -> None:
    """KVM_INTERRUPT with IF clear: it is injected all the same, which user space was told not to ask for."""
    m = lab.machine()
    m.at(code.OUT_OUT)
    m.run("out")
    lab.note("told", ready=m.run_page.ready_for_interrupt_injection, if_flag=m.run_page.if_flag)
    _interrupt(lab, m, "interrupt", 0x40)
    m.run("injected")


@scenario("interrupt_with_irqchip", area=AREA, needs=("irqchip",))
def interrupt_with_irqchip(lab: Lab) -> None:
    """With an in-kernel interrupt controller KVM_INTERRUPT is ENXIO, and request_interrupt_window does nothing."""
    m = lab.irqchip_machine()
    if m is None:
        return
    _interrupt(lab, m, "interrupt", 0x40)
    m.at(code.SPIN, rflags=_OPEN)
    m.run_page.request_interrupt_window = 1
    m.run("window", timeout=_SHORT)


@scenario("window_shadow", area=AREA)
def window_shadow(lab: Lab) -> None:
    """The window opens with IF, after the instruction that follows STI, and not before."""
    m = lab.machine()
    for step, guest, rflags, timeout in (
        ("open_already", code.SPIN, _OPEN, _LONG),
        ("sti", _STI_NOP, 2, _LONG),
        ("closed", code.SPIN, 2, _SHORT),
        ("cli", _CLI, _OPEN, _LONG),
    ):
        m.at(guest, rflags=rflags)
        m.run_page.request_interrupt_window = 1
        m.run(step, timeout=timeout)
        m.run_page.request_interrupt_window = 0


@scenario("window_at_exits", area=AREA)
def window_at_exits(lab: Lab) -> None:
    """Readiness at exits: not while STI's or MOV SS's shadow lasts; the exit comes before the window."""
    m = lab.machine()
    for step, guest, rflags in (("sti", _STI_SHADOW, 2), ("mov_ss", _MOV_SS, _OPEN)):
        m.at(guest, rflags=rflags, rax=layout.DATA_SELECTOR)
        m.run_page.request_interrupt_window = 1
        for _ in range(3):
            m.run(step)
        m.run_page.request_interrupt_window = 0


@scenario("window_and_signal", area=AREA)
def window_and_signal(lab: Lab) -> None:
    """With a signal pending an open window is still what KVM_RUN returns (row 30 before row 31)."""
    m = lab.machine()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    m.vcpu.set_signal_mask(())
    signal.raise_signal(signal.SIGUSR1)
    m.at(code.SPIN, rflags=_OPEN)
    m.run_page.request_interrupt_window = 1
    m.run("open")
    m.at(code.SPIN, rflags=2)
    m.run("closed")
    m.run_page.request_interrupt_window = 0


@scenario("window_and_queued", area=AREA)
def window_and_queued(lab: Lab) -> None:
    """A queued interrupt goes first; its handler has IF clear, so the window stays shut."""
    m = lab.machine()
    m.at(code.SPIN, rflags=_OPEN)
    _interrupt(lab, m, "interrupt", 0x40)
    m.run_page.request_interrupt_window = 1
    m.run("handler")
    m.run("handler_halts")
    m.run_page.request_interrupt_window = 0


@scenario("nmi", area=AREA)
def nmi(lab: Lab) -> None:
    """KVM_NMI comes whatever IF says, once; a second waits for IRET."""
    m = lab.machine()
    m.memory.put(layout.HANDLERS + 32, bytes.fromhex("e6e1 48cf").ljust(16, b"\0"))  # out 0xe1, al; iretq
    m.at(code.SPIN)
    lab.step("NMI", attempt(m.vcpu.nmi))
    m.run("handler")
    lab.note("masked", masked=m.vcpu.get_vcpu_events().nmi.masked)
    lab.step("NMI_again", attempt(m.vcpu.nmi))
    m.run("after_iret")
    m.run("spins", timeout=_SHORT)


@scenario("nmi_before_interrupt", area=AREA)
def nmi_before_interrupt(lab: Lab) -> None:
    """Of an NMI and an interrupt that both wait, which handler is seen first."""
    m = lab.machine()
    m.at(code.SPIN, rflags=_OPEN)
    lab.step("NMI", attempt(m.vcpu.nmi))
    _interrupt(lab, m, "interrupt", 0x40)
    m.run("first")
    events = m.vcpu.get_vcpu_events()
    lab.note("left", nmi=events.nmi.pending, irq=events.interrupt.injected)


@scenario("injected_exceptions", area=AREA)
def injected_exceptions(lab: Lab) -> None:
    """KVM_SET_VCPU_EVENTS injects exceptions with and without an error code; KVM_SET_REGS drops them."""
    m = lab.machine()
    for vector, has_code in ((6, 0), (13, 1), (14, 1)):
        if has_code:
            catch_error_code(m, vector)
        m.at(code.SPIN)
        _inject(lab, m, vector, has_code)
        m.run(f"vector_{vector}")
    m.at(code.OUT_OUT)
    _inject(lab, m, 6, 0)
    m.registers()
    m.run("after_SET_REGS")


def _inject(lab: Lab, m: Machine, vector: int, has_code: int) -> None:
    events = m.vcpu.get_vcpu_events()
    ctypes.memset(ctypes.addressof(events.exception), 0, ctypes.sizeof(events.exception))
    events.exception.injected, events.exception.nr = 1, vector
    events.exception.has_error_code, events.exception.error_code = has_code, 0x18 * has_code
    lab.step("SET_VCPU_EVENTS", attempt(m.vcpu.set_vcpu_events, events), nr=vector)


@scenario("hlt", area=AREA)
def hlt(lab: Lab) -> None:
    """HLT is an exit with RIP past it; the next KVM_RUN goes on, with or without an interrupt."""
    m = lab.machine()
    m.at(_HLT, rflags=_OPEN)
    m.run("halted")
    lab.note("state", mp_state=m.vcpu.get_mp_state())
    m.run("goes_on")
    m.at(_HLT, rflags=_OPEN)
    m.run("halted_again")
    _interrupt(lab, m, "interrupt", 0x40)
    m.run("handler")


@scenario("set_tpr", area=AREA)
def set_tpr(lab: Lab) -> None:
    """MOV to CR8 that lowers the task priority is an exit, without an in-kernel APIC; one that raises it is not."""
    m = lab.machine()
    m.at(_LOWER_CR8)
    m.run("lowered")
    lab.note("cr8", cr8=m.run_page.cr8)
    m.run("goes_on")


@scenario("signal_and_fault", area=AREA)
def signal_and_fault(lab: Lab) -> None:
    """A signal that is pending before the run wins over a fault, and over a device access."""
    m = lab.machine()
    m.slot(1, TEST, PAGE, inaccessible(PAGE))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    m.vcpu.set_signal_mask(())
    signal.raise_signal(signal.SIGUSR1)
    for step, guest, address in (
        ("fault", code.WRITE8, TEST),
        ("device", code.READ8, TEST + 0x100000),
        ("port", code.OUT_OUT, 0),
        ("halt", code.HALT, 0),
    ):
        m.at(guest, address)
        m.run(step)
    signal.sigtimedwait({signal.SIGUSR1}, 0)
    m.run("without")


@scenario("signal_mask_lengths", area=AREA)
def signal_mask_lengths(lab: Lab) -> None:
    """KVM_SET_SIGNAL_MASK: its length is 8 and nothing else."""
    m = lab.machine()
    buffer = (ctypes.c_uint8 * 64)()
    for length in (0, 4, 7, 8, 9, 16, 128, 0xFFFFFFFF):
        buffer[:4] = list(length.to_bytes(4, "little"))
        lab.ioctl("length", m.vcpu, n.KVM_SET_SIGNAL_MASK, buffer, length=length)


@scenario("signal_mask_of_run", area=AREA)
def signal_mask_of_run(lab: Lab) -> None:
    """The mask holds during KVM_RUN only, and blocks there what the thread has open."""
    m = lab.machine()
    m.vcpu.set_signal_mask((signal.SIGUSR1,))
    m.at(code.OUT_OUT)
    signal.raise_signal(signal.SIGUSR1)
    m.run("delivered_before")
    lab.note("handled", users=lab.signals.users, blocked=signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    m.at(code.SPIN)
    m.run("alarm_is_open", timeout=_SHORT)
