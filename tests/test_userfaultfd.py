"""userfaultfd under a guest: KVM_RUN sleeps in the fault until its handler, in another thread, resolves it, or a signal
comes; as the kernel's does. The golden scenarios uffd_* say the same of a real kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from anykvm import Hlt, Intr, Io, abi
from anykvm.conformance import uffd
from anykvm.conformance.host import Host, anonymous
from anykvm.conformance.uffd import ANSWER, Userfaultfd
from anykvm.host import libc
from anykvm.testing.machine import CODE, DATA, Machine
from anykvm.testing.private import SIZE, private_guest

PAGE = 4096
HIGH = 0x800000
READ = f"mov ${HIGH}, %esi; mov (%rsi), %rax; hlt"
WRITE = f"mov ${HIGH}, %esi; mov %rsi, (%rsi); hlt"
ACCESS = CODE + 5


def available() -> str | None:
    """Why this machine has no userfaultfd for us; None if it has."""
    try:
        os.close(Userfaultfd(anonymous(PAGE)).fd)
    except OSError as error:
        return f"userfaultfd: {error}"
    return None


WHY_NOT = available()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"NOT TESTED: {WHY_NOT}")


def watched(machine: Machine, pages: int = 4, mode: int = uffd.MODE_MISSING, features: int = 0) -> Userfaultfd:
    host = anonymous(pages * PAGE)
    if mode == uffd.MODE_WP:
        host.put(0, bytes(pages * PAGE))
    machine.vm.set_user_memory_region(5, HIGH, host.size, host.address)
    return Userfaultfd(host, mode, features)


def interrupted(machine: Machine) -> None:
    """A timer ends a KVM_RUN that sleeps."""
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)


@pytest.mark.parametrize("source", [READ, WRITE, f"mov ${HIGH}, %esi; jmp *%rsi"])
def test_a_signal_ends_it_and_the_page_lets_it_go_on(machine: Machine, alarms: list[int], source: str) -> None:
    faults = watched(machine)
    machine.long_mode(source)
    for count in (1, 2, 3):
        interrupted(machine)
        assert len(alarms) == count
        assert machine.vcpu.get_regs().rip == (HIGH if "jmp" in source else ACCESS)
    assert faults.pending() == []  # who no longer waits is not in the queue either
    faults.zero_page(0)
    faults.host.put(0, b"\xf4")
    machine.run_to_halt()
    os.close(faults.fd)


def test_handler_in_another_thread(machine: Machine) -> None:
    faults = watched(machine)
    thread = faults.handle(seconds=0.2)
    machine.long_mode(READ)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rax == ANSWER
    machine.long_mode(f"mov ${HIGH + PAGE}, %esi; mov %rsi, (%rsi); hlt")
    machine.run_to_halt()
    assert faults.host.get64(PAGE) == HIGH + PAGE
    thread.join()
    assert (faults.messages, faults.flags & uffd.FLAG_WRITE) == (2, uffd.FLAG_WRITE)


def test_write_protection(machine: Machine, alarms: list[int]) -> None:
    """Reads go on; a write, whose page the guest has mapped writable already, sleeps."""
    faults = watched(machine, mode=uffd.MODE_WP, features=uffd.FEATURE_WP)
    machine.long_mode(f"mov ${HIGH}, %esi; incq (%rsi); mov (%rsi), %rax; out %al, $1; incq (%rsi); hlt")
    assert isinstance(machine.vcpu.run(), Io)
    faults.write_protect(0, PAGE)
    interrupted(machine)
    assert (len(alarms), machine.vcpu.get_regs().rax, faults.host.get64(0)) == (1, 1, 1)
    faults.write_protect(0, PAGE, on=False)
    machine.run_to_halt()
    assert faults.host.get64(0) == 2


LOOPS = {
    "store": "1: inc %rbx; mov %rbx, (%rsi); mov %rbx, (%rdi); jmp 1b",
    "load": "1: inc %rbx; mov %rbx, (%rdi); mov (%rsi), %rax; jmp 1b",
    "helper": "1: inc %rbx; mov %rbx, (%rdi); fxsave (%rsi); jmp 1b",
    "string": "1: inc %rbx; mov %rbx, (%rdi); push %rsi; push %rdi; mov %rsi, %rdi; mov $8, %ecx; rep stosq;"
    " pop %rdi; pop %rsi; jmp 1b",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_page_taken_from_a_running_guest(machine: Machine, alarms: list[int], loop: str) -> None:
    """The guest sleeps in its own store, in translated code, not in a look-up: a signal ends that too, precisely."""
    faults = watched(machine)
    faults.zero_page(0, 4 * PAGE)
    machine.long_mode(f"mov ${HIGH}, %esi; mov ${DATA}, %edi; {LOOPS[loop]}")
    main = threading.get_ident()
    for _ in range(5):
        exits: list[object] = []
        before = machine.memory.read(DATA, 8)

        def take() -> None:
            while machine.memory.read(DATA, 8) == before:  # noqa: B023
                pass
            libc.madvise(faults.host.address, PAGE, libc.MADV_DONTNEED)
            while not faults.pending():
                pass
            signal.pthread_kill(main, signal.SIGALRM)

        thread = threading.Thread(target=take)
        thread.start()
        exits.append(machine.vcpu.run())
        thread.join()
        assert exits == [Intr(abi.KVM_EXIT_INTR)]
        regs = machine.vcpu.get_regs()
        counted = int.from_bytes(machine.memory.read(DATA, 8), "little")
        assert regs.rbx - counted == (1 if loop == "store" else 0)
        faults.zero_page(0)
    assert len(alarms) == 5


def test_the_signal_that_only_kvm_run_takes(machine: Machine, alarms: list[int]) -> None:
    """KVM_SET_SIGNAL_MASK opens it; blocked for the thread, it is pending when KVM_RUN has returned."""
    watched(machine)
    machine.long_mode(READ)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        machine.vcpu.set_signal_mask(())
        interrupted(machine)
        assert signal.SIGALRM in signal.sigpending()
        assert signal.sigwait({signal.SIGALRM}) == signal.SIGALRM
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    assert alarms == []


def test_a_blocked_or_ignored_signal_does_not_end_it(machine: Machine, alarms: list[int]) -> None:
    faults = watched(machine)
    machine.long_mode(READ)
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    main = threading.get_ident()

    def later() -> None:
        while not faults.pending():
            pass
        for _ in range(20):
            signal.pthread_kill(main, signal.SIGUSR1)
            signal.pthread_kill(main, signal.SIGALRM)
            threading.Event().wait(0.002)
        faults.zero_page(0)

    thread = threading.Thread(target=later)
    thread.start()
    try:
        machine.run_to_halt()
        assert signal.sigwait({signal.SIGALRM}) == signal.SIGALRM
    finally:
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGUSR1, old)


def test_no_signal_is_lost_and_none_invented(machine: Machine) -> None:
    """Signals and pages race; each signal's handler runs, each EINTR has one, memory is right at the end."""
    pages = 64
    faults = watched(machine, pages)
    machine.long_mode(
        f"mov ${HIGH}, %esi; 1: mov %rsi, (%rsi); add $0x1000, %rsi; cmp ${HIGH + pages * PAGE}, %rsi; jb 1b; hlt"
    )
    main, handled = threading.get_ident(), threading.Event()
    sent: dict[int, int] = {signal.SIGUSR1: 0, signal.SIGUSR2: 0}
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        if number == signal.SIGUSR1:
            handled.set()

    def resolve(offset: int) -> None:
        page = offset // PAGE
        if page % 2:  # USR1 comes while the page stays away, USR2 just as it arrives
            number = signal.SIGUSR1 if page % 4 == 1 else signal.SIGUSR2
            handled.clear()
            sent[number] += 1
            signal.pthread_kill(main, number)
            if number == signal.SIGUSR1:
                assert handled.wait(10)
        with contextlib.suppress(FileExistsError):
            faults.zero_page(offset)

    old = [(number, signal.signal(number, handler)) for number in sent]
    thread = faults.handle(resolve, seconds=0.3)
    interruptions = 0
    while (exit := machine.vcpu.run()) != Hlt():
        assert exit == Intr(abi.KVM_EXIT_INTR)
        interruptions += 1
    thread.join()
    for number, previous in old:
        signal.signal(number, previous)
    assert seen.count(signal.SIGUSR1) == sent[signal.SIGUSR1] >= pages // 4
    assert 1 <= seen.count(signal.SIGUSR2) <= sent[signal.SIGUSR2]  # two that wait are one
    assert pages // 4 <= interruptions <= len(seen)
    assert [faults.host.get64(page * PAGE) for page in range(pages)] == [HIGH + page * PAGE for page in range(pages)]


