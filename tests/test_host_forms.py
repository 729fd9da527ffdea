"""Host memory in all its forms under a guest: what backs a slot, what becomes of it, and pages that are poisoned."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anykvm import GuestMemory, Intr, Io, Mmio, abi
from anykvm.backends.soft import poison, unpoison
from anykvm.conformance import by_scenario, compare_scenario, golden, read_records, sigbus
from anykvm.conformance.host import READ_WRITE, Host, anonymous, file_mapping, memfd
from anykvm.conformance.signals import Signals
from anykvm.host import libc
from anykvm.testing.machine import CODE, Machine
from test_devices import fault

PAGE = 4096
HIGH = 0x800000
HUGE = 0x200000
MAP_HUGETLB = getattr(mmap, "MAP_HUGETLB", 0x40000)
READ = f"mov ${HIGH}, %esi; mov (%rsi), %rax; hlt"
WRITE = f"mov ${HIGH}, %esi; mov %rsi, (%rsi); hlt"


def put(machine: Machine, host: Host, slot: int = 5, gpa: int = HIGH) -> None:
    machine.vm.set_user_memory_region(slot, gpa, host.size, host.address)


def shared_anonymous() -> Host:
    return Host(libc.mmap(0, 4 * PAGE, READ_WRITE, libc.MAP_SHARED | libc.MAP_ANONYMOUS), 4 * PAGE)


FORMS: dict[str, Callable[[], Host]] = {
    "anonymous private": lambda: anonymous(4 * PAGE),
    "anonymous shared": shared_anonymous,
    "memfd shared": lambda: file_mapping(memfd(4 * PAGE), 4 * PAGE),
    "memfd private": lambda: file_mapping(memfd(4 * PAGE), 4 * PAGE, shared=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_memory(machine: Machine, form: str) -> None:
    """Zero at first; stores are seen both ways; code runs from it; it can be dropped."""
    host = FORMS[form]()
    put(machine, host)
    machine.long_mode(f"mov ${HIGH}, %esi; mov (%rsi), %rax; mov 8(%rsi), %rbx; mov %rsi, 16(%rsi); jmp *%rsi")
    host.put64(8, 0x1234)
    host.put(0, b"\xf4")
    machine.run_to_halt()
    regs = machine.vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rip, host.get64(16)) == (0xF4, 0x1234, HIGH + 1, HIGH)
    if "private" in form:
        host.advise(libc.MADV_DONTNEED)
        machine.long_mode(READ)
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 0


@pytest.mark.parametrize("touched", [False, True])
def test_fork_copies_on_write(machine: Machine, touched: bool) -> None:
    """The child keeps what was there; the parent's guest writes to its own copy, had it written before or not."""
    host = anonymous(4 * PAGE)
    put(machine, host)
    if touched:
        machine.long_mode(WRITE)
        machine.run_to_halt()
    host.put64(0, 0x1111)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        old = host.get64(0)
        host.put64(0, 0x2222)
        os._exit(0 if old == 0x1111 else 1)
    os.read(ready[0], 1)
    machine.long_mode(f"{WRITE[:-5]}; mov (%rsi), %rax; hlt")
    machine.run_to_halt()
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    machine.long_mode(READ)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rax == host.get64(0) == HIGH
    for fd in (*ready, *go):
        os.close(fd)


def test_the_page_with_the_end_of_the_file(machine: Machine, tmp_path: Path) -> None:
    """Memory to the page's end, a fault behind it, also while the guest runs; what the page holds past the end goes."""
    path = tmp_path / "ram"
    path.write_bytes(b"\x11" * 100)
    with path.open("r+b") as file:
        host = file_mapping(file.fileno(), 4 * PAGE)
        put(machine, host)
        machine.long_mode(f"mov ${HIGH + 96}, %esi; mov (%rsi), %rax; mov %rsi, 3900(%rsi); mov 3900(%rsi), %rbx; hlt")
        machine.run_to_halt()
        regs = machine.vcpu.get_regs()
        assert (regs.rax, regs.rbx) == (0x11111111, HIGH + 96)
        machine.long_mode(f"mov ${HIGH + PAGE}, %esi; mov (%rsi), %rax; hlt")
        assert machine.vcpu.run() == fault(HIGH + PAGE)
        os.ftruncate(file.fileno(), 2 * PAGE)
        machine.run_to_halt()
        assert path.stat().st_size == 2 * PAGE


