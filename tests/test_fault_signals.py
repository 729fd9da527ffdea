"""The signals of faults, when a thread has them blocked or somebody sends them: memory that is not there is an errno or
an exit all the same, and a signal stays pending until its thread takes it. The kernel's KVM has no need to care."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import GuestMemory, Intr, Io, MemoryFault, abi
from anykvm.backends.soft import poison
from anykvm.testing.machine import CODE, DATA, Machine
from soft_helpers import refused

PAGE = 4096
HIGH = 0x1000000
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
SPIN = f"1: incq {DATA:#x}; jmp 1b"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with anykvm.open("soft") as kvm, Machine(kvm) as made:
        yield made


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """This thread blocks signals; what it leaves pending is taken at the end, and was at most one of each."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        while signal.sigtimedwait(signals, 0):
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def send(number: int, thread: int | None = None) -> None:
    signal.pthread_kill(thread or threading.get_ident(), number)


def taken(number: int) -> bool:
    """Take it, if it is pending; then it is not."""
    found = signal.sigtimedwait({number}, 0)
    assert signal.sigtimedwait({number}, 0) is None
    return found is not None and found.si_signo == number


# -- faults ------------------------------------------------------------------------------------------------------------


def test_memory_faults_of_a_thread_that_blocks_their_signals(machine: Machine) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    with blocked(*FAULTS), GuestMemory(2 * PAGE) as anonymous, GuestMemory(2 * PAGE, fd=fd) as file:
        anonymous.protect(PAGE, PAGE, 0)
        machine.vm.map(anonymous, HIGH)
        machine.vm.map(file, 2 * HIGH)
        machine.long_mode(f"mov ${HIGH + PAGE}, %eax; mov (%rax), %ebx; hlt")
        assert isinstance(machine.vcpu.run(), MemoryFault)
        for base in (HIGH, 2 * HIGH):
            machine.vcpu.pre_fault_memory(base, PAGE)
            with refused(errno.EFAULT):
                machine.vcpu.pre_fault_memory(base + PAGE, PAGE)
            assert machine.vcpu.translate(base + PAGE).valid
        sregs = machine.vcpu.get_sregs()
        sregs.cr3 = 2 * HIGH + PAGE
        machine.vcpu.set_sregs(sregs)
        assert not machine.vcpu.translate(HIGH).valid
        with refused(errno.EFAULT):
            machine.kvm.backend.ioctl(machine.vcpu.fileno(), abi.KVM_GET_REGS, anonymous.address + PAGE)
        assert signal.sigpending() & FAULTS == set()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= FAULTS
    os.close(fd)


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(FAULTS))
def test_pending_and_blocked_it_stays_pending(machine: Machine, number: signal.Signals) -> None:
    """Blocked in KVM_RUN too, it does not disturb; open there, it ends it before the guest is entered."""
    machine.long_mode("1: out %al, $0x10; jmp 1b")
    with blocked(number):
        send(number)
        assert isinstance(machine.vcpu.run(), Io)
        assert isinstance(machine.vcpu.run(), Io)
        rip = machine.vcpu.get_regs().rip
        machine.vcpu.set_signal_mask(())
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert machine.vcpu.get_regs().rip == rip + 2  # the output was completed, no more
        with refused(errno.EFAULT):
            machine.kvm.backend.ioctl(machine.vcpu.fileno(), abi.KVM_GET_REGS, 8)
        assert taken(number)
        assert isinstance(machine.vcpu.run(), Io)
        machine.vcpu.set_signal_mask(None)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS])
@pytest.mark.parametrize("opened", [True, False])
def test_sent_while_the_guest_runs(machine: Machine, number: signal.Signals, opened: bool) -> None:
    machine.long_mode(SPIN)
    main = threading.get_ident()
    old = signal.signal(signal.SIGALRM, lambda number, frame: None)

    def counter() -> bytes:
        return machine.memory.read(DATA, 8)

    def kick() -> None:
        before = counter()
        while counter() == before:
            pass
        send(number, main)
        if not opened:
            before = counter()
            while counter() == before:
                pass
            send(signal.SIGALRM, main)

    with blocked(number):
        machine.vcpu.set_signal_mask(() if opened else {number})
        thread = threading.Thread(target=kick)
        thread.start()
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        thread.join()
        assert taken(number)
        machine.vcpu.set_signal_mask(None)
    signal.signal(signal.SIGALRM, old)


def test_its_handler_runs_when_kvm_run_has_returned(machine: Machine) -> None:
    """Not blocked: EINTR, and the handler."""
    machine.long_mode(SPIN)
    seen: list[int] = []
    old = signal.signal(signal.SIGBUS, lambda number, frame: seen.append(number))
    main = threading.get_ident()
    try:
        thread = threading.Timer(0.02, lambda: send(signal.SIGBUS, main))
        thread.start()
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        thread.join()
        assert seen == [signal.SIGBUS]
    finally:
        signal.signal(signal.SIGBUS, old)


def test_sigbus_of_a_poisoned_page_waits_for_its_thread(machine: Machine) -> None:
    """By KVM_PRE_FAULT_MEMORY; KVM_RUN after it finds it pending."""
    machine.long_mode("1: out %al, $0x10; jmp 1b")
    with blocked(signal.SIGBUS), GuestMemory(PAGE) as memory:
        machine.vm.map(memory, HIGH)
        poison(machine.vm, memory)
        with refused(errno.EINTR):
            machine.vcpu.pre_fault_memory(HIGH, PAGE)
        machine.vcpu.set_signal_mask(())
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert machine.vcpu.get_regs().rip == CODE
        found = signal.sigtimedwait({signal.SIGBUS}, 0)
        assert found is not None and found.si_code == 4  # BUS_MCEERR_AR, as it was sent
        assert isinstance(machine.vcpu.run(), Io)
