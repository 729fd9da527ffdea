"""What the engine gets wrong by itself, and that here it does not. Each guest also runs on the stock engine (Unicorn's
own binding), which must show the fault: that proves the test can fail."""

from __future__ import annotations

import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Intr
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, DATA, Machine

unicorn = pytest.importorskip("unicorn", reason="the stock engine to compare with (pip install unicorn==2.1.4)")
from unicorn import x86_const as x86  # noqa: E402


def stock(source: str) -> Any:
    """The stock engine with the code at CODE and memory below 2 MiB."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, 2 << 20)
    uc.mem_write(CODE, assemble(source))
    uc.reg_write(x86.UC_X86_REG_RSP, 0x70000)
    return uc


def stock_goes_on(source: str, setup: Callable[[Any], None] = lambda uc: None) -> bool:
    """Whether the stock engine runs through what a processor would fault on."""
    uc = stock(source)
    setup(uc)
    try:
        uc.emu_start(CODE, CODE + len(assemble(source)))
    except unicorn.UcError:
        return False
    return True


COUNT = "1: incq (0x60000); inc %rax; jmp 1b"


def test_stores_happen_once_when_stopped(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode(COUNT)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0007)
    for _ in range(100):
        assert isinstance(machine.vcpu.run(), Intr)
        memory = int.from_bytes(machine.memory.read(DATA, 8), "little")
        assert memory - machine.vcpu.get_regs().rax in (0, 1)


def test_stock_engine_repeats_stores() -> None:
    uc = stock(COUNT)
    for _ in range(300):
        timer = threading.Timer(0.0005, uc.emu_stop)
        timer.start()
        uc.emu_start(uc.reg_read(x86.UC_X86_REG_RIP) or CODE, 0, timeout=50_000)  # its stop may be lost (below)
        timer.join()
        memory = int.from_bytes(uc.mem_read(DATA, 8), "little")
        if memory - uc.reg_read(x86.UC_X86_REG_RAX) > 1:
            return
    pytest.fail("the stock engine was exact 300 times: this test no longer proves anything")


def test_a_stop_before_the_start_is_not_lost(machine: Machine, alarms: list[int]) -> None:
    """A kick that comes before KVM_RUN's first instruction ends it (stock: uc_emu_start clears it and runs on)."""
    machine.long_mode("1: jmp 1b")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        machine.vcpu.set_signal_mask([])
        for delay in range(100):
            signal.setitimer(signal.ITIMER_REAL, 0.000001 + delay * 0.000002)
            assert isinstance(machine.vcpu.run(), Intr)
            assert signal.sigwait({signal.SIGALRM}) == signal.SIGALRM
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def test_stock_engine_loses_a_stop() -> None:
    uc = stock("mov $20000000, %ecx; 1: dec %ecx; jnz 1b")
    uc.emu_stop()
    start = time.perf_counter()
    uc.emu_start(CODE, CODE + len(assemble("mov $20000000, %ecx; 1: dec %ecx; jnz 1b")))
    assert uc.reg_read(x86.UC_X86_REG_RCX) == 0 and time.perf_counter() > start


LOCKED = "mov $400000, %ecx; 1: lock incq (0x60000); dec %ecx; jnz 1b; hlt"


