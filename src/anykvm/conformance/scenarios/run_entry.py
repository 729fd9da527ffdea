"""What KVM_RUN checks before it enters the guest, and what it writes on its way out: ABI.md 1, rows 4 to 17."""

from __future__ import annotations

import signal
import threading
import time
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.observe import POISON_REASON, exit_name
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "run_entry"
_CR8: Final = bytes.fromhex("440f20c0e610f4")  # mov rax, cr8; out 0x10, al; hlt
_SETTLE: Final = 0.1
_OFTEN: Final = 0.05


@scenario("run_arguments", area=AREA)
def run_arguments(lab: Lab) -> None:
    """Any argument but 0 is EINVAL, before immediate_exit is looked at; kvm_run is not touched (row 5)."""
    m = lab.machine()
    m.at(code.OUT_OUT)
    m.run("out")
    m.run_page.exit_reason, m.run_page.flags, m.run_page.if_flag = POISON_REASON, 0x5555, 0x55
    for arg in (1, 1 << 31, 1 << 63):
        m.run_as_is(f"argument_{arg:#x}", arg=arg)
    m.run_page.immediate_exit = 1
    m.run_as_is("argument_1_immediate_exit", arg=1)
    m.run_page.immediate_exit = 0
    m.run("still_pending")


@scenario("sync_valid_bits", area=AREA)
def sync_valid_bits(lab: Lab) -> None:
    """Each bit of kvm_valid_regs: three are known; what is asked for is stored on every return (row 12)."""
    m = lab.machine()
    run = m.run_page
    for bit in (0, 1, 2, 3, 31, 63):
        m.at(code.OUT_OUT)
        run.kvm_valid_regs = 1 << bit
        run.s.regs.regs.rip = run.s.regs.sregs.cr3 = 0x99
        run.s.regs.events.flags = 0x99
        m.run(f"valid_{bit}")
        run.kvm_valid_regs = 0
        regs = run.s.regs
        lab.note("stored", rip=hex(regs.regs.rip), cr3=hex(regs.sregs.cr3), events=hex(regs.events.flags))


@scenario("sync_dirty_bits", area=AREA)
def sync_dirty_bits(lab: Lab) -> None:
    """Each bit of kvm_dirty_regs: what is set is loaded once; an unknown bit is EINVAL (row 12)."""
    m = lab.machine()
    run = m.run_page
    run.kvm_valid_regs = c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS | c.KVM_SYNC_X86_EVENTS
    for bit in (0, 1, 2, 3, 31, 63):
        m.at(code.OUT_OUT)
        m.run("out")
        run.s.regs.regs.rax = 0x7700 + bit
        run.s.regs.sregs.cr2 = 0x8800 + bit
        run.kvm_dirty_regs = 1 << bit
        m.run(f"dirty_{bit}")
        lab.note("left", dirty=hex(run.kvm_dirty_regs), cr2=hex(m.vcpu.get_sregs().cr2))
        run.kvm_dirty_regs = 0
    run.kvm_valid_regs = 0


@scenario("sync_dirty_refused", area=AREA)
def sync_dirty_refused(lab: Lab) -> None:
    """Synced system registers or events that are refused: EINVAL, whatever is pending stays, registers too (row 13)."""
    m = lab.machine()
    run = m.run_page
    run.kvm_valid_regs = c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS | c.KVM_SYNC_X86_EVENTS
    m.at(code.OUT_OUT)
    m.run("out")
    run.s.regs.events.flags = 1 << 30
    run.kvm_dirty_regs = c.KVM_SYNC_X86_EVENTS
    m.run("bad_events")
    run.s.regs.events.flags = 0
    run.s.regs.sregs.cr4 = 1 << 31
    run.s.regs.regs.rax = 0x55
    run.kvm_dirty_regs = c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS
    m.run("bad_sregs_good_regs")
    lab.note("left", dirty=run.kvm_dirty_regs)
    run.kvm_dirty_regs = run.kvm_valid_regs = 0
    m.run("next_out")