def test_aliased_slots(machine: Machine) -> None:
    """Two slots over one page: stores through one are seen through the other, code too."""
    host = anonymous(PAGE)
    put(machine, host, 5, HIGH)
    put(machine, host, 6, HIGH + 0x100000)
    machine.long_mode(f"mov ${HIGH}, %esi; mov ${HIGH + 0x100000}, %edi; movb $0xf4, (%rsi); jmp *%rdi")
    machine.run_to_halt()
    machine.long_mode(f"mov ${HIGH}, %esi; mov ${HIGH + 0x100000}, %edi; movw $0xf490, (%rsi); jmp *%rdi")
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rip == HIGH + 0x100000 + 2


# -- huge pages -------------------------------------------------------------------------------------------------------


def huge(pages: int) -> Host:
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE | MAP_HUGETLB
    try:
        return Host(libc.mmap(0, pages * HUGE, READ_WRITE, flags), pages * HUGE)
    except OSError as error:
        pytest.skip(f"NOT TESTED: hugetlb: {error}")


def free_huge_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


def test_huge_pages_that_run_out_are_a_fault(machine: Machine) -> None:
    """One more page than the pool has: EFAULT, no SIGBUS (golden scenario hugetlb, which sets the pool's size)."""
    host = huge(free_huge_pages() + 1)
    put(machine, host)
    machine.long_mode(
        f"mov ${HIGH}, %esi; mov ${host.size // HUGE}, %ecx; 1: mov %rsi, (%rsi); add ${HUGE}, %rsi; loop 1b; hlt"
    )
    exit = machine.vcpu.run()
    assert exit == fault(HIGH + host.size - HUGE)
    host.unmap()


def test_huge_pages(machine: Machine) -> None:
    if not free_huge_pages():
        pytest.skip("NOT TESTED: hugetlb memory: this machine's pool of huge pages is empty")
    host = huge(1)
    put(machine, host)
    machine.long_mode(f"mov ${HIGH + HUGE - 8}, %esi; mov %rsi, (%rsi); hlt")
    machine.run_to_halt()
    assert host.get64(HUGE - 8) == HIGH + HUGE - 8
    host.unmap()


# -- poison -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bus_errors() -> Iterator[list[dict[str, int]]]:
    signals = Signals()
    with sigbus.caught(signals):
        yield signals.bus_errors


@pytest.mark.parametrize("access", ["mov (%rsi), %rax", "mov %rax, (%rsi)", "jmp *%rsi", "mov -4(%rsi), %rax"])
def test_poisoned_page(machine: Machine, access: str) -> None:
    """SIGBUS with BUS_MCEERR_AR, the page's host address and granule; EINTR, KVM_EXIT_INTR, RIP unchanged; again and
    again, until other memory is mapped there."""
    memory = GuestMemory(4 * PAGE)
    machine.vm.map(memory, HIGH)
    machine.long_mode(f"mov ${HIGH + PAGE}, %esi; 1: {access}; hlt")
    poison(machine.vm, memory, PAGE)
    with bus_errors() as seen:
        for count in (1, 2):
            assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
            assert seen == [{"si_code": 4, "addr_lsb": 12, "addr": memory.address + PAGE}] * count
            assert machine.vcpu.get_regs().rip == (HIGH + PAGE if "jmp" in access else CODE + 5)
    with pytest.raises(OSError):
        memory.read(PAGE, 1)
    memory.map(PAGE, PAGE)
    memory.write(PAGE, b"\xf4")
    machine.run_to_halt()


def test_poison_reaches_a_running_guest_and_unpoison_gives_the_page_back(machine: Machine) -> None:
    memory = GuestMemory(PAGE)
    machine.vm.map(memory, HIGH)
    machine.long_mode(f"mov ${HIGH}, %esi; 1: incq (%rsi); out %al, $1; jmp 1b")
    for count in range(1, 4):
        assert isinstance(machine.vcpu.run(), Io)
        poison(machine.vm, memory)
        with bus_errors() as seen:
            assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert len(seen) == 1
        unpoison(machine.vm, memory)
        assert memory.read(0, 8) == count.to_bytes(8, "little")


