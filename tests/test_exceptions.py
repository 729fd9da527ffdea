"""Exceptions through the guest's own IDT: vector, error code, RIP, CR2; stacks, rings, double and triple faults."""

from __future__ import annotations

import pytest

import anykvm
from anykvm import InternalError, Shutdown, abi
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, DATA, GDT, HANDLERS, IDT, IST1, RSP0, STACK, Machine, segment
from anykvm.vmm import modes

NONCANONICAL = "mov $0x800000000000, %rax; "


FAULTS = {
    # name: (before, the faulting instruction, vector, error code)
    "divide": ("xor %ecx, %ecx", "div %ecx", 0, 0),
    "undefined": ("nop", "ud2", 6, 0),
    "general protection, bad selector": ("mov $0x48, %ax", "mov %ax, %ds", 13, 0x48),
    "stack, not present": ("mov $0x30, %ax", "mov %ax, %ss", 12, 0x30),
    "segment, not present": ("mov $0x30, %ax", "mov %ax, %ds", 11, 0x30),
    "page fault, read": ("mov $0x40000123, %rax", "mov (%rax), %rbx", 14, 0),
    "page fault, write": ("mov $0x40000123, %rax", "mov %rbx, (%rax)", 14, 2),
    "page fault, fetch": ("mov $0x40000123, %rax", "jmp *%rax", 14, 0x10),
    "x87 error at fwait": ("movl $0x340, (0x60000); fldcw (0x60000); fldz; fld1; fdivp; fldz", "fwait", 16, 0),
    "unmasked SSE exception": (
        "movl $0x1f00, (0x60000); ldmxcsr (0x60000); xorps %xmm0, %xmm0; xorps %xmm1, %xmm1",
        "divps %xmm0, %xmm1",
        19,
        0,
    ),
    "non-canonical read": (NONCANONICAL, "mov (%rax), %rbx", 13, 0),
    "non-canonical write": (NONCANONICAL, "mov %rbx, (%rax)", 13, 0),
    "misaligned movaps": ("mov $0x60008, %rax", "movaps (%rax), %xmm0", 13, 0),
    "misaligned movdqa store": ("mov $0x60008, %rax", "movdqa %xmm0, (%rax)", 13, 0),
    "misaligned SSE operand": ("mov $0x60004, %rax", "addps (%rax), %xmm0", 13, 0),
    "misaligned SSE4 operand": ("mov $0x60004, %rax", "pminsd (%rax), %xmm0", 13, 0),
    "unknown MSR, read": ("mov $0x12345, %ecx", "rdmsr", 13, 0),
    "unknown MSR, write": ("mov $0x12345, %ecx", "wrmsr", 13, 0),
    "non-canonical LSTAR": ("mov $0xc0000082, %ecx; xor %eax, %eax; mov $0x8000, %edx", "wrmsr", 13, 0),
    "EFER reserved bit": ("mov $0xc0000080, %ecx; rdmsr; or $0x40000, %eax", "wrmsr", 13, 0),
    "EFER.LME with paging on": ("mov $0xc0000080, %ecx; rdmsr; and $~0x100, %eax", "wrmsr", 13, 0),
    "CR0: paging without protection": ("mov %cr0, %rax; and $~1, %rax", "mov %rax, %cr0", 13, 0),
    "CR0: not write-through without cache disable": ("mov %cr0, %rax; or $0x20000000, %rax", "mov %rax, %cr0", 13, 0),
    "CR0: high bits": ("mov %cr0, %rax; bts $40, %rax", "mov %rax, %cr0", 13, 0),
    "CR4: reserved bit": ("mov %cr4, %rax; bts $27, %rax", "mov %rax, %cr4", 13, 0),
    "CR4: PAE off in long mode": ("mov %cr4, %rax; btr $5, %rax", "mov %rax, %cr4", 13, 0),
    "CR3: beyond the physical address width": ("mov %cr3, %rax; bts $45, %rax", "mov %rax, %cr3", 13, 0),
    "CR8: more than 15": ("mov $16, %eax", "mov %rax, %cr8", 13, 0),
    "XSETBV without OSXSAVE": ("xor %ecx, %ecx; mov $1, %eax; xor %edx, %edx", "xsetbv", 6, 0),
    "SYSCALL disabled": ("mov $0xc0000080, %ecx; rdmsr; and $~1, %eax; wrmsr", "syscall", 6, 0),
    "AVX": ("nop", "vaddps %xmm0, %xmm1, %xmm2", 6, 0),
    "AVX2": ("nop", "vpaddd %ymm0, %ymm1, %ymm2", 6, 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(machine: Machine, name: str) -> None:
    before, instruction, vector, error = FAULTS[name]
    machine.long_mode(f"{before}\n{instruction}\nhlt")
    if "not present" in name:
        machine.quads(0x4030, 0x00CF13000000FFFF)  # a data segment, P=0
    trap = machine.trap()
    assert (trap.vector, trap.error) == (vector, error)
    if vector == 14:
        assert trap.cr2 == 0x40000123
    expected = 0x40000123 if name == "page fault, fetch" else CODE + len(assemble(before))
    assert trap.rip == expected


def test_sysenter_of_64_bit_code_is_given_up(machine: Machine) -> None:
    """AMD's processors do not have it; KVM intercepts the #UD and em_sysenter() cannot do it either."""
    machine.long_mode("nop; sysenter; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, InternalError) and exit.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    assert machine.vcpu.get_regs().rip == CODE + 1
    trap = machine.trap()
    assert (trap.vector, trap.rip) == (6, CODE + 1)


@pytest.mark.parametrize(
    ("source", "vector", "length"),
    [("int3", 3, 1), ("int $0x15", 0x15, 2), ("int $0x1f", 0x1F, 2), (".byte 0xf1", 1, 1), (".byte 0x66, 0xf1", 1, 2)],
)
def test_software_interrupts_return_behind_the_instruction(
    machine: Machine, source: str, vector: int, length: int
) -> None:
    machine.long_mode(f"nop; {source}; hlt")
    trap = machine.trap()
    assert (trap.vector, trap.rip) == (vector, CODE + 1 + length)


def test_single_step(machine: Machine) -> None:
    machine.long_mode("pushf; orl $0x100, (%rsp); popf; nop; nop; hlt")
    trap = machine.trap()
    assert trap.vector == 1
    assert trap.rip == CODE + len(assemble("pushf; orl $0x100, (%rsp); popf; nop"))


RING3 = {
    "cli": ("cli", 13),
    "hlt": ("hlt", 13),
    "in": ("in $0x20, %al", 13),
    "rep insb": ("mov $4, %ecx; mov $0x60000, %rdi; rep insb", 13),
    "rdmsr": ("rdmsr", 13),
    "mov cr": ("mov %cr0, %rax", 13),
    "swapgs": ("swapgs", 13),
}


@pytest.mark.parametrize("name", RING3)
def test_privileged_instruction_in_ring_3(machine: Machine, name: str) -> None:
    source, vector = RING3[name]
    machine.long_mode(source, cpl=3)
    trap = machine.trap()
    assert (trap.vector, trap.error) == (vector, 0)
    # the TSS's stack was used: five words, the error code popped by the handler
    assert machine.vcpu.get_regs().rsp == RSP0 - 40


def test_alignment_check_needs_ring_3_am_and_ac(machine: Machine) -> None:
    source = "mov $0x60001, %rax; mov (%rax), %ebx; syscall"
    ac, am = 1 << 18, 1 << 18
    machine.long_mode(source, cpl=3, rflags=2 | ac, cr0=0x80010033 | am)
    trap = machine.trap()
    assert (trap.vector, trap.error, trap.rip) == (17, 0, CODE + len(assemble("mov $0x60001, %rax")))
    for cpl, rflags, cr0 in ((0, 2 | ac, 0x80010033 | am), (3, 2, 0x80010033 | am), (3, 2 | ac, 0x80010033)):
        machine.long_mode("mov $0x60001, %rax; mov (%rax), %ebx; ud2", cpl=cpl, rflags=rflags, cr0=cr0)
        assert machine.trap().vector == 6


def test_aligned_accesses_pass_an_alignment_check(machine: Machine) -> None:
    source = "mov $0x60008, %rax; mov (%rax), %rbx; push %rbx; pop %rcx; movb 1(%rax), %dl; ud2"
    machine.long_mode(source, cpl=3, rflags=2 | 1 << 18, cr0=0x80050033)
    assert machine.trap().vector == 6


def test_unaligned_sse_forms_are_allowed(machine: Machine) -> None:
    machine.memory.write(DATA, bytes(range(64)))
    machine.long_mode(
        """mov $0x60001, %rax; movups (%rax), %xmm0; movdqu 2(%rax), %xmm1; lddqu 3(%rax), %xmm2
        movss 1(%rax), %xmm3; cvtsi2sdl 1(%rax), %xmm4; movhps 2(%rax), %xmm5; pmovzxbw 3(%rax), %xmm6
        movdqu %xmm0, 0x101(%rax); hlt"""
    )
    machine.run_to_halt()
    assert machine.memory.read(DATA + 0x102, 16) == bytes(range(1, 17))


def test_interrupt_stack_table(machine: Machine) -> None:
    machine.long_mode("ud2")
    machine.gate(6, ist=1)
    assert machine.trap().vector == 6
    assert machine.vcpu.get_regs().rsp == IST1 - 40


def test_double_fault_then_triple_fault(machine: Machine) -> None:
    machine.long_mode("mov $0x40001000, %rsp; ud2")  # the frame cannot be pushed
    machine.gate(8, ist=1)
    trap = machine.trap()
    assert (trap.vector, trap.error) == (8, 0)
    machine.long_mode("mov $0x40001000, %rsp; ud2")
    assert machine.vcpu.run() == Shutdown()


def test_fault_handler_fixes_the_page_and_returns(machine: Machine) -> None:
    machine.long_mode("mov $0x40000000, %rax; movl $77, (%rax); mov (%rax), %ecx; hlt")
    handler = assemble(
        "push %rax; push %rbx; mov $0x87, %eax; mov %rax, 0x11008; movq $0x13007, 0x11008; "
        "movq $0x600087, 0x13000; invlpg (0x40000000); pop %rbx; pop %rax; add $8, %rsp; iretq",
        HANDLERS + 0x4000,
    )
    machine.memory.write(HANDLERS + 0x4000, handler)
    machine.memory.write(0x13000, bytes(4096))
    machine.gate(14, HANDLERS + 0x4000)
    exit = machine.vcpu.run()  # gpa 0x600000 has no memslot: the write becomes a device access
    assert (exit.phys_addr, exit.is_write) == (0x600000, True)  # type: ignore[attr-defined]


def test_task_register_and_ring_3_round_trip_by_syscall(machine: Machine) -> None:
    """SYSCALL from ring 3, SWAPGS, SYSRET back, 1000 times: registers as the manual has them."""
    kernel = 0x30000
    machine.memory.write(kernel, assemble("swapgs; incq %gs:0; swapgs; sysretq", kernel))
    machine.long_mode(
        """mov $1000, %r15
        1: mov $0xdead, %r11d; syscall
        2: dec %r15; jnz 1b
        ud2""",
        cpl=3,
        rflags=0x202,
    )
    star = 0x08 << 32 | 0x10 << 48  # SYSCALL: CS 8, SS 0x10; SYSRET: SS 0x1b, CS 0x23 from 0x10
    machine.vcpu.set_msrs(
        {0xC0000081: star, 0xC0000082: kernel, 0xC0000084: 0x200, 0xC0000102: DATA, 0xC0000080: 0xD01}
    )
    trap = machine.trap()
    assert trap.vector == 6
    assert int.from_bytes(machine.memory.read(DATA, 8), "little") == 1000
    regs = machine.vcpu.get_regs()
    assert regs.r11 & 0x200  # RFLAGS as they were, in R11
    assert regs.rcx == CODE + len(assemble("mov $1000, %r15; mov $0xdead, %r11d; syscall"))


def test_sysenter_in_protected_mode(machine: Machine) -> None:
    """32-bit: CS, SS, ESP, EIP from the MSRs, and SYSEXIT back to ring 3."""
    machine.long_mode("hlt")
    kernel = assemble("mov %esp, %ebx; mov $0x1007, %edx; mov $0x70000, %ecx; sysexit", 0x30000, 32)
    machine.memory.write(0x30000, kernel)
    machine.memory.write(CODE, assemble("mov $1, %eax; sysenter; mov %cs, %ecx; hlt", CODE, 32))
    flat = (0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    machine.quads(GDT, 0, *flat, *(descriptor | 3 << 45 for descriptor in flat))
    sregs = machine.vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = 0x11, 0, 0
    sregs.cs, sregs.ss = segment(8, 11, 0), segment(16, 3, 0)
    machine.vcpu.set_sregs(sregs)
    machine.set_regs(rip=CODE, rsp=0x50000)
    machine.vcpu.set_msrs({0x174: 8, 0x175: 0x44440, 0x176: 0x30000})
    exit = machine.vcpu.run()  # HLT in ring 3: #GP, and no 32-bit IDT: triple fault
    assert exit == Shutdown()
    regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    assert (regs.rbx, regs.rcx, regs.rip) == (0x44440, 0x1B, 0x1009)
    assert (sregs.cs.selector, sregs.ss.selector) == (0x1B, 0x23)


def test_events_survive_a_failed_delivery(machine: Machine) -> None:
    """ud2 with an IDT nobody can read: the exception stays injected; INT n goes back to its instruction."""
    for source, injected in (("nop; ud2", True), ("nop; int3", False)):
        machine.long_mode(source)
        machine.memory.protect(0x5000, 4096, 0)
        fault = machine.vcpu.run()
        assert fault.gpa == 0x5000  # type: ignore[attr-defined]
        assert machine.vcpu.get_regs().rip == CODE + 1
        events = machine.vcpu.get_vcpu_events()
        assert (events.exception.injected, events.exception.nr) == ((1, 6) if injected else (0, 0))
        machine.memory.protect(0x5000, 4096, 3)
        assert machine.trap().vector == (6 if injected else 3)


@pytest.mark.parametrize("restored", [False, True], ids=["run again", "events set again"])
def test_an_nmi_survives_a_failed_delivery(machine: Machine, restored: bool) -> None:
    machine.long_mode("nop; hlt")
    events = machine.vcpu.get_vcpu_events()
    events.nmi.pending = 1
    machine.vcpu.set_vcpu_events(events)
    machine.memory.protect(IDT, 4096, 0)
    assert isinstance(machine.vcpu.run(), anykvm.MemoryFault)
    events = machine.vcpu.get_vcpu_events()
    assert (events.nmi.injected, events.nmi.pending, events.nmi.masked) == (1, 0, 1)
    if restored:
        machine.vcpu.set_vcpu_events(events)
    machine.memory.protect(IDT, 4096, 3)
    assert (machine.trap().vector, machine.vcpu.get_vcpu_events().nmi.injected) == (2, 0)


def test_nothing_of_an_emulated_instruction_outlives_a_shutdown(machine: Machine) -> None:
    machine.long_mode("mov $0x10000000, %esi; mov (%rsi), %ds; hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.idt.limit = 0
    machine.vcpu.set_sregs(sregs)
    exit = machine.vcpu.run()
    assert isinstance(exit, anykvm.Mmio)
    exit.respond(b"\x77\x77")  # no such selector: #GP, #DF, and no IDT
    assert machine.vcpu.run() == Shutdown()
    machine.long_mode("nop; hlt", rflags=0x202)
    events = machine.vcpu.get_vcpu_events()
    events.interrupt.injected, events.interrupt.nr = 1, 40
    machine.vcpu.set_vcpu_events(events)
    machine.memory.protect(IDT, 4096, 0)
    machine.memory.protect(CODE, 4096, 0)
    assert machine.vcpu.run() == anykvm.MemoryFault(IDT, 4096, 0, 14)  # delivery comes first


@pytest.mark.parametrize("code", ["ce", "cd04", "cc"], ids=["into", "int", "int3"])
def test_a_software_interrupt_whose_delivery_fails_goes_back(code: str) -> None:
    with (
        anykvm.open("soft") as kvm,
        kvm.create_vm() as vm,
        anykvm.GuestMemory(0x200000) as memory,
    ):
        vm.map(memory, 0)
        vcpu = vm.create_vcpu()
        modes.protected_mode(vcpu, memory, 0x100000, 0x80000)
        memory.write(0x100000, bytes.fromhex(f"90{code}f4"))
        sregs = vcpu.get_sregs()
        sregs.idt.base, sregs.idt.limit = 0x5000, 0x7FF
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rflags |= 0x800
        vcpu.set_regs(regs)
        memory.protect(0x5000, 4096, 0)
        assert vcpu.run() == anykvm.MemoryFault(0x5000, 4096, 0, 14)
        assert vcpu.get_regs().rip == 0x100001
        assert not vcpu.get_vcpu_events().exception.injected


def test_stack_is_balanced_after_iretq(machine: Machine) -> None:
    machine.memory.write(HANDLERS + 0x4000, assemble("addq $2, (%rsp); iretq", HANDLERS + 0x4000))
    machine.long_mode("mov $100000, %ecx; 1: ud2; dec %ecx; jnz 1b; hlt")
    machine.gate(6, HANDLERS + 0x4000)
    machine.run_to_halt()
    regs = machine.vcpu.get_regs()
    assert (regs.rsp, regs.rcx) == (STACK, 0)
