"""KVM_RUN row by row: what is returned, what stays in kvm_run, what is completed. Covers every branch of run.py."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time

import pytest

import anykvm
from anykvm import Hlt, InternalError, Intr, Io, IrqWindowOpen, MemoryFault, Mmio, SetTpr, Shutdown, abi
from anykvm.backends import soft
from anykvm.backends.soft import PROFILES
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.vm import VmFile
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, DATA, Machine

RUN = abi.KVM_RUN
DEVICE = 0x1000000  # no memslot there


@pytest.fixture
def profile(each_profile: str) -> str:
    return each_profile


def raw(machine: Machine, arg: int = 0) -> int:
    """KVM_RUN on the waist: 0 or the errno."""
    try:
        return machine.kvm.backend.ioctl(machine.vcpu.fileno(), RUN, arg)
    except OSError as error:
        assert error.errno is not None
        return error.errno


def poison(machine: Machine, reason: int = 0xDEAD) -> None:
    run = machine.vcpu.kvm_run
    run.exit_reason, run.flags = reason, 0x5555


def test_argument_must_be_zero(machine: Machine) -> None:
    machine.long_mode("hlt")
    poison(machine)
    assert raw(machine, 1) == errno.EINVAL  # row 5
    assert (machine.vcpu.kvm_run.exit_reason, machine.vcpu.kvm_run.flags) == (0xDEAD, 0x5555)


def test_what_is_no_vcpu(machine: Machine) -> None:
    """KVM_RUN goes by what is open, each time: no vCPU, no KVM file, nothing."""
    backend = machine.kvm.backend
    machine.long_mode("hlt")
    twin = os.dup(machine.vcpu.fileno())
    assert backend.ioctl(twin, RUN) == 0
    for other, code in ((machine.kvm.fileno(), errno.EINVAL), (machine.vm.fileno(), errno.ENOTTY), (0, errno.ENOTTY)):
        os.dup2(other, twin)
        with pytest.raises(OSError, match="KVM_RUN") as caught:
            backend.ioctl(twin, RUN)
        assert caught.value.errno == code
    os.close(twin)
    with pytest.raises(OSError, match="KVM_RUN") as caught:
        backend.ioctl(twin, RUN)
    assert caught.value.errno == errno.EBADF


def test_closed_while_it_runs(alarms: list[int]) -> None:
    """Who runs a vCPU holds it: the VM goes when KVM_RUN is over, and not before."""
    with anykvm.open("soft") as kvm:
        before = len(FILES)
        machine = Machine(kvm)
        machine.long_mode("mov $0x60000, %rdi; 1: incl (%rdi); jmp 1b")
        fd, seen = machine.vcpu.fileno(), []

        def close() -> None:
            while not machine.memory.read(DATA, 4).strip(b"\0"):
                time.sleep(0.001)
            machine.vm.close()  # with the vCPU, its descriptor and mapping
            seen.append(len(FILES) - before)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(InterruptedError):
            kvm.backend.ioctl(fd, RUN)
        closing.join()
        assert (seen, len(FILES) - before, len(alarms)) == ([1], 0, 1)


def test_forked_child_gets_eio(machine: Machine) -> None:
    machine.long_mode("hlt")
    pid = os.fork()
    if not pid:
        os._exit(raw(machine))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EIO  # row 1


def test_immediate_exit_keeps_reason_and_payload(machine: Machine) -> None:
    machine.long_mode("mov $0x60123, %rax; mov (%rax), %rbx; hlt")
    machine.memory.protect(DATA, 4096, 0)
    assert raw(machine) == errno.EFAULT
    run = machine.vcpu.kvm_run
    before = (run.exit_reason, bytes(run)[32:56])
    machine.vcpu.immediate_exit = True
    assert raw(machine) == errno.EINTR  # row 17
    assert (run.exit_reason, bytes(run)[32:56]) == before
    assert machine.vcpu.run() == Intr(before[0])
    machine.vcpu.immediate_exit = False
    machine.memory.protect(DATA, 4096, 3)
    machine.run_to_halt()


def test_flags_are_cleared(machine: Machine) -> None:
    machine.long_mode("hlt")
    poison(machine)
    assert raw(machine) == 0
    assert (machine.vcpu.kvm_run.exit_reason, machine.vcpu.kvm_run.flags) == (abi.KVM_EXIT_HLT, 0)


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
@pytest.mark.parametrize("bits", [8, 1 << 40])
def test_unknown_register_sets(machine: Machine, profile: str, field: str, bits: int) -> None:
    machine.long_mode("hlt")
    poison(machine)
    setattr(machine.vcpu.kvm_run, field, bits)
    ignored = bits >> 32 and PROFILES[profile].sync_low_half
    assert raw(machine) == (0 if ignored else errno.EINVAL)  # row 12
    reason = abi.KVM_EXIT_HLT if ignored else 0xDEAD
    assert (machine.vcpu.kvm_run.exit_reason, machine.vcpu.kvm_run.flags) == (reason, 0)


def test_register_sync(machine: Machine) -> None:
    machine.long_mode("out %al, $0xe9; mov %rbx, %rcx; hlt")
    run = machine.vcpu.kvm_run
    run.kvm_valid_regs = 7
    assert isinstance(machine.vcpu.run(), Io)
    regs, sregs = run.s.regs.regs, run.s.regs.sregs
    assert (regs.rip, sregs.cr3) == (CODE, 0x10000)
    regs.rip, regs.rbx = CODE + 2, 77  # past the OUT: its completion is dropped
    run.kvm_dirty_regs = 7
    assert machine.vcpu.run() == Hlt()
    assert run.kvm_dirty_regs == 0
    assert run.s.regs.regs.rcx == 77


@pytest.mark.parametrize("which", ["sregs", "events"])
def test_refused_register_sync(machine: Machine, which: str) -> None:
    machine.long_mode("hlt")
    run = machine.vcpu.kvm_run
    run.kvm_valid_regs = 7
    machine.vcpu.immediate_exit = True
    machine.vcpu.run()
    machine.vcpu.immediate_exit = False
    if which == "sregs":
        run.s.regs.sregs.cr4 |= 1 << 27
        run.kvm_dirty_regs = 2
    else:
        run.s.regs.events.flags = 1 << 20
        run.kvm_dirty_regs = 4
    poison(machine)
    assert raw(machine) == errno.EINVAL  # row 13
    assert run.exit_reason == 0xDEAD
    assert run.kvm_dirty_regs


def test_task_priority_of_the_page(machine: Machine) -> None:
    machine.long_mode("mov %cr8, %rax; mov %rax, %rbx; mov $3, %eax; mov %rax, %cr8; hlt")
    machine.vcpu.kvm_run.cr8 = 16
    poison(machine)
    assert raw(machine) == errno.EINVAL  # row 14
    assert machine.vcpu.kvm_run.exit_reason == 0xDEAD
    machine.vcpu.kvm_run.cr8 = 9
    assert machine.vcpu.run() == SetTpr()  # it is lower: user space, which has the APIC, may have an interrupt for it
    assert machine.vcpu.kvm_run.cr8 == 3
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rbx == 9
    assert machine.vcpu.kvm_run.cr8 == 3


def test_port_io_completes_at_the_next_run_exactly_once(machine: Machine) -> None:
    machine.long_mode("mov $-1, %rax; in $0x20, %al; in $0x21, %ax; in $0x22, %eax; hlt")
    for value, expected in ((0x12, 0xFFFFFFFFFFFFFF12), (0x3456, 0xFFFFFFFFFFFF3456), (0x789ABCDE, 0x789ABCDE)):
        exit = machine.vcpu.run()
        assert isinstance(exit, Io)
        before = machine.vcpu.get_regs().rip
        exit.respond(value)
        machine.vcpu.immediate_exit = True
        assert isinstance(machine.vcpu.run(), Intr)  # completes, does not enter
        machine.vcpu.immediate_exit = False
        regs = machine.vcpu.get_regs()
        assert (regs.rax, regs.rip > before) == (expected, True)
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rax == 0x789ABCDE


def test_port_io_result_is_dropped_when_rip_was_moved(machine: Machine) -> None:
    machine.long_mode("mov $1, %eax; in $0x20, %al; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Io)
    exit.respond(0x99)
    machine.set_regs(rip=CODE + len(assemble("mov $1, %eax; in $0x20, %al")))
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rax == 1


def test_string_output_one_item_an_exit(machine: Machine) -> None:
    machine.memory.write(DATA, b"abcdef")
    machine.long_mode("mov $0x60000, %esi; mov $3, %ecx; mov $0x20, %dx; rep outsw; hlt")
    seen = []
    while isinstance(exit := machine.vcpu.run(), Io):
        seen.append((exit.size, exit.count, exit.data, machine.vcpu.get_regs().rcx))
    assert exit == Hlt()
    assert seen == [(2, 1, b"ab", 2), (2, 1, b"cd", 1), (2, 1, b"ef", 0)]


def test_string_input_as_many_items_as_the_page_has_bytes(machine: Machine) -> None:
    machine.long_mode("mov $0x60ffc, %edi; mov $5, %ecx; mov $0x20, %dx; rep insw; hlt")
    first = machine.vcpu.run()
    assert isinstance(first, Io) and (first.count, first.size) == (4, 2)  # as many as the page has bytes
    first.respond(b"abcdefgh")
    second = machine.vcpu.run()
    assert isinstance(second, Io) and second.count == 1
    assert machine.memory.read(0x60FFC, 8) == b"abcdefgh"
    second.respond(b"ij")
    machine.vcpu.immediate_exit = True
    assert isinstance(machine.vcpu.run(), Intr)
    assert machine.memory.read(0x61004, 2) == b"ij"
    machine.vcpu.immediate_exit = False
    machine.run_to_halt()
    regs = machine.vcpu.get_regs()
    assert (regs.rcx, regs.rdi) == (0, 0x61006)


def test_string_input_with_the_count_changed_between(machine: Machine) -> None:
    machine.long_mode("mov $0x60000, %edi; mov $8, %ecx; mov $0x20, %dx; rep insb; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Io) and exit.count == 8
    exit.respond(b"abcdefgh")
    machine.set_regs(rcx=1)
    machine.run_to_halt()
    assert machine.memory.read(DATA, 2) == b"a\0"


def test_device_write_leaves_behind_the_instruction(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE}, %edi; movl $0x11223344, (%rdi); hlt")
    assert machine.vcpu.run() == Mmio(DEVICE, bytes.fromhex("44332211"), 4, True)
    assert machine.vcpu.get_regs().rip == CODE + len(assemble(f"mov ${DEVICE}, %edi; movl $0x11223344, (%rdi)"))
    machine.run_to_halt()


def test_device_read_leaves_at_the_instruction(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE}, %edi; movzwl 3(%rdi), %eax; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Mmio) and (exit.phys_addr, exit.len, exit.is_write) == (DEVICE + 3, 2, False)
    at = CODE + len(assemble(f"mov ${DEVICE}, %edi"))
    assert machine.vcpu.get_regs().rip == at
    exit.respond(0xBEEF)
    machine.vcpu.immediate_exit = True
    assert isinstance(machine.vcpu.run(), Intr)
    regs = machine.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0xBEEF, at + 4)
    machine.vcpu.immediate_exit = False
    machine.run_to_halt()


@pytest.mark.parametrize("instruction", ["addl $5, (%rdi)", "lock addl $5, (%rdi)"])
def test_device_read_modify_write(machine: Machine, instruction: str) -> None:
    machine.long_mode(f"mov ${DEVICE}, %edi; {instruction}; hlt")
    read = machine.vcpu.run()
    assert isinstance(read, Mmio) and not read.is_write
    read.respond(37)
    assert machine.vcpu.run() == Mmio(DEVICE, (42).to_bytes(4, "little"), 4, True)
    machine.run_to_halt()


def test_device_access_across_a_page_boundary_is_two_exits_even_with_immediate_exit(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE + 0xFFC}, %edi; movabs $0x8877665544332211, %rax; mov %rax, (%rdi); hlt")
    assert machine.vcpu.run() == Mmio(DEVICE + 0xFFC, bytes.fromhex("11223344"), 4, True)
    machine.vcpu.immediate_exit = True
    assert machine.vcpu.run() == Mmio(DEVICE + 0x1000, bytes.fromhex("55667788"), 4, True)  # row 15: 0, not EINTR
    assert isinstance(machine.vcpu.run(), Intr)
    machine.vcpu.immediate_exit = False
    machine.run_to_halt()


def test_store_from_memory_into_device_space(machine: Machine) -> None:
    size = machine.memory.size
    machine.long_mode(f"mov ${size - 4}, %edi; movabs $0x8877665544332211, %rax; mov %rax, (%rdi); hlt")
    assert machine.vcpu.run() == Mmio(size, bytes.fromhex("55667788"), 4, True)
    assert machine.memory.read(size - 4, 4) == bytes.fromhex("11223344")
    machine.run_to_halt()


def test_rep_movs_between_memory_and_device(machine: Machine) -> None:
    machine.memory.write(DATA, b"xyz")
    machine.long_mode(
        f"""mov $0x60000, %esi; mov ${DEVICE}, %edi; mov $3, %ecx; rep movsb
        mov ${DEVICE}, %esi; mov $0x60100, %edi; mov $2, %ecx; rep movsw; hlt"""
    )
    for i, byte in enumerate(b"xyz"):
        assert machine.vcpu.run() == Mmio(DEVICE + i, bytes([byte]), 1, True)
    for i, word in enumerate((0x1122, 0x3344)):
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio) and (exit.phys_addr, exit.len, exit.is_write) == (DEVICE + 2 * i, 2, False)
        exit.respond(word)
    machine.run_to_halt()
    assert machine.memory.read(0x60100, 4) == bytes.fromhex("22114433")


def test_answer_counts_even_if_a_slot_appears_meanwhile(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE}, %edi; mov (%rdi), %eax; mov (%rdi), %ebx; hlt")
    exit = machine.vcpu.run()
    assert isinstance(exit, Mmio)
    exit.respond(0x1234)
    with anykvm.GuestMemory(4096) as more:
        more.write(0, (0x5678).to_bytes(4, "little"))
        machine.vm.map(more, DEVICE)
        machine.run_to_halt()
        regs = machine.vcpu.get_regs()
        assert (regs.rax, regs.rbx) == (0x1234, 0x5678)
        machine.vcpu.close()


def test_read_only_slot(machine: Machine) -> None:
    with anykvm.GuestMemory(4096) as rom:
        rom.write(0, b"ROM!")
        machine.vm.map(rom, DEVICE, flags=abi.KVM_MEM_READONLY)
        machine.long_mode(f"mov ${DEVICE}, %edi; mov (%rdi), %eax; movl $1, (%rdi); incl (%rdi); hlt")
        assert machine.vcpu.run() == Mmio(DEVICE, (1).to_bytes(4, "little"), 4, True)
        assert machine.vcpu.get_regs().rax == int.from_bytes(b"ROM!", "little")
        incremented = int.from_bytes(b"ROM!", "little") + 1
        assert machine.vcpu.run() == Mmio(DEVICE, incremented.to_bytes(4, "little"), 4, True)
        machine.run_to_halt()
        assert rom.read(0, 4) == b"ROM!"
        machine.vcpu.close()


def test_memory_fault_validity(machine: Machine, profile: str) -> None:
    machine.long_mode("mov $0x60123, %rax; incl (%rax); hlt")
    machine.memory.protect(DATA, 4096, 0)
    at = CODE + len(assemble("mov $0x60123, %rax"))
    poison(machine)
    if profile == "documented":
        assert machine.vcpu.run() == MemoryFault(DATA, 4096, 0, errno.EFAULT)
    else:
        with pytest.raises(OSError, match="KVM_RUN") as caught:
            machine.vcpu.run()
        assert caught.value.errno == errno.EFAULT
        assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN
    assert machine.vcpu.get_regs().rip == at
    machine.memory.protect(DATA, 4096, 3)
    machine.run_to_halt()
    assert int.from_bytes(machine.memory.read(DATA + 0x123, 4), "little") == 1


def test_pending_signal_under_the_mask_wins_before_the_guest_runs(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("mov $1, %eax; 1: jmp 1b")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        machine.vcpu.set_signal_mask([])
        signal.raise_signal(signal.SIGALRM)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert machine.vcpu.get_regs().rip == CODE
        assert signal.SIGALRM in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def test_signal_ends_a_running_guest(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("1: incq (0x60000); inc %rax; jmp 1b")
    for _ in range(20):
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)  # again: the first may come before KVM_RUN begins
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)  # row 31
        memory = int.from_bytes(machine.memory.read(DATA, 8), "little")
        assert memory - machine.vcpu.get_regs().rax in (0, 1)  # no store is lost or done twice
    assert memory > 1000


def test_ignored_signal_does_not_end_a_run(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("mov $30000000, %ecx; 1: dec %ecx; jnz 1b; hlt")
    old = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGALRM, old)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        machine.run_to_halt()


def test_blocked_signal_does_not_end_a_run(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("mov $30000000, %ecx; 1: dec %ecx; jnz 1b; hlt")
    machine.vcpu.set_signal_mask([signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    machine.run_to_halt()


def test_kick_from_another_thread_is_never_lost(machine: Machine, alarms: list[int]) -> None:
    """immediate_exit and a signal, as VMMs kick: whenever it comes, KVM_RUN ends."""
    machine.long_mode("1: jmp 1b")
    main = threading.get_ident()

    def kick() -> None:
        machine.vcpu.immediate_exit = True
        signal.pthread_kill(main, signal.SIGALRM)

    for _ in range(50):
        machine.vcpu.immediate_exit = False
        kicker = threading.Thread(target=kick)
        kicker.start()
        assert isinstance(machine.vcpu.run(), Intr)
        kicker.join()


def test_interrupt_window(machine: Machine) -> None:
    machine.long_mode("cli; mov $0x11, %ebx; sti; nop; mov $0x22, %ebx; hlt")
    run = machine.vcpu.kvm_run
    run.request_interrupt_window = 1
    assert machine.vcpu.run() == IrqWindowOpen()  # row 30
    assert run.ready_for_interrupt_injection == 1 and run.if_flag == 1
    assert machine.vcpu.get_regs().rip == CODE + len(assemble("cli; mov $0x11, %ebx; sti; nop"))
    run.request_interrupt_window = 0
    machine.vcpu.interrupt(0x15)
    assert machine.trap().vector == 0x15


def test_interrupt_window_wins_over_a_signal(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("1: jmp 1b", rflags=0x202)
    machine.vcpu.kvm_run.request_interrupt_window = 1
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        machine.vcpu.set_signal_mask([])
        signal.raise_signal(signal.SIGALRM)
        assert machine.vcpu.run() == IrqWindowOpen()  # row 30, before row 31
        assert machine.vcpu.get_regs().rip == CODE
        machine.set_regs(rflags=2)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def test_shutdown(machine: Machine) -> None:
    machine.long_mode("lidt (0x7000); ud2")
    assert machine.vcpu.run() == Shutdown()


def test_fetch_from_device_space_is_an_emulation_failure(machine: Machine) -> None:
    machine.long_mode(f"mov ${DEVICE}, %eax; jmp *%rax")
    exit = machine.vcpu.run()
    assert isinstance(exit, InternalError) and exit.suberror == abi.KVM_INTERNAL_ERROR_EMULATION


def test_delivery_into_device_space(machine: Machine, profile: str) -> None:
    machine.long_mode("ud2")
    sregs = machine.vcpu.get_sregs()
    sregs.idt.base = DEVICE
    machine.vcpu.set_sregs(sregs)
    exit = machine.vcpu.run()
    assert isinstance(exit, InternalError)
    if PROFILES[profile].emulate_in_delivery:  # the UD2, which KVM does not emulate
        assert (exit.suberror, exit.data[0]) == (abi.KVM_INTERNAL_ERROR_EMULATION, 1)
    else:
        assert (exit.suberror, exit.data[3]) == (abi.KVM_INTERNAL_ERROR_DELIVERY_EV, DEVICE + 6 * 16)


def test_unknown_hypercall(machine: Machine) -> None:
    machine.long_mode("mov $99, %eax; vmcall; mov %rax, %rbx; vmmcall; hlt")
    machine.run_to_halt()
    assert machine.vcpu.get_regs().rbx == (1 << 64) - 1000  # -KVM_ENOSYS


def test_dead_vm(machine: Machine) -> None:
    """A VM that dies while its vCPU runs: the run ends with EIO, and so does each later ioctl (rows 1 and 20)."""
    machine.long_mode("1: jmp 1b")
    file = FILES.get(machine.vm.fileno())
    assert isinstance(file, VmFile)
    timer = threading.Timer(0.02, file.vm.kill)
    timer.start()
    assert raw(machine) == errno.EIO
    timer.join()
    assert raw(machine) == errno.EIO


def test_poisoned_page_is_sigbus_and_eintr(machine: Machine, sigbus: list[int]) -> None:
    """kvm_send_hwpoison_signal(): never EHWPOISON for ordinary memory."""
    machine.long_mode("mov $0x60000, %rax; mov (%rax), %rbx; hlt")
    soft.poison(machine.vm, machine.memory, DATA)
    poison(machine)
    assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
    assert sigbus == [signal.SIGBUS]
    soft.unpoison(machine.vm, machine.memory, DATA)
    machine.run_to_halt()


def test_poisoned_page_with_sigbus_blocked_retries_until_another_signal(machine: Machine, alarms: list[int]) -> None:
    machine.long_mode("mov $0x60000, %rax; mov (%rax), %rbx; hlt")
    soft.poison(machine.vm, machine.memory, DATA)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert signal.SIGBUS in signal.sigpending()
        assert signal.sigwait({signal.SIGBUS}) == signal.SIGBUS
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS})


EARLY = ["early-purge-before-lock", "early-purge-after-lock", "early-purge-after-completion"]
PURGES = ["linux-7.3", *EARLY, "never-purge"]


@pytest.mark.parametrize("profile", PURGES)
class TestWhereExitReasonIsReset:
    """The research profiles: exit_reason after each early return, in the order of the returns."""

    def test_a_dead_vcpu_is_refused_first(self, machine: Machine, profile: str) -> None:
        machine.long_mode("hlt")
        file = FILES.get(machine.vm.fileno())
        assert isinstance(file, VmFile)
        file.vm.kill()
        poison(machine)
        assert raw(machine) == errno.EIO
        assert machine.vcpu.kvm_run.exit_reason == 0xDEAD

    def test_wrong_argument(self, machine: Machine, profile: str) -> None:
        machine.long_mode("hlt")
        poison(machine)
        assert raw(machine, 1) == errno.EINVAL
        assert machine.vcpu.kvm_run.exit_reason == (0 if profile == EARLY[0] else 0xDEAD)

    def test_refused_register_sync(self, machine: Machine, profile: str) -> None:
        machine.long_mode("hlt")
        poison(machine)
        machine.vcpu.kvm_run.kvm_dirty_regs = 8
        assert raw(machine) == errno.EINVAL
        assert machine.vcpu.kvm_run.exit_reason == (0 if profile in EARLY[:2] else 0xDEAD)

    def test_completion_that_exits_again(self, machine: Machine, profile: str) -> None:
        machine.long_mode(f"mov ${DEVICE + 0xFFC}, %edi; movabs $0x8877665544332211, %rax; mov %rax, (%rdi); hlt")
        assert machine.vcpu.run() == Mmio(DEVICE + 0xFFC, bytes.fromhex("11223344"), 4, True)
        machine.vcpu.immediate_exit = True
        assert machine.vcpu.run() == Mmio(DEVICE + 0x1000, bytes.fromhex("55667788"), 4, True)

    def test_immediate_exit(self, machine: Machine, profile: str) -> None:
        machine.long_mode(f"mov ${DEVICE}, %edi; movl $0x11223344, (%rdi); hlt")
        assert isinstance(machine.vcpu.run(), Mmio)
        run = machine.vcpu.kvm_run
        payload = bytes(run)[32:56]
        machine.vcpu.immediate_exit = True
        assert raw(machine) == errno.EINTR
        assert run.exit_reason == (0 if profile in EARLY else abi.KVM_EXIT_MMIO)
        assert bytes(run)[32:56] == payload  # only the reason goes

    def test_bare_fault(self, machine: Machine, profile: str) -> None:
        machine.long_mode("mov $0x60123, %rax; incl (%rax); hlt")
        machine.memory.protect(DATA, 4096, 0)
        poison(machine)
        assert raw(machine) == errno.EFAULT
        assert machine.vcpu.kvm_run.exit_reason == (0xDEAD if profile == "never-purge" else 0)
        machine.memory.protect(DATA, 4096, 3)
        machine.run_to_halt()


def test_before_6_8_nothing_names_a_page() -> None:
    """Profile pre-6.8: what came with KVM_EXIT_MEMORY_FAULT is unknown, and says so as unknown ioctls do."""
    with anykvm.open("soft", "pre-6.8") as kvm:
        new = ("MEMORY_FAULT_INFO", "USER_MEMORY2", "MEMORY_ATTRIBUTES", "GUEST_MEMFD", "VM_TYPES", "PRE_FAULT_MEMORY")
        assert [kvm.check_extension(getattr(abi, f"KVM_CAP_{name}")) for name in new] == [0] * len(new)
        with pytest.raises(OSError) as caught:
            kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM)
        assert caught.value.errno == errno.EINVAL
        with Machine(kvm) as machine:
            vm, vcpu = machine.vm.fileno(), machine.vcpu.fileno()
            for request in ("SET_USER_MEMORY_REGION2", "SET_MEMORY_ATTRIBUTES", "CREATE_GUEST_MEMFD"):
                assert refused(kvm, vm, getattr(abi, f"KVM_{request}")) == errno.ENOTTY
            assert refused(kvm, vcpu, abi.KVM_PRE_FAULT_MEMORY) == errno.EINVAL
            machine.long_mode("mov $0x60123, %rax; incl (%rax); hlt")
            machine.memory.protect(DATA, 4096, 0)
            poison(machine)
            assert raw(machine) == errno.EFAULT
            assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN


def refused(kvm: anykvm.Kvm, fd: int, request: int) -> int | None:
    with pytest.raises(OSError) as caught:
        kvm.backend.ioctl(fd, request, 0)
    return caught.value.errno