@scenario("sync_dirty_skips_fault", area=AREA)
def sync_dirty_skips_fault(lab: Lab) -> None:
    """After EFAULT user space skips the instruction through the synced registers, as mmu_stress_test does."""
    m = lab.machine()
    m.slot(1, TEST, PAGE, inaccessible(PAGE))
    run = m.run_page
    run.kvm_valid_regs = c.KVM_SYNC_X86_REGS
    m.at(code.WRITE8, TEST)
    m.run("write")
    run.s.regs.regs.rip += 3
    run.kvm_dirty_regs = c.KVM_SYNC_X86_REGS
    m.run("skipped")
    run.kvm_valid_regs = 0


@scenario("cr8_values", area=AREA)
def cr8_values(lab: Lab) -> None:
    """run->cr8 without an in-kernel APIC: 0 to 15 are the task priority, 16 is EINVAL; it is given back (row 14)."""
    m = lab.machine()
    for value in (0, 15, 16, 1 << 63):
        m.at(_CR8)
        m.run_page.cr8 = value
        m.run(f"cr8_{value:#x}")
        lab.note("after", cr8=hex(m.run_page.cr8))
    m.run_page.cr8 = 0


@scenario("epilogue", area=AREA)
def epilogue(lab: Lab) -> None:
    """if_flag, cr8, apic_base and the readiness for an interrupt are fresh after every return from row 8 on."""
    m = lab.machine()
    m.slot(1, TEST, PAGE, inaccessible(PAGE))
    run = m.run_page
    for step, guest, immediate, valid, argument in (
        ("exit", code.OUT_OUT, 0, 0, 0),
        ("efault", code.WRITE8, 0, 0, 0),
        ("immediate_exit", code.SPIN, 1, 0, 0),
        ("bad_valid_regs", code.SPIN, 0, 1 << 20, 0),
        ("argument", code.SPIN, 0, 0, 1),
    ):
        m.at(guest, TEST, rflags=0x202)
        run.if_flag = run.ready_for_interrupt_injection = 0x55
        run.apic_base = 0x55
        run.immediate_exit, run.kvm_valid_regs = immediate, valid
        outcome = attempt(m.vcpu.ioctl, n.KVM_RUN, argument)
        run.immediate_exit = run.kvm_valid_regs = 0
        ready = run.ready_for_interrupt_injection
        lab.step(step, outcome, if_flag=run.if_flag, ready=ready, apic_base=hex(run.apic_base), cr8=run.cr8)


@scenario("run_flags_cleared", area=AREA)
def run_flags_cleared(lab: Lab) -> None:
    """run->flags is cleared by every KVM_RUN that passes the argument check, also a refused one."""
    m = lab.machine()
    run = m.run_page
    for step, immediate, valid in (("immediate_exit", 1, 0), ("bad_valid_regs", 0, 1 << 20), ("exit", 0, 0)):
        m.at(code.OUT_OUT)
        run.flags, run.immediate_exit, run.kvm_valid_regs = 0x5555, immediate, valid
        m.run(step, poisoned=False)
        run.immediate_exit = run.kvm_valid_regs = 0


@scenario("immediate_exit_values", area=AREA)
def immediate_exit_values(lab: Lab) -> None:
    """Any value but 0 counts, and KVM never clears it."""
    m = lab.machine()
    for value in (1, 2, 0x80, 255):
        m.at(code.SPIN)
        m.run_page.immediate_exit = value
        m.run(f"value_{value}")
        lab.note("left", immediate_exit=m.run_page.immediate_exit)
    m.run_page.immediate_exit = 0


@scenario("immediate_exit_after_errors", area=AREA)
def immediate_exit_after_errors(lab: Lab) -> None:
    """The reasons of exits that have no completion survive immediate_exit (1.1): shutdown, internal error, INTR."""
    m = lab.machine()
    m.at(code.JUMP, TEST)
    m.run("internal_error")
    _survives(m, "after_internal_error")
    m.at(code.SPIN)
    m.run("interrupted", timeout=_OFTEN)
    _survives(m, "after_interrupted")
    sregs = m.vcpu.get_sregs()
    sregs.idt.limit = 0
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    m.run("shutdown")
    _survives(m, "after_shutdown")