def test_poison_is_one_vms(machine: Machine) -> None:
    """Another VM over the same page has EFAULT, as of memory that nobody may touch."""
    memory = GuestMemory(PAGE)
    machine.vm.map(memory, HIGH)
    with Machine(machine.kvm) as other:
        other.vm.map(memory, HIGH)
        poison(machine.vm, memory)
        other.long_mode(READ)
        assert other.vcpu.run() == fault(HIGH)


def test_poisoned_page_tables_and_the_emulator(machine: Machine) -> None:
    """A table that is poisoned is SIGBUS too; REP OUTSB reads a poisoned page as a device's, without a signal."""
    machine.long_mode("mov $0x61000, %esi; mov $4, %ecx; mov $0x20, %edx; rep outsb; hlt")
    poison(machine.vm, machine.memory, 0x61000)
    with bus_errors() as seen:
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio) and (exit.phys_addr, exit.is_write) == (0x61000, False)
        assert seen == []
        machine.long_mode("hlt")
        poison(machine.vm, machine.memory, 0x11000)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert [one["addr"] for one in seen] == [machine.memory.address + 0x11000]


def test_poison_says_what_is_wrong(machine: Machine) -> None:
    memory = GuestMemory(2 * PAGE)
    with pytest.raises(ValueError, match="whole pages"):
        poison(machine.vm, memory, 1)
    with pytest.raises(IndexError):
        poison(machine.vm, memory, 2 * PAGE)
    with pytest.raises(ValueError, match="not a VM"):
        poison(machine.vcpu, memory)
    with Path("/dev/null").open() as null, pytest.raises(ValueError, match="not a VM"):
        poison(null, memory)
    memory.unmap(0, PAGE)
    with pytest.raises(OSError, match="poison of offset 0x0"):
        poison(machine.vm, memory)


INJECTED = """
import signal, sys
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.vm import VmFile
from anykvm.conformance import host, record

real = host.Host.advise

def advise(self, advice, offset=0, length=None):
    if advice != 100:  # MADV_HWPOISON
        return real(self, advice, offset, length)
    for file in list(FILES._files.values()):
        if isinstance(file, VmFile):
            assert library().ak_poison(file.vm.address, self.address + offset, True) == 0
    signal.raise_signal(signal.SIGBUS)  # as madvise() itself does

host.Host.advise = advise
sys.exit(record.main(sys.argv[1:]))
"""
NOT_OFFERED = {("pre_fault_poison", "*")}  # KVM_PRE_FAULT_MEMORY is compared where it is tested


def test_injected_poison_is_what_real_poison_was_recorded_to_be(tmp_path: Path) -> None:
    """The golden scenario hwpoison, with MADV_HWPOISON replaced by injection."""
    output = tmp_path / "hwpoison.jsonl"
    arguments = ["--backend", "soft", "--profile", "linux-7.3", "--output", str(output), "--intrusive", "hwpoison"]
    subprocess.run([sys.executable, "-c", INJECTED, *arguments], check=True, timeout=60)
    recorded = by_scenario(read_records(output))["hwpoison"]
    expected = golden("linux-7.3-npt")["hwpoison"]
    differences = compare_scenario("hwpoison", expected, recorded, NOT_OFFERED)
    assert not differences, "\n".join(map(str, differences))


def test_real_poison(machine: Machine) -> None:
    """MADV_HWPOISON takes a page of the machine's memory out of use until it is started again: only when asked for."""
    if os.environ.get("ANYKVM_TEST_HWPOISON") != "1":
        pytest.skip("NOT TESTED: MADV_HWPOISON: it breaks memory; ANYKVM_TEST_HWPOISON=1, as root, asks for it")
    host = anonymous(PAGE)
    put(machine, host)
    host.put64(0, 1)
    with bus_errors() as seen:
        try:
            host.advise(100)
        except OSError as error:
            pytest.skip(f"NOT TESTED: MADV_HWPOISON: {error}")
        seen.clear()
        machine.long_mode(READ)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert seen == [{"si_code": 4, "addr_lsb": 12, "addr": host.address}]
