"""Accesses over two pages, the second of which the host takes away: all of a store is done, or nothing (AMD APM vol. 2,
8.1: an instruction that faults has no effect). The stress test found that it was otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import anykvm
from anykvm import GuestMemory, Io, MemoryFault
from anykvm.host.libc import PROT_READ
from anykvm.testing.machine import CODE, Machine

PAGE = 4096
HIGH = 0x1000000
OLD = bytes(range(0x11, 0x21))


@pytest.fixture
def machine() -> Iterator[Machine]:
    with anykvm.open("soft") as kvm, Machine(kvm) as made:
        yield made


@pytest.fixture
def memory(machine: Machine) -> Iterator[GuestMemory]:
    with GuestMemory(2 * PAGE) as memory:
        machine.vm.map(memory, HIGH)
        yield memory


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("at", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "access",
    [
        "incq (%rdi)",
        "addl $1, (%rdi)",
        "mov %rbx, (%rdi)",
        "movbe %rbx, (%rdi)",
        "lock incq (%rdi)",
        "xadd %rbx, (%rdi)",
    ],
)
def test_a_store_over_two_pages_that_faults_stores_nothing(
    machine: Machine, memory: GuestMemory, access: str, at: int, code: bool, refused: int
) -> None:
    """Both pages are in the TLB when the host lets one of them only be read."""
    call = f"mov ${HIGH + 0x800}, %eax; call *%rax;" if code else ""  # the engine watches stores to that page
    memory.write(0x800, b"\xc3")
    size = 4 if "addl" in access else 8
    if at >= size:
        return
    start = PAGE - at
    machine.long_mode(f"mov ${HIGH + start}, %edi; {call} 1: {access}; out %al, $0x10; jmp 1b")
    machine.set_regs(rbx=1)
    assert isinstance(machine.vcpu.run(), Io)
    memory.write(PAGE - 8, OLD)
    memory.protect(refused * PAGE, PAGE, PROT_READ)
    regs = machine.vcpu.get_regs()
    for _ in range(3):
        exit = machine.vcpu.run()
        assert isinstance(exit, MemoryFault) and exit.gpa == HIGH + refused * PAGE
        assert memory.read(PAGE - 8, 16) == OLD
    memory.protect(refused * PAGE, PAGE, 3)
    assert isinstance(machine.vcpu.run(), Io)
    offset = 8 - at
    before = int.from_bytes(OLD[offset : offset + size], "little")
    new = int.from_bytes(regs.rbx.to_bytes(8, "big" if "movbe" in access else "little"), "little")
    after = new if "mov" in access else before + (regs.rbx if "xadd" in access else 1)
    want = bytearray(OLD)
    want[offset : offset + size] = after.to_bytes(8, "little")[:size]
    assert memory.read(PAGE - 8, 16) == want


LOADS = [
    "mov (%rdi), %rax",
    "mov (%rdi), %eax",
    "movzwl (%rdi), %eax",
    "movswq (%rdi), %rax",
    "movbe (%rdi), %rax",
    "movups (%rdi), %xmm0",
]


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("access", [*LOADS, "add (%rdi), %rax", "cmp %rax, (%rdi)", "push (%rdi)", "fildq (%rdi)"])
def test_a_load_over_two_pages_faults_at_its_instruction(
    machine: Machine, memory: GuestMemory, access: str, refused: int
) -> None:
    """What comes before it in its block, and before that block, is not done again."""
    machine.long_mode(
        f"mov ${HIGH + PAGE - 1}, %edi; 1: inc %rbx; 2: inc %r12; {access}; 3: inc %r13; out %al, $0x10; jmp 1b"
    )
    machine.set_regs(rbx=0, r12=0, r13=0)
    for _ in range(3):
        assert isinstance(machine.vcpu.run(), Io)
    count = machine.vcpu.get_regs().rbx
    memory.protect(refused * PAGE, PAGE, 0)
    for _ in range(3):
        exit = machine.vcpu.run()
        assert isinstance(exit, MemoryFault) and exit.gpa == HIGH + refused * PAGE
        regs = machine.vcpu.get_regs()
        assert (regs.rbx, regs.r12, regs.r13, regs.rip) == (count + 1, count + 1, count, CODE + 5 + 6)
    memory.protect(refused * PAGE, PAGE, 3)
    assert isinstance(machine.vcpu.run(), Io)
    regs = machine.vcpu.get_regs()
    assert (regs.rbx, regs.r12, regs.r13) == (count + 1, count + 1, count + 1)
