"""The host's mapping is the second stage: absent, denied, read-only, beyond the end of a file, and changed by anyone at
any moment, also while the guest runs. The guest gets a precise memory fault or the new memory; the process lives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from anykvm import GuestMemory, MemoryFault
from anykvm.host import libc
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, DATA, Machine

PAGE = 4096
RW, RO, NONE = 3, 1, 0
HIGH = 0x800000  # gpa of extra memory


def fault(gpa: int) -> MemoryFault:
    return MemoryFault(gpa, PAGE, 0, errno.EFAULT)


ACCESSES = {
    "read": "mov (%rsi), %rax",
    "write": "mov %rax, (%rsi)",
    "read-modify-write": "incq (%rsi)",
    "locked": "lock incq (%rsi)",
    "exchange": "xchg %rax, (%rsi)",
    "compare and exchange 16": "lock cmpxchg16b (%rsi)",
    "push": "lea 8(%rsi), %rsp; push %rax",
    "pop to": "mov $0x60100, %esp; popq (%rsi)",
    "call": "lea 8(%rsi), %rsp; call 1f; 1:",
    "string store": "mov %rsi, %rdi; mov $4, %ecx; rep stosq",
    "string load": "lodsq",
    "SSE": "movups (%rsi), %xmm0",
    "SSE store": "movaps %xmm0, (%rsi)",
    "fxsave": "fxsave (%rsi)",
    "x87": "fldt (%rsi)",
    "lgdt": "lgdt (%rsi)",
    "jump": "jmp *%rsi",
    "indirect call": "mov $0x60100, %esp; call *(%rsi)",
    "cmps": "mov %rsi, %rdi; cmpsq",
}


@pytest.mark.parametrize("how", ["protected", "unmapped"])
@pytest.mark.parametrize("name", ACCESSES)
def test_every_kind_of_access_faults_precisely(machine: Machine, name: str, how: str) -> None:
    """All registers as before the instruction (rep: at the iteration); after the fix it completes."""
    setup = "mov $0x61000, %esi; mov $0x60400, %ebp"
    last = ACCESSES[name].split(";")[-1 if name != "call" else -2]
    machine.long_mode(f"{setup}; {ACCESSES[name]}; hlt")
    machine.memory.write(0x61000, assemble("hlt", 0x61000))
    content = machine.memory.read(0x61000, PAGE)
    before = (
        CODE + len(assemble(f"{setup}; {ACCESSES[name]}")) - len(assemble(f"{last}; 1:" if name == "call" else last))
    )
    if how == "protected":
        machine.memory.protect(0x61000, PAGE, NONE)
    else:
        machine.memory.unmap(0x61000, PAGE)
    assert machine.vcpu.run() == fault(0x61000)
    regs = machine.vcpu.get_regs()
    assert regs.rip == (0x61000 if name == "jump" else before)
    assert regs.rsi == 0x61000
    if how == "protected":
        machine.memory.protect(0x61000, PAGE, RW)
    else:
        machine.memory.map(0x61000, PAGE, RW)
        machine.memory.write(0x61000, content)
    if name == "indirect call":
        machine.quads(0x61000, CODE + 0x200)
        machine.memory.write(CODE + 0x200, b"\xf4")
    machine.run_to_halt()


def test_write_across_a_page_boundary_writes_nothing_before_it_can_write_all(machine: Machine) -> None:
    machine.long_mode("mov $0x60ffc, %esi; movabs $0x8877665544332211, %rax; mov %rax, (%rsi); hlt")
    machine.memory.protect(0x61000, PAGE, NONE)
    assert machine.vcpu.run() == fault(0x61000)
    assert machine.memory.read(0x60FFC, 4) == bytes(4)
    machine.memory.protect(0x61000, PAGE, RW)
    machine.run_to_halt()
    assert machine.memory.read(0x60FFC, 8) == bytes.fromhex("1122334455667788")


def test_instruction_across_a_page_boundary(machine: Machine) -> None:
    at = 0x61000 - 5
    machine.long_mode("mov $0x60ffb, %eax; jmp *%rax")
    machine.memory.write(at, assemble("inc %ebx; movabs $0x1122334455667788, %rcx; hlt"))
    tail = machine.memory.read(0x61000, 64)
    machine.memory.unmap(0x61000, PAGE)
    assert machine.vcpu.run() == fault(0x61000)
    regs = machine.vcpu.get_regs()
    assert (regs.rip, regs.rbx) == (at + 2, 1)
    machine.memory.map(0x61000, PAGE, RW)
    machine.memory.write(0x61000, tail)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rcx == 0x1122334455667788


def test_read_only_mapping(machine: Machine) -> None:
    machine.memory.write(DATA, b"\x07")
    machine.long_mode("mov $0x60000, %esi; mov (%rsi), %eax; inc %eax; mov %eax, (%rsi); hlt")
    machine.memory.protect(DATA, PAGE, RO)
    assert machine.vcpu.run() == fault(DATA)
    assert machine.vcpu.get_regs().rax == 8
    machine.memory.protect(DATA, PAGE, RW)
    machine.run_to_halt()


def test_rep_stops_at_the_page(machine: Machine) -> None:
    machine.long_mode("mov $0x60ff0, %edi; mov $0x40, %ecx; mov $0x5a, %al; rep stosb; hlt")
    machine.memory.unmap(0x61000, PAGE)
    assert machine.vcpu.run() == fault(0x61000)
    regs = machine.vcpu.get_regs()
    assert (regs.rcx, regs.rdi) == (0x30, 0x61000)
    assert machine.memory.read(0x60FF0, 16) == b"\x5a" * 16
    machine.memory.map(0x61000, PAGE, RW)
    machine.run_to_halt()


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_file_shrinks_and_grows_under_the_guest(machine: Machine, kind: str, tmp_path: object) -> None:
    fd = os.memfd_create("ram") if kind == "memfd" else os.open(f"{tmp_path}/ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * PAGE)
    with GuestMemory(4 * PAGE, fd=fd) as memory:
        machine.vm.map(memory, HIGH)
        machine.long_mode(f"mov ${HIGH + 2 * PAGE}, %esi; 1: incl (%rsi); hlt; jmp 1b")
        machine.run_to_halt()
        os.ftruncate(fd, PAGE)
        assert machine.vcpu.run() == fault(HIGH + 2 * PAGE)
        assert machine.vcpu.run() == fault(HIGH + 2 * PAGE)
        os.ftruncate(fd, 4 * PAGE)
        machine.run_to_halt()
        assert memory.read(2 * PAGE, 4) == b"\1\0\0\0"  # the old page went with the truncation
        machine.vcpu.close()
    os.close(fd)


def test_new_memory_is_seen_at_once(machine: Machine) -> None:
    """madvise, mmap over it, mremap away: never stale memory."""
    machine.long_mode("mov $0x61000, %esi; 1: mov (%rsi), %eax; hlt; jmp 1b")
    base = machine.memory.address + 0x61000

    def seen() -> int:
        machine.run_to_halt()
        return machine.vcpu.get_regs().rax

    machine.quads(0x61000, 0x11)
    assert seen() == 0x11
    libc.mmap(base, PAGE, RW, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED)
    assert seen() == 0
    machine.quads(0x61000, 0x22)
    assert seen() == 0x22
    libc.madvise(base, PAGE, libc.MADV_DONTNEED)
    assert seen() == 0
    fd = os.memfd_create("over")
    os.write(fd, b"\x33" + bytes(PAGE - 1))
    libc.mmap(base, PAGE, RW, libc.MAP_SHARED | libc.MAP_FIXED, fd)
    assert seen() == 0x33
    os.pwrite(fd, b"\x44", 0)
    assert seen() == 0x44
    os.close(fd)


def test_slot_without_any_mapping(machine: Machine) -> None:
    """The documented example: a valid memslot, no VMA behind it."""
    machine.vm.set_user_memory_region(slot=7, guest_phys_addr=HIGH, memory_size=PAGE, userspace_addr=0, flags=0)
    machine.long_mode(f"mov ${HIGH}, %esi; mov (%rsi), %eax; hlt")
    assert machine.vcpu.run() == fault(HIGH)


def test_page_tables_nobody_can_read(machine: Machine) -> None:
    machine.long_mode("mov $0x40000000, %rsi; mov (%rsi), %eax; hlt")
    machine.quads(0x11008, 0x61007)
    machine.quads(0x61000, 0x87)
    machine.memory.protect(0x61000, PAGE, RO)  # hardware walks need the table writable
    assert machine.vcpu.run() == fault(0x61000)
    machine.memory.protect(0x61000, PAGE, NONE)
    assert machine.vcpu.run() == fault(0x61000)
    machine.memory.protect(0x61000, PAGE, RW)
    machine.run_to_halt()
    assert machine.memory.read(0x61000, 1)[0] & 0x20  # accessed


LOOPS = {
    "stores": "1: incq %rbx; mov %rbx, (%rsi); jmp 1b",
    "loads": "1: incq %rbx; mov (%rsi), %rax; jmp 1b",
    "atomics": "1: incq %rbx; lock incq (%rsi); jmp 1b",
    "unaligned": "1: incq %rbx; mov %rbx, 4093(%rsi); jmp 1b",
    "strings": "1: incq %rbx; mov %rsi, %rdi; mov $512, %ecx; rep stosq; jmp 1b",
    "sse": "1: incq %rbx; movups %xmm0, (%rsi); movups (%rsi), %xmm1; jmp 1b",
    "fxsave": "1: incq %rbx; fxsave (%rsi); fxrstor (%rsi); jmp 1b",
    "calls": "lea 64(%rsi), %rsp; 1: incq %rbx; push %rbx; pop %rax; call 2f; 2: pop %rax; jmp 1b",
}


@pytest.mark.parametrize("change", ["munmap", "mprotect", "truncate"])
@pytest.mark.parametrize("loop", LOOPS)
def test_mapping_changed_while_the_guest_runs(machine: Machine, loop: str, change: str) -> None:
    """Another thread takes the page away without telling anybody; each time a precise fault, then the guest goes on."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 2 * PAGE)
    memory = GuestMemory(2 * PAGE, fd=fd)
    machine.vm.map(memory, HIGH)
    machine.long_mode(f"mov ${HIGH}, %esi; fninit; {LOOPS[loop]}")
    entry = CODE + len(assemble(f"mov ${HIGH}, %esi; fninit; ")) + (4 if loop == "calls" else 0)
    taken, back = threading.Event(), threading.Event()
    base = memory.address

    def take() -> None:
        for _ in range(10):
            back.wait()
            back.clear()
            if change == "munmap":
                libc.munmap(base, 2 * PAGE)
            elif change == "mprotect":
                libc.mprotect(base, 2 * PAGE, NONE)
            else:
                os.ftruncate(fd, 0)
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    progress = []
    for _ in range(10):
        back.set()
        exit = machine.vcpu.run()
        assert isinstance(exit, MemoryFault) and exit.gpa in (HIGH, HIGH + PAGE)
        regs = machine.vcpu.get_regs()
        assert entry <= regs.rip < entry + 40
        progress.append(regs.rbx)
        taken.wait()
        taken.clear()
        if change == "munmap":
            assert libc.mmap(base, 2 * PAGE, RW, libc.MAP_SHARED | libc.MAP_FIXED, fd) == base
        elif change == "mprotect":
            libc.mprotect(base, 2 * PAGE, RW)
        else:
            os.ftruncate(fd, 2 * PAGE)
    thread.join()
    assert progress == sorted(progress)
    machine.vcpu.close()
    machine.vm.close()
    memory.close()
    os.close(fd)


def test_process_faults_are_still_the_process_own() -> None:
    """A bad pointer of the program itself kills it, as before: the handler passes on what is not the guest's."""
    code = "import anykvm, ctypes; anykvm.open('soft').close(); ctypes.memset(8, 0, 1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGSEGV


def test_handler_installed_later_by_the_program_does_not_break_guests(machine: Machine) -> None:
    """Ours goes in front again, and passes on to it."""
    old = signal.signal(signal.SIGSEGV, signal.SIG_IGN)
    try:
        machine.long_mode("mov $0x61000, %esi; mov (%rsi), %eax; hlt")
        machine.memory.protect(0x61000, PAGE, NONE)
        machine.vm.create_vcpu(1).close()
        assert machine.vcpu.run() == fault(0x61000)
    finally:
        signal.signal(signal.SIGSEGV, old)
