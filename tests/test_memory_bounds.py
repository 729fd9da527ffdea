"""What a guest makes the host allocate has a bound, whatever the guest does.

A vCPU's engine has a heap of 32 MiB and 32 MiB of translated code. Each guest here asks for several times that: copies
of code pages, the engine's tables of pages with code, bitmaps of code in a page, TLBs, translations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Vcpu, Vm
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, PML4, Machine, segment

MIB = 1 << 20
BOUND = 66 * MIB
"""Of each vCPU: its heap, its code, and what little lies beside them."""


def resident() -> int:
    """Bytes of anonymous memory that the process uses."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed is no room for this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def flat(size: int, source: str) -> Iterator[tuple[Vm, GuestMemory, list[Vcpu]]]:
    """A VM with 4 vCPUs in protected mode at the same code, and memory that begins at gpa 0."""
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm, GuestMemory(size) as memory:
        vm.map(memory, guest_phys_addr=0)
        code = assemble(source, CODE, 32)
        memory.write(CODE, code)
        vcpus = [vm.create_vcpu(i) for i in range(4)]
        for vcpu in vcpus:
            sregs = vcpu.get_sregs()
            sregs.cr0 = 0x11
            sregs.cs = segment(8, 11, 0)
            for name in ("ds", "es", "fs", "gs", "ss"):
                setattr(sregs, name, segment(16, 3, 0))
            vcpu.set_sregs(sregs)
            restart(vcpu)
        yield vm, memory, vcpus


def restart(vcpu: Vcpu) -> None:
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = CODE, 2
    vcpu.set_regs(regs)


def grown_by(vcpus: list[Vcpu]) -> int:
    before = resident()
    for vcpu in vcpus:
        assert vcpu.run() == Hlt()
    return resident() - before


CALLS = """
    mov $0x10000, %edi; mov $0x8000, %esp
1:  call *%edi; add ${step}, %edi; cmp ${end:#x}, %edi; jb 1b
    hlt"""


@pytest.mark.parametrize(("size", "offsets"), [(256 * MIB, (0,)), (128 * MIB, (0, 4095))])
def test_code_in_each_page(size: int, offsets: tuple[int, ...]) -> None:
    """A RET in each page, and one at each end of it: all between them is compared too."""
    end = size - 0x10000
    calls = "".join(f"lea {at}(%edi), %eax; call *%eax;" for at in offsets)
    source = CALLS.replace("call *%edi;", calls).format(step=4096, end=end)
    with flat(size, source) as (_, memory, vcpus):
        memory.write(0x10000, (b"\xc3" + bytes(4094) + b"\xc3") * ((end - 0x10000) // 4096))
        assert grown_by(vcpus) < BOUND * len(vcpus)
        restart(vcpus[0])
        memory[0x10000] = 0xF4  # and changed code is seen
        assert vcpus[0].run() == Hlt()
        assert vcpus[0].get_regs().rip == 0x10001


def test_a_written_page_with_code() -> None:
    """Code in each page that is written often: the engine has a bitmap for each."""
    pages, first = 40_000, 0x100000
    source = f"""
        mov ${first}, %edi; mov $0x8000, %esp
    1:  call *%edi; mov $12, %ecx
    2:  incb 2048(%edi); dec %ecx; jnz 2b
        add $4096, %edi; cmp ${first + pages * 4096:#x}, %edi; jb 1b
        hlt"""
    with flat(first + (pages + 1) * 4096, source) as (_, memory, vcpus):
        memory.write(first, (b"\xc3" + bytes(4095)) * pages)
        assert grown_by(vcpus[:2]) < BOUND * 2
        assert memory[first + 2048] == memory[first + 4096 * (pages - 1) + 2048] == 24


def test_code_far_apart() -> None:
    """A RET every 4 MiB of 32 GiB: the engine's tables have a leaf of 24 KiB for each, which a flush leaves there."""
    size, step = 32 << 30, 4 * MIB
    with anykvm.open("soft") as kvm, Machine(kvm) as machine, GuestMemory(size) as memory:
        machine.vm.map(memory, guest_phys_addr=size, slot=7)
        machine.long_mode(f"""
            mov ${size}, %rdi
        1:  call *%rdi; add ${step}, %rdi; mov ${2 * size}, %rax; cmp %rax, %rdi; jb 1b
            hlt""")
        tables = 0x100000
        for gib in range(size >> 30):
            machine.quads(PML4 + 0x1000 + 8 * ((size >> 30) + gib), (tables + 4096 * gib) | 7)
            start = size + (gib << 30)
            machine.quads(tables + 4096 * gib, *(start + (page << 21) | 0x87 for page in range(512)))
        for at in range(0, size, step):
            memory[at] = 0xC3
        machine.set_regs(rip=CODE)
        before = resident()
        machine.run_to_halt()
        assert resident() - before < BOUND


def test_a_tlb() -> None:
    """Data in 512 MiB, all of it between two flushes: the engine doubles its TLB at each, up to 256 MiB of entries."""
    size, rounds = 512 * MIB, 14
    with anykvm.open("soft") as kvm, Machine(kvm, size) as machine:
        machine.long_mode(f"""
            mov ${rounds}, %ecx
        2:  mov $0x200000, %edi
        1:  mov (%rdi), %al; add $4096, %rdi; cmp ${size}, %rdi; jb 1b
            mov %cr3, %rax; mov %rax, %cr3; dec %ecx; jnz 2b
            hlt""")
        before = resident()
        machine.run_to_halt()
        assert resident() - before < 16 * MIB


def test_more_translations_than_there_is_room_for() -> None:
    """150,000 blocks, 60 MiB when they are translated, run through twice: each time right."""
    first, blocks = 0x100000, 150_000
    block = assemble("inc %eax; jmp 1f; 1:", 0, 32)
    with flat(4 * MIB, f"xor %eax, %eax; mov $2, %ebx; mov ${first}, %edi; jmp *%edi") as (_, memory, vcpus):
        end = first + blocks * len(block)
        memory.write(first, block * blocks)
        memory.write(end, assemble(f"dec %ebx; jz 1f; mov ${first}, %edi; jmp *%edi; 1: hlt", 0, 32))
        assert grown_by(vcpus[:1]) < BOUND
        assert vcpus[0].get_regs().rax == 2 * blocks
