"""KVM_RUN that is refused: arguments and synced registers that are invalid, another process; and a triple fault."""

from __future__ import annotations

import os

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.names import errno_name
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.observe import POISON_REASON
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "run_errors"
_UNKNOWN_REGS = 1 << 20


@scenario("bad_run", area=AREA)
def bad_run(lab: Lab) -> None:
    """EINVAL leaves what is pending pending; synced registers are stored on failure too; EIO for another process."""
    m = lab.machine()
    run = m.run_page
    m.at(code.OUT_OUT)
    run.kvm_valid_regs = _UNKNOWN_REGS
    m.run("bad_valid_regs")
    run.kvm_valid_regs = 0
    run.kvm_dirty_regs = _UNKNOWN_REGS
    m.run("bad_dirty_regs")
    run.kvm_dirty_regs = 0
    run.cr8 = 0x100
    m.run("bad_cr8")
    run.cr8 = 0
    run.exit_reason = POISON_REASON
    m.run_as_is("KVM_RUN_arg_1", arg=1)
    m.run("ok_pio")
    run.kvm_valid_regs = _UNKNOWN_REGS
    m.run("bad_valid_regs_after_pio")
    run.kvm_valid_regs = 0
    m.run("then_ok")
    _synced_registers(lab, m)
    m.delete_slot(1)
    sregs = m.vcpu.get_sregs()
    sregs.idt.limit = sregs.idt.base = 0
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    m.run("triple_fault_shutdown")
    errno = _run_in_child(m)
    lab.note("KVM_RUN_from_forked_child", errno=errno, errname=errno_name(errno))


def _synced_registers(lab: Lab, m: Machine) -> None:
    run = m.run_page
    run.kvm_valid_regs = c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS
    m.at(code.OUT_OUT)
    m.run("sync_regs")
    run.s.regs.sregs.cr0 = 0xFFFFFFFF00000000
    run.kvm_dirty_regs = c.KVM_SYNC_X86_SREGS
    m.run("bad_dirty_sregs")
    lab.note("dirty", dirty_after=run.kvm_dirty_regs)
    run.kvm_dirty_regs = 0
    m.slot(1, TEST, PAGE, inaccessible(PAGE))
    m.at(code.WRITE8, TEST + 0x18)
    registers = run.s.regs.regs
    registers.rip = 0
    m.run("efault_with_sync_regs")
    lab.note("sync_regs_on_efault", sync_rip=hex(registers.rip), sync_rdi=hex(registers.rdi))
    run.immediate_exit = 1
    registers.rip = 0
    m.run("ie_with_sync_regs")
    lab.note("sync_regs_on_ie", sync_rip=hex(registers.rip))
    run.immediate_exit = 0
    run.kvm_valid_regs = 0
    exception = m.vcpu.get_vcpu_events().exception
    lab.note("events_after_efault", pending=exception.pending, injected=exception.injected, nr=exception.nr)


def _run_in_child(m: Machine) -> int:
    """KVM_RUN in a forked child, which has another mm than the VM; returns its errno."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes((attempt(lambda: m.vcpu.ioctl(n.KVM_RUN)).errno & 0xFF,)))
        os._exit(0)
    os.close(writer)
    errno = os.read(reader, 1)
    os.waitpid(child, 0)
    return errno[0] if errno else -1