def _survives(m: Machine, step: str) -> None:
    m.run_page.immediate_exit = 1
    m.run_as_is(step)
    m.run_page.immediate_exit = 0


@scenario("vcpu_mutex", area=AREA, needs=("smp",))
def vcpu_mutex(lab: Lab) -> None:
    """An ioctl of a vCPU that another thread runs waits until it returns; a signal does not break the wait (row 4)."""
    m = lab.machine()
    m.at(code.SPIN)
    ended: list[int] = []

    def run_guest() -> None:
        ended.append(attempt(m.vcpu.ioctl, n.KVM_RUN).errno)

    runner = threading.Thread(target=run_guest)
    runner.start()
    time.sleep(_SETTLE)

    def kick() -> None:
        time.sleep(_SETTLE)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(_SETTLE)
        ended.append(0x100)
        signal.pthread_kill(runner.ident or 0, signal.SIGALRM)

    kicker = threading.Thread(target=kick)
    kicker.start()
    lab.step("GET_REGS", attempt(m.vcpu.get_mp_state))
    runner.join()
    kicker.join()
    lab.note("order", ended=[hex(value) for value in ended], users=lab.signals.users)


@scenario("ioctl_type_before_mutex", area=AREA, needs=("smp",))
def ioctl_type_before_mutex(lab: Lab) -> None:
    """A number that is not KVM's is EINVAL at once, while another thread runs the vCPU (row 2); KVM's own wait."""
    m = lab.machine()
    m.at(code.SPIN)
    runner = threading.Thread(target=lambda: attempt(m.vcpu.ioctl, n.KVM_RUN))
    runner.start()
    time.sleep(_SETTLE)
    for number in (0x5401, 0x1280):
        lab.step(f"{number:#x}", attempt(m.vcpu.ioctl, number), still_runs=runner.is_alive())
    signal.pthread_kill(runner.ident or 0, signal.SIGALRM)
    runner.join()


@scenario("reset_vector_without_memory", area=AREA)
def reset_vector_without_memory(lab: Lab) -> None:
    """A new vCPU of a VM that has no memory: its first fetch cannot be emulated."""
    m = lab.machine()
    m.delete_slot(0)
    fresh = m.vm.create_vcpu(1)
    m.vcpu.set_sregs(fresh.get_sregs())
    m.vcpu.set_regs(fresh.get_regs())
    m.run("run")
    m.run("again")


@scenario("page_tables_deleted", area=AREA)
def page_tables_deleted(lab: Lab) -> None:
    """The slot with the guest's code and tables is deleted while it stands at an exit."""
    m = lab.machine()
    m.at(code.OUT_OUT)
    m.run("out")
    lab.step("delete", m.delete_slot(0))
    m.run("without", timeout=_OFTEN)


@scenario("unsupported_state", area=AREA)
def unsupported_state(lab: Lab) -> None:
    """A code segment that is both 64-bit and 32-bit: SVM's entry checks refuse it."""
    m = lab.machine()
    m.at(code.OUT_OUT)
    sregs = m.vcpu.get_sregs()
    sregs.cs.db = 1
    lab.step("SET_SREGS", attempt(m.vcpu.set_sregs, sregs))
    outcome = attempt(m.vcpu.ioctl, n.KVM_RUN)
    # How far RIP is says nothing: the processor did not enter the guest.
    lab.step("run", outcome, reason=exit_name(m.run_page.exit_reason))


@scenario("efault_again_and_again", area=AREA)
def efault_again_and_again(lab: Lab) -> None:
    """Nothing is completed after EFAULT: each KVM_RUN tries the instruction anew, and nothing else happens."""
    m = lab.machine()
    host = anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    host.unmap()
    m.at(code.LOCK_ADD, TEST)
    for _ in range(3):
        m.run("faults")
    host.fix()
    host.put64(0, 41)
    m.run("done")
    lab.note("memory", value=host.get64(0))
