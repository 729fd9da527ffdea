"""Several vCPUs of one VM, a thread each: atomics, code another vCPU writes, slots changed under running guests."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Intr, Io, Mmio, Vcpu
from anykvm.testing.machine import CODE, DATA, Machine

HIGH = 0x1000000
DEVICE = 0x10000000


def second(machine: Machine, rip: int, stack: int = 0x50000) -> Vcpu:
    """Another vCPU in the same mode."""
    vcpu = machine.vm.create_vcpu(len(machine.extra) + 1)
    vcpu.set_cpuid2(machine.kvm.get_supported_cpuid())
    vcpu.set_sregs(machine.vcpu.get_sregs())
    regs = machine.vcpu.get_regs()
    regs.rip, regs.rsp = rip, stack
    vcpu.set_regs(regs)
    machine.extra.append(vcpu)
    return vcpu


def together(*bodies: Callable[[], object]) -> None:
    """Run each in a thread; an exception in one is raised here."""
    errors: list[BaseException] = []

    def guard(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def halts(vcpu: Vcpu) -> None:
    exit = vcpu.run()
    assert exit == Hlt(), exit


@pytest.mark.parametrize("at", [DATA, DATA + 0x3F, DATA + 0xFFD])
def test_locked_increments(machine: Machine, at: int) -> None:
    """Aligned, across a cache line, across a page: none is lost."""
    count = 200000 if at == DATA else 1000
    machine.long_mode(f"mov ${count}, %ecx; 1: lock incq ({at:#x}); dec %ecx; jnz 1b; hlt")
    other = second(machine, CODE)
    together(lambda: halts(machine.vcpu), lambda: halts(other))
    assert int.from_bytes(machine.memory.read(at, 8), "little") == 2 * count


def test_code_written_by_another_vcpu(machine: Machine) -> None:
    """One vCPU rewrites a function and counts up; the other, after CPUID, runs it and checks what it returns."""
    machine.long_mode(
        """1: mov (0x60000), %ebx               # the round that the writer has finished
        cmp $20000, %ebx; je 9f
        mov %ebx, %ebp
        xor %eax, %eax; cpuid               # serialize: from here on, code at least as new as that round
        call target
        cmp %ebp, %eax; jb 8f               # older than what was announced before the call
        jmp 1b
        8: ud2
        9: hlt
        .org 0x200
        target: mov $0, %eax; ret
        .org 0x300
        writer: xor %ecx, %ecx
        2: inc %ecx
        mov %ecx, target + 1
        mov %ecx, (0x60000)
        cmp $20000, %ecx; jne 2b
        hlt"""
    )
    writer = second(machine, CODE + 0x300)
    together(lambda: halts(machine.vcpu), lambda: halts(writer))


def test_an_unaligned_store_beside_code_is_one(machine: Machine) -> None:
    """The engine watches stores to a page with code; another vCPU must not see half of one (AMD APM vol. 2, 7.3.2)."""
    machine.long_mode(
        """mov $200000, %ecx
        1: mov data + 1, %eax
        cmp $0x55555555, %eax; je 2f
        cmp $0xaaaaaaaa, %eax; je 2f
        ud2
        2: dec %ecx; jnz 1b
        movb $1, (0x60000)
        hlt
        .org 0x200
        data: .byte 0; .long 0x55555555
        writer: movl $0x55555555, data + 1
        movl $0xaaaaaaaa, data + 1
        cmpb $0, (0x60000); je writer
        hlt"""
    )
    writer = second(machine, CODE + 0x205)
    together(lambda: halts(machine.vcpu), lambda: halts(writer))


def test_slot_deleted_under_a_running_guest(machine: Machine) -> None:
    """When the ioctl has returned, the old memory is not written any more."""
    with GuestMemory(4096) as ram:
        machine.long_mode(f"mov ${HIGH}, %edi; 1: incq (%rdi); jmp 1b")
        exits: list[object] = []
        slot = machine.vm.map(ram, HIGH)
        runner = threading.Thread(target=lambda: exits.append(machine.vcpu.run()))
        runner.start()
        counter = ctypes.c_uint64.from_address(ram.address)
        for _ in range(50):
            before = counter.value
            while counter.value == before:
                pass
            machine.vm.unmap(slot)
            stopped = counter.value
            runner.join()
            exit = exits.pop()
            assert isinstance(exit, Mmio) and exit.phys_addr == HIGH and not exit.is_write
            assert counter.value == stopped
            exit.respond(stopped)
            write = machine.vcpu.run()
            assert write == Mmio(HIGH, (stopped + 1).to_bytes(8, "little"), 8, True)
            slot = machine.vm.map(ram, HIGH)
            runner = threading.Thread(target=lambda: exits.append(machine.vcpu.run()))
            runner.start()
        machine.vm.unmap(slot)
        runner.join()


def test_two_vcpus_exit_independently(machine: Machine) -> None:
    machine.long_mode("mov $2000, %ecx; 1: mov %cl, %al; out %al, $0xe9; dec %ecx; jnz 1b; hlt")
    other = second(machine, CODE)

    def count(vcpu: Vcpu) -> None:
        left = 2000
        while isinstance(exit := vcpu.run(), Io):
            assert exit.data == bytes([left & 0xFF])
            left -= 1
        assert exit == Hlt() and left == 0

    together(lambda: count(machine.vcpu), lambda: count(other))


def test_signal_kicks_the_vcpu_of_its_thread(machine: Machine) -> None:
    machine.long_mode("1: jmp 1b")
    other = second(machine, CODE)
    old = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGUSR1, old)
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append(other.run()))
        thread.start()
        assert thread.ident is not None
        while not seen:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join(0.001)
        assert seen == [Intr(anykvm.abi.KVM_EXIT_INTR)]


LOCKED = {
    # instruction, what it makes of memory that holds 5; a device would have answered 7
    "lock incq (%rdi)": 6,
    "lock xadd %rbx, (%rdi)": 5 + 9,
    "xchg %rbx, (%rdi)": 9,
    "lock cmpxchg %rbx, (%rdi)": 5,  # rax is 1: no match
    "lock btsq $1, (%rdi)": 7,
    "lock cmpxchg8b (%rdi)": 5,
}


@pytest.mark.parametrize("at", [0x100, 0x101])
@pytest.mark.parametrize("access", LOCKED)
def test_a_slot_that_comes_between_a_locked_read_and_its_write(machine: Machine, access: str, at: int) -> None:
    """KVM's compare-and-exchange would find other memory than what was read, and run the instruction again: what a
    device answered must not get into memory."""
    with GuestMemory(4096) as ram:
        ram.write(at, (5).to_bytes(8, "little"))
        machine.long_mode(f"mov ${HIGH + at}, %edi; {access}; hlt")
        machine.set_regs(rax=1, rbx=9)
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio) and not exit.is_write and exit.len == 8
        exit.respond(7)
        slot = machine.vm.map(ram, HIGH)
        machine.run_to_halt()
        assert int.from_bytes(ram.read(at, 8), "little") == LOCKED[access]
        assert ram.read(0, at) == bytes(at) and ram.read(at + 8, 64) == bytes(64)
        regs = machine.vcpu.get_regs()
        assert regs.rbx == (5 if "%rbx" in access and "cmpxchg" not in access else 9)
        assert regs.rax == (5 if "cmpxchg" in access else 1)
        machine.vm.unmap(slot)


@pytest.mark.parametrize("register", ["al", "ax", "eax", "rax"])
def test_exchange_is_atomic(machine: Machine, register: str) -> None:
    """Three values, two vCPUs and one place in memory: none gets lost, none is there twice. The engine's own XCHG is a
    load and a store."""
    machine.long_mode(
        f"""lock incl (0x60200); 1: cmpl $2, (0x60200); jne 1b
        mov $1000000, %ecx
        2: xchg %{register}, (0x60100); dec %ecx; jnz 2b
        hlt"""
    )
    machine.set_regs(rax=1)
    other = second(machine, CODE)
    regs = other.get_regs()
    regs.rax = 2
    other.set_regs(regs)
    machine.memory.write(0x60100, b"\3")
    together(lambda: halts(machine.vcpu), lambda: halts(other))
    assert {machine.vcpu.get_regs().rax, other.get_regs().rax, machine.memory.read(0x60100, 1)[0]} == {1, 2, 3}


def test_a_device_is_read_once_whatever_kicks(machine: Machine) -> None:
    """A kick just before the instruction runs again with the answer: the answer is kept."""
    reads, ended, answers = 100_000, threading.Event(), 0
    machine.long_mode(f"mov ${reads}, %ecx; 1: mov {DEVICE:#x}, %eax; dec %ecx; jnz 1b; hlt")

    def read() -> None:
        nonlocal answers
        while isinstance(machine.vcpu.run(), Mmio):
            answers += 1
        ended.set()

    def kick() -> None:
        with GuestMemory(0x1000) as memory:
            while not ended.is_set():
                machine.vm.map(memory, DEVICE * 2, 5)
                machine.vm.set_user_memory_region(5, 0, 0, 0)

    together(read, kick)
    assert answers == reads
