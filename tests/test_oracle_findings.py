"""What the oracle's records showed to be wrong in the soft backend, each in a few lines."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import InternalError, Io, Mmio, abi
from anykvm.testing.machine import CODE, DATA, Machine

DEVICE = 0x1000000  # no memslot there
VECTOR = 0x40


@pytest.fixture
def machine() -> Iterator[Machine]:
    with anykvm.open("soft", "linux-7.3") as kvm, Machine(kvm) as made:
        yield made


def test_a_device_read_takes_no_more_than_it_asked_for(machine: Machine) -> None:
    machine.long_mode(f"movzbl ({DEVICE}), %ebx; mov ({DEVICE}), %cx; hlt")
    for size in (1, 2):
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio) and exit.len == size
        machine.vcpu.io_page[40:48] = b"\xff" * 8
    machine.run_to_halt()
    regs = machine.vcpu.get_regs()
    assert (regs.rbx, regs.rcx) == (0xFF, 0xFFFF)


def test_out_to_port_7e_is_past_itself_at_its_exit(machine: Machine) -> None:
    machine.long_mode("out %al, $0x7e; out %al, $0x7f; hlt")
    for at in (2, 2):  # the second is not
        assert isinstance(machine.vcpu.run(), Io)
        assert machine.vcpu.get_regs().rip == CODE + at
    machine.run_to_halt()


def test_ins_downwards_is_one_exit(machine: Machine) -> None:
    machine.long_mode(f"mov ${DATA + 8}, %edi; mov $3, %ecx; mov $5, %edx; std; rep insb; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Io) and exit.count == 3
    offset = machine.vcpu.kvm_run.io.data_offset
    machine.vcpu.io_page[offset : offset + 3] = b"abc"
    machine.run_to_halt()
    assert machine.memory.read(DATA + 6, 3) == b"cba"
    assert machine.vcpu.get_regs().rdi == DATA + 5


def test_an_interrupt_that_user_space_injects_does_not_wait_for_if(machine: Machine) -> None:
    machine.long_mode("mov $1, %ebx; hlt")
    machine.vcpu.interrupt(0x15)
    assert machine.trap().vector == 0x15
    machine.long_mode("mov $1, %ebx; hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.interrupt_bitmap[0] = 1 << 0x15 | 1 << 0x17
    machine.vcpu.set_sregs(sregs)
    assert machine.trap().vector == 0x15


def test_bytes_of_an_instruction_that_could_not_be_read_are_nops(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE - 2}, %eax; jmp *%rax")
    with anykvm.GuestMemory(4096) as page:
        page[4094:4096] = b"\x48\xb8"
        machine.vm.map(page, DEVICE - 4096)
        exit = machine.vcpu.run()
    assert isinstance(exit, InternalError)
    failure = machine.vcpu.kvm_run.emulation_failure
    assert bytes(failure.insn_bytes) == b"\x48\xb8" + b"\x90" * 13 and failure.insn_size == 2


def test_iret_from_a_device_is_not_emulated(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE}, %esp; iretq")
    assert isinstance(machine.vcpu.run(), InternalError)


def test_the_error_code_of_a_gate_is_its_index(machine: Machine) -> None:
    machine.long_mode(f"int ${VECTOR}", cpl=3)
    machine.gate(VECTOR, dpl=0)
    trap = machine.trap()
    assert (trap.vector, trap.error) == (13, VECTOR * 8 + 2)


def test_msrs_as_amd_has_them(machine: Machine) -> None:
    vcpu = machine.vcpu
    assert vcpu.set_msrs({0x176: 1 << 60 | 0x2000}) == 1 and vcpu.get_msrs([0x176]) == {0x176: 0x2000}
    assert vcpu.set_msrs({0xC0000080: 1 << 63}) == 0  # EFER
    assert vcpu.set_msrs({0x2FF: 0x2}) == 0 and vcpu.set_msrs({0x2FF: 0xC06}) == 1  # MTRR default type


def test_state_as_it_was_set(machine: Machine) -> None:
    vcpu = machine.vm.create_vcpu(1)
    assert vcpu.get_fpu().fcw == 0x37F
    vcpu.set_debugregs(abi.kvm_debugregs(dr7=0x400))
    assert vcpu.get_debugregs().dr6 == 0
    assert vcpu.get_vcpu_events().flags & abi.KVM_VCPUEVENT_VALID_SMM


def test_mxcsr_counts_only_with_sse(machine: Machine) -> None:
    xsave = bytearray(bytes(machine.vcpu.get_xsave()))
    xsave[27] = 0x80  # bit 31 of MXCSR
    xsave[512] = 3
    with pytest.raises(OSError) as caught:
        machine.vcpu.set_xsave(bytes(xsave))
    assert caught.value.errno == errno.EINVAL
    xsave[512] = 1
    machine.vcpu.set_xsave(bytes(xsave))


def test_an_msr_that_is_not_there_reads_as_0(machine: Machine) -> None:
    buffer = (ctypes.c_uint8 * (8 + 16))()
    abi.kvm_msrs.from_buffer(buffer).nmsrs = 1
    entry = abi.kvm_msr_entry.from_buffer(buffer, 8)
    entry.index, entry.data = 0x12345678, 7
    assert machine.vcpu.ioctl(abi.KVM_GET_MSRS, buffer) == 0 and entry.data == 0


def test_nmi_handler_runs_before_the_interrupt_s(machine: Machine) -> None:
    machine.long_mode("hlt")
    machine.vcpu.interrupt(0x15)
    machine.vcpu.nmi()
    assert machine.trap().vector == 2