def test_a_guest_memfd_that_is_missing(alarms: list[int]) -> None:
    """A signal while the look-up of a private page sleeps is EINTR, not a failed look-up."""
    with private_guest() as guest:
        maps = [
            line.split()
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "memfd:guest_memfd " in line and line.split()[4] == str(os.fstat(guest.gmem).st_ino)
        ]
        address = int(maps[-1][0].split("-")[0], 16)
        faults = Userfaultfd(Host(address, SIZE))
        guest.load("mov (%rbx), %rax; hlt")
        guest.private()
        interrupted(guest)
        interrupted(guest)
        assert guest.vcpu.get_regs().rip == CODE
        faults.copy(0, ANSWER.to_bytes(8, "little").ljust(PAGE, b"\0"))
        guest.run_to_halt()
        assert guest.rax() == ANSWER
        os.close(faults.fd)


def test_guest_page_table_that_is_missing(machine: Machine, alarms: list[int]) -> None:
    faults = watched(machine)
    machine.long_mode("mov $1, %eax; hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.cr3 = HIGH
    machine.vcpu.set_sregs(sregs)
    interrupted(machine)
    assert machine.vcpu.get_regs().rip == CODE
    faults.zero_page(0)
    faults.host.put(0, machine.memory.read(0x10000, PAGE))
    machine.run_to_halt()


def test_many_vcpus_sleep_at_once(machine: Machine) -> None:
    """Each in its own page; one thread resolves all."""
    count = 4
    faults = watched(machine, count)
    others = [Machine(machine.kvm) for _ in range(count)]
    done: list[int] = []

    def go(index: int, one: Machine) -> None:
        one.run_to_halt()
        done.append(one.vcpu.get_regs().rax)

    threads = []
    for index, one in enumerate(others):
        one.vm.set_user_memory_region(5, HIGH, faults.host.size, faults.host.address)
        one.long_mode(f"mov ${HIGH + index * PAGE}, %esi; mov (%rsi), %rax; hlt")
        threads.append(threading.Thread(target=go, args=(index, one)))
        threads[-1].start()
    handler = faults.handle(seconds=0.2)
    for thread in (*threads, handler):
        thread.join()
    assert done == [ANSWER] * count
    for one in others:
        one.__exit__(None, None, None)


def test_device_string_input_into_a_missing_page_waits(machine: Machine) -> None:
    """KVM's emulator copies to user memory: no signal ends that, the handler does."""
    faults = watched(machine)
    machine.long_mode(f"mov ${HIGH}, %edi; mov $4, %ecx; mov $0x20, %edx; rep insb; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Io)
    exit.respond(b"abcd")
    thread = faults.handle(seconds=0.2)
    machine.run_to_halt()
    thread.join()
    assert faults.host.get(0, 4) == b"abcd"