def test_locked_instructions_are_atomic() -> None:
    """Two VMs, two threads, one memory: as two vCPUs, or a vCPU and its VMM, share it."""
    with anykvm.open("soft") as kvm, GuestMemory(2 << 20) as memory:
        machines = [Machine(kvm, 4 << 20) for _ in range(2)]
        shared = 0x200000
        for machine in machines:
            machine.vm.unmap(machine.slot)
            machine.memory.close()
            machine.memory = memory
            machine.vm.map(memory, 0)
            machine.long_mode(LOCKED)
        del shared
        threads = [threading.Thread(target=machine.run_to_halt) for machine in machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert int.from_bytes(memory.read(DATA, 8), "little") == 800000
        for machine in machines:
            machine.vm.close()


def test_stock_engine_loses_locked_increments() -> None:
    for _ in range(30):  # the two threads may run one after the other
        if stock_locked_increments() < 800000:
            return
    pytest.fail("the stock engine was atomic 30 times: this test no longer proves anything")


def stock_locked_increments() -> int:
    """Two stock engines in threads over one memory: the counter both increment 400,000 times."""
    import ctypes

    memory = ctypes.create_string_buffer(3 << 20)
    base = (ctypes.addressof(memory) + 0xFFF) & ~0xFFF
    engines = []
    for _ in range(2):
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.mem_map_ptr(0, 2 << 20, unicorn.UC_PROT_ALL, base)
        engines.append(uc)
    code = assemble(LOCKED)
    ctypes.memmove(base + CODE, code, len(code))
    threads = [threading.Thread(target=uc.emu_start, args=(CODE, CODE + len(code) - 1)) for uc in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return int(ctypes.c_uint64.from_address(base + DATA).value)


FAULTS_THE_STOCK_ENGINE_MISSES = {
    "alignment #GP": ("mov $0x60008, %eax; movaps (%rax), %xmm0", 13),
    "#XM": (
        "movl $0x1f00, (0x60000); ldmxcsr (0x60000); xorps %xmm0, %xmm0; xorps %xmm1, %xmm1; divps %xmm0, %xmm1",
        19,
    ),
    "unknown MSR #GP": ("mov $0x12345, %ecx; rdmsr", 13),
    "CR4 reserved #GP": ("mov %cr4, %rax; bts $27, %rax; mov %rax, %cr4", 13),
    "AVX #UD": ("vaddps %xmm0, %xmm1, %xmm2", 6),
}


@pytest.mark.parametrize("name", FAULTS_THE_STOCK_ENGINE_MISSES)
def test_missing_faults(machine: Machine, name: str) -> None:
    source, vector = FAULTS_THE_STOCK_ENGINE_MISSES[name]
    assert stock_goes_on(source), "the stock engine faults by now: this test no longer proves anything"
    machine.long_mode(source + "; hlt")
    assert machine.trap().vector == vector


def test_alignment_check_the_stock_engine_misses(machine: Machine) -> None:
    source = "mov $0x60001, %eax; mov (%rax), %ebx"

    def ring3(uc: Any) -> None:
        uc.reg_write(x86.UC_X86_REG_CR0, uc.reg_read(x86.UC_X86_REG_CR0) | 1 << 18)
        uc.reg_write(x86.UC_X86_REG_RFLAGS, 2 | 1 << 18)

    assert stock_goes_on(source, ring3)
    machine.long_mode(source + "; ud2", cpl=3, rflags=2 | 1 << 18, cr0=0x80050033)
    assert machine.trap().vector == 17


NARROW_OPERANDS = {
    "cvtps2pd {}, %xmm1": 8,
    "cvtdq2pd {}, %xmm1": 8,
    "roundss $1, {}, %xmm1": 4,
    "roundsd $1, {}, %xmm1": 8,
    "cvtps2pi {}, %mm1": 8,
    "cvttps2pi {}, %mm1": 8,
    "punpcklbw {}, %mm1": 4,
    "punpcklwd {}, %mm1": 4,
    "punpckldq {}, %mm1": 4,
}


@pytest.mark.parametrize("source", NARROW_OPERANDS)
def test_no_more_is_read_than_the_operand(machine: Machine, source: str) -> None:
    """The operand ends where memory does; the result is that of the same in a register."""
    end, size = 0x300000, NARROW_OPERANDS[source]
    stock_end = 0x200000 - size
    assert not stock_goes_on(source.format(f"({stock_end:#x})")), "the stock engine reads no more by now"
    machine.memory.protect(end, 0x1000, 0)
    machine.memory.write(end - 8, struct.pack("<ff", -7.75, 3.25))
    register = "%mm2" if source.startswith("punpck") else "%xmm2"
    load, result = ("movq", "%mm1") if "%mm1" in source else ("movdqu", "%xmm1")
    move = "movd" if size == 4 else "movq"
    machine.long_mode(
        f"{load} ({DATA:#x}), {result}; {source.format(f'({end - size:#x})')}; {load} {result}, ({DATA + 32:#x});"
        f"{load} ({DATA:#x}), {result}; {move} ({end - size:#x}), {register}; {source.format(register)};"
        f"{load} {result}, ({DATA + 64:#x}); hlt"
    )
    machine.memory.write(DATA, bytes(range(1, 17)))
    machine.run_to_halt()
    of_memory, of_register = machine.memory.read(DATA + 32, 16), machine.memory.read(DATA + 64, 16)
    assert of_memory == of_register != bytes(16)


def test_syscall_goes_somewhere(machine: Machine) -> None:
    """Stock: only hooks, then on behind the instruction."""
    assert stock_goes_on("syscall; nop")
    kernel = 0x30000
    machine.memory.write(kernel, assemble("mov %rcx, %rbx; hlt", kernel))
    machine.long_mode("syscall; ud2", cpl=3)
    machine.vcpu.set_msrs({0xC0000081: 8 << 32, 0xC0000082: kernel, 0xC0000080: 0xD01})
    assert machine.vcpu.run() == Hlt()
    assert machine.vcpu.get_regs().rbx == CODE + 2


def test_code_changed_by_the_host_between_runs(machine: Machine) -> None:
    """Stock: translated code goes on as it was."""
    machine.long_mode("1: mov $1, %ebx; hlt; jmp 1b")
    machine.run_to_halt()
    for value in (2, 3, 4):
        machine.memory.write(CODE + 1, bytes([value]))
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rbx == value
    assert stock_with_pointer() == 1


def stock_with_pointer() -> int:
    """Run, change the code through the host pointer, run again: what the stock engine then loads."""
    import ctypes

    buffer = ctypes.create_string_buffer(3 << 12)
    base = (ctypes.addressof(buffer) + 0xFFF) & ~0xFFF
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map_ptr(CODE, 4096, unicorn.UC_PROT_ALL, base)
    code = assemble("mov $1, %ebx; jmp 1f; 1: nop; jmp 2f; 2: nop")  # only the last block is forgotten at the end
    ctypes.memmove(base, code, len(code))
    uc.emu_start(CODE, CODE + len(code))
    ctypes.memset(base + 1, 2, 1)
    uc.emu_start(CODE, CODE + len(code))
    return int(uc.reg_read(x86.UC_X86_REG_RBX))


def test_code_changed_by_the_guest_through_another_mapping(machine: Machine) -> None:
    """The same page at a second, non-executable address (as Linux's direct map)."""
    machine.long_mode(
        """mov $0x40000000, %rdi
        xor %edx, %edx
        mov $3, %ecx
        1: call target
        add %ebx, %edx
        incb 0x101(%rdi)
        dec %ecx
        jnz 1b
        hlt
        .org 0x100
        target: mov $1, %ebx; ret"""
    )
    # 0x40000000 -> the code page, by a 4 KiB no-execute entry
    machine.quads(0x11008, 0x13007)
    machine.quads(0x13000, 0x14007)
    machine.quads(0x14000, CODE | 7 | 1 << 63)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rdx == 1 + 2 + 3


def test_self_modifying_code_in_the_next_instruction(machine: Machine) -> None:
    machine.long_mode(
        "xor %edx, %edx; mov $5, %ecx; 1: movb %cl, 2f+1; 2: mov $0, %ebx; add %ebx, %edx; dec %ecx; jnz 1b; hlt"
    )
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rdx == 15


def test_unaligned_locked_access(machine: Machine) -> None:
    """Across a cache line and across a page: one access, exact result."""
    machine.long_mode("mov $1000, %ecx; 1: lock incq (0x60ffd); lock addl $2, (0x6003f); dec %ecx; jnz 1b; hlt")
    machine.run_to_halt()
    assert int.from_bytes(machine.memory.read(0x60FFD, 8), "little") == 1000
    assert int.from_bytes(machine.memory.read(0x6003F, 4), "little") == 2000


def test_fetch_fault_has_the_rip_of_the_crossing_instruction(machine: Machine) -> None:
    """Four instructions, the last one continues on a page that is not mapped."""
    code = assemble("inc %eax; inc %eax; inc %eax; movabs $0x1122334455667788, %rbx")
    machine.long_mode("mov $0x3ffff4, %eax; jmp *%rax")
    at = machine.memory.size - 10
    machine.memory.write(at, code[:10])
    machine.set_regs(rip=at, rax=0)
    sregs = machine.vcpu.get_sregs()
    machine.quads(0x12000 + 8 * 2, 0)  # 4 MiB up: not present
    machine.vcpu.set_sregs(sregs)
    trap = machine.trap()
    assert (trap.vector, trap.rip, trap.cr2) == (14, at + 6, at + 10)
    assert trap.error == 0x10
