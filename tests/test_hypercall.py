"""KVM_HC_MAP_GPA_RANGE: which hypercalls reach user space, and what the guest gets. Part of the contract's coverage."""

from __future__ import annotations

import errno

import pytest

from anykvm import Hlt, Hypercall, Intr, abi
from anykvm.testing.machine import CODE, Machine

MAP_GPA_RANGE = 12
SOURCE = "mov $12, %eax; mov $0x60000, %ebx; mov $2, %ecx; mov $16, %edx; {}; hlt"
KVM_EINVAL, KVM_ENOSYS, KVM_EPERM = (2**64 - code for code in (22, 1000, 1))


@pytest.mark.parametrize("instruction", ["vmcall", "vmmcall"])
def test_the_caller_answers(machine: Machine, instruction: str) -> None:
    machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
    machine.long_mode(SOURCE.format(instruction))
    exit = machine.vcpu.run()
    assert exit == Hypercall(MAP_GPA_RANGE, (0x60000, 2, 16, 0, 0, 0), 1)  # KVM_EXIT_HYPERCALL_LONG_MODE
    at = machine.vcpu.get_regs().rip
    assert isinstance(exit, Hypercall) and at > CODE
    exit.respond(0x1_2345_6789)
    machine.vcpu.immediate_exit = True
    assert machine.vcpu.run() == Intr(abi.KVM_EXIT_HYPERCALL)  # completed, and not entered
    assert (machine.vcpu.get_regs().rip, machine.vcpu.get_regs().rax) == (at + 3, 0x1_2345_6789)
    machine.vcpu.immediate_exit = False
    assert machine.vcpu.run() == Hlt()


def test_outside_64_bit_mode_the_answer_is_truncated(machine: Machine) -> None:
    machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
    machine.memory.write(CODE, b"\x66\xb8\x0c\0\0\0\x66\xbb\0\x20\0\0\x66\xb9\1\0\0\0\x66\xba\0\0\0\0\x0f\x01\xc1\xf4")
    sregs = machine.vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    machine.vcpu.set_sregs(sregs)
    machine.set_regs(rip=CODE)
    exit = machine.vcpu.run()
    assert exit == Hypercall(MAP_GPA_RANGE, (0x2000, 1, 0, 0, 0, 0), 0) and isinstance(exit, Hypercall)
    exit.respond(0x1_2345_6789)
    assert machine.vcpu.run() == Hlt()
    assert machine.vcpu.get_regs().rax == 0x2345_6789


@pytest.mark.parametrize(
    ("enabled", "setup", "result"),
    [
        (0, "", KVM_ENOSYS),
        (1 << MAP_GPA_RANGE, "mov $11, %eax;", KVM_ENOSYS),
        (1 << MAP_GPA_RANGE, "inc %rbx;", KVM_EINVAL),
        (1 << MAP_GPA_RANGE, "xor %ecx, %ecx;", KVM_EINVAL),
    ],
)
def test_answered_by_kvm(machine: Machine, enabled: int, setup: str, result: int) -> None:
    machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, enabled)
    machine.long_mode(SOURCE.format(f"{setup} vmcall"))
    assert machine.vcpu.run() == Hlt()
    assert machine.vcpu.get_regs().rax == result


def test_a_user_program_may_not_ask(machine: Machine) -> None:
    machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
    machine.long_mode(SOURCE.format("vmcall; mov %rax, %r12; ud2"), cpl=3)
    assert machine.trap().vector == 6
    assert machine.vcpu.get_regs().r12 == KVM_EPERM


def test_only_that_hypercall_can_be_enabled(machine: Machine) -> None:
    assert machine.vm.check_extension(abi.KVM_CAP_EXIT_HYPERCALL) == 1 << MAP_GPA_RANGE
    with pytest.raises(OSError) as caught:
        machine.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE | 1)
    assert caught.value.errno == errno.EINVAL
