"""A guest from the reset vector through real and protected mode to long mode in one run, and back out."""

from __future__ import annotations

import anykvm
from anykvm import GuestMemory, Hlt, Io, Vcpu
from anykvm.testing.assembler import assemble

ROM = 0xFFFF0000
RAM = 0xF0000

REAL = """
    cli
    mov $0x1000, %ax; mov %ax, %ss; mov $0x100, %sp    # a real-mode stack at 0x10100
    mov $'R', %al; out %al, $0xe9
    int $0x21                                           # through the vector table at 0
    mov %cs, %ax; mov %ax, %ds
    lgdtl %cs:(gdtr - _start)
    mov %cr0, %eax; or $1, %al; mov %eax, %cr0
    ljmpl $8, $0xffff0000 + (protected - _start)
    .code32
protected:
    mov $16, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss
    mov $'P', %al; out %al, $0xe9
    mov $0x10000, %edi; xor %eax, %eax; mov $3072, %ecx; rep stosl
    movl $0x11007, 0x10000; movl $0x12007, 0x11000; movl $0x12007, 0x11018
    movl $0x87, 0x12000; movl $0xffe00087, 0x12ff8       # the first 2 MiB, and the last below 4 GiB
    mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4
    mov $0x10000, %eax; mov %eax, %cr3
    mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr
    mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0
    ljmp $24, $0xffff0000 + (long - _start)
    .code64
long:
    mov $0x80000, %esp
    mov $'L', %al; out %al, $0xe9
    movabs $0x1122334455667788, %rbx
    push %rbx; pop %rcx
    hlt
    .balign 8
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdtr: .word 31; .long 0xffff0000 + (gdt - _start)
"""


def outputs(vcpu: Vcpu) -> bytes:
    """All bytes to port 0xe9 until HLT."""
    seen = b""
    while isinstance(exit := vcpu.run(), Io):
        assert exit.port == 0xE9
        seen += exit.data
    assert exit == Hlt(), exit
    return seen


def test_from_reset_to_long_mode_in_one_run() -> None:
    with anykvm.open("soft") as kvm, GuestMemory(0x10000) as rom, GuestMemory(RAM) as ram:
        rom.write(0, assemble(REAL, ROM, 16))
        rom.write(0xFFF0, bytes.fromhex("e90d00"))  # jmp to 0xffff0000: IP wraps in 16 bits
        ram.write(0x21 * 4, bytes.fromhex("00050000"))
        ram.write(0x500, bytes.fromhex("b049 e6e9 cf".replace(" ", "")))  # mov $'I', %al; out %al, $0xe9; iret
        with kvm.create_vm() as vm:
            vm.map(rom, ROM, flags=anykvm.abi.KVM_MEM_READONLY)
            vm.map(rom, RAM, flags=anykvm.abi.KVM_MEM_READONLY)  # where IRET to F000 goes: CS lost its hidden base
            vm.map(ram, 0)
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            regs = vcpu.get_regs()
            assert (regs.rip, vcpu.get_sregs().cs.base) == (0xFFF0, ROM)
            assert outputs(vcpu) == b"RIPL"
            sregs = vcpu.get_sregs()
            assert (sregs.efer & 0x500, sregs.cs.l, sregs.cr3) == (0x500, 1, 0x10000)
            assert vcpu.get_regs().rcx == 0x1122334455667788


def test_unreal_mode_keeps_hidden_segment_state() -> None:
    """A real-mode segment with a 4 GiB limit and its base kept from protected mode, set and read back by SREGS."""
    with anykvm.open("soft") as kvm, GuestMemory(RAM) as ram, kvm.create_vm() as vm:
        vm.map(ram, 0)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(0x1000)
        ram.write(0x1000, assemble("movl $0x55, %ds:0x20; hlt", 0x1000, 16))
        sregs = vcpu.get_sregs()
        sregs.ds.base, sregs.ds.selector, sregs.ds.limit = 0x80000, 0x1234, 0xFFFFFFFF
        vcpu.set_sregs(sregs)
        assert vcpu.run() == Hlt()
        assert ram.read(0x80020, 4) == b"\x55\0\0\0"
        after = vcpu.get_sregs().ds
        assert (after.base, after.selector, after.limit) == (0x80000, 0x1234, 0xFFFFFFFF)
