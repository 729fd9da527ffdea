"""Profile linux-6.12: what that kernel does otherwise than 7.3, besides what the scenarios have."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator

import pytest

from anykvm import Hlt, Hypercall, InternalError, Intr, Io, Mmio, abi
from anykvm.backends.soft import SoftBackend
from anykvm.testing.machine import CODE, DATA, STACK, Machine
from anykvm.testing.private import PAGE, private_guest
from soft_helpers import refused

DEVICE = 0x30000000
"""No slot is there; the page tables go so far."""
SOON = 0.05


@pytest.fixture
def profile() -> str:
    return "linux-6.12"


@pytest.fixture
def nmi(machine: Machine) -> Iterator[Machine]:
    """An NMI waits, and the stack for it is a device."""
    machine.long_mode("inc %rbx; mov 0x60000, %eax; hlt; out %al, $0xe9; 1: inc %rcx; jmp 1b")
    machine.set_regs(rsp=DEVICE + PAGE, rbx=1, rcx=0)
    machine.quads(DATA, 0x1122334455667788)
    machine.vcpu.nmi()
    yield machine


def test_instructions_are_emulated_while_an_nmi_cannot_be_delivered(nmi: Machine, alarms: list[int]) -> None:
    """One for each attempt; HLT is passed, as SVM's KVM does not ask whether the emulator has met one."""
    exit = nmi.vcpu.run()
    assert isinstance(exit, Io) and exit.data == b"\x88"
    assert nmi.vcpu.get_regs().rbx == 2 and nmi.vcpu.get_vcpu_events().nmi.injected == 1
    signal.setitimer(signal.ITIMER_REAL, SOON)
    assert nmi.vcpu.run() == Intr()
    assert alarms and nmi.vcpu.get_regs().rcx > 0
    assert nmi.vcpu.get_vcpu_events().nmi.injected == 1
    nmi.set_regs(rsp=STACK)
    assert nmi.trap().vector == 2


def test_what_the_emulated_instruction_meets_is_the_callers(nmi: Machine) -> None:
    """A host page that is not there is a device to KVM's emulator, also here; then the next instruction."""
    nmi.memory.protect(DATA, PAGE, 0)
    exit = nmi.vcpu.run()
    assert isinstance(exit, Mmio) and exit.phys_addr == DATA and not exit.is_write
    exit.respond(b"\x05\0\0\0")
    exit = nmi.vcpu.run()
    assert isinstance(exit, Io) and exit.data == b"\x05"


def test_in_ring_3_it_is_tried_for_ever(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("ud2", cpl=3)
    sregs = machine.vcpu.get_sregs()
    sregs.idt.base = DEVICE
    machine.vcpu.set_sregs(sregs)
    signal.setitimer(signal.ITIMER_REAL, SOON)
    assert machine.vcpu.run() == Intr()
    assert alarms == [signal.SIGALRM] and machine.vcpu.get_regs().rip == CODE


def test_an_instruction_that_is_not_emulated_is_an_error(machine: Machine) -> None:
    """An interrupt waits before POPCNT; the caller gets its bytes, and the interrupt waits on."""
    machine.long_mode("popcnt %rax, %rbx; hlt")
    machine.set_regs(rsp=DEVICE + PAGE)
    machine.vcpu.interrupt(0x30)
    exit = machine.vcpu.run()
    assert isinstance(exit, InternalError) and exit.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    assert machine.vcpu.get_vcpu_events().interrupt.injected == 1


def test_bits_of_efer_are_kept(machine: Machine) -> None:
    """A processor would not enter the guest with some of them (KVM_EXIT_FAIL_ENTRY); the engine ignores them."""
    machine.long_mode("hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.efer |= 1 << 12 | 1 << 40  # SVME, which gives the guest no VMRUN
    machine.vcpu.set_sregs(sregs)
    machine.run_to_halt()
    assert machine.vcpu.get_sregs().efer == sregs.efer
    machine.long_mode("vmsave")
    sregs.efer |= 0xD00
    assert machine.trap().vector == 6


def test_pre_faulting_waits_for_the_next_run(machine: Machine, alarms: list[int]) -> None:
    """From when a slot goes until KVM_RUN; a page that the host does not have fails at once, and a slot that comes
    changes nothing."""
    machine.long_mode("hlt; hlt")
    machine.vm.set_user_memory_region(1, DEVICE, PAGE, machine.memory.address)
    assert machine.vcpu.pre_fault_memory(DEVICE, PAGE).size == 0
    machine.vm.set_user_memory_region(1, DEVICE, 0, 0)
    for address in (DEVICE, CODE):
        signal.setitimer(signal.ITIMER_REAL, SOON)
        with refused(errno.EINTR):
            machine.vcpu.pre_fault_memory(address, PAGE)
    assert len(alarms) == 2
    machine.memory.protect(DATA, PAGE, 0)
    with refused(errno.EFAULT):
        machine.vcpu.pre_fault_memory(DATA, PAGE)
    machine.run_to_halt()
    machine.vm.set_user_memory_region(1, DEVICE, PAGE, machine.memory.address)
    assert machine.vcpu.pre_fault_memory(CODE, PAGE).size == 0


def test_a_hypercall_leaves_what_was_in_its_answer(machine: Machine) -> None:
    machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << 12)
    machine.long_mode("mov $12, %eax; mov $0x60000, %ebx; mov $1, %ecx; vmcall; hlt")
    machine.vcpu.kvm_run.hypercall.ret = 0x77
    assert isinstance(machine.vcpu.run(), Hypercall)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rax == 0x77


def test_private_memory_has_no_flags(profile: str) -> None:
    with private_guest(SoftBackend(profile)) as guest:
        assert guest.vm.check_extension(abi.KVM_CAP_GUEST_MEMFD) == 1
        assert guest.vm.check_extension(abi.KVM_CAP_GUEST_MEMFD_FLAGS) == 0
        with refused(errno.EINVAL, "KVM_CAP_GUEST_MEMFD_FLAGS"):
            guest.vm.create_guest_memfd(PAGE, abi.GUEST_MEMFD_FLAG_MMAP)
        guest.private()
        guest.load("movq $5, (%rbx); mov (%rbx), %rax; hlt")
        assert guest.vcpu.run() == Hlt() and guest.rax() == 5


def test_an_ordinary_vm_can_make_a_file_and_not_bind_it(machine: Machine) -> None:
    fd = machine.vm.create_guest_memfd(PAGE)
    with refused(errno.EINVAL, "flags has unknown bits 0x4"):
        machine.vm.set_user_memory_region2(1, DEVICE, PAGE, machine.memory.address, abi.KVM_MEM_GUEST_MEMFD, fd, 0)
    machine.kvm.backend.close(fd)
