"""Private memory on the soft backend: attributes, faults and their annotations, conversion, pre-faulting, the guest's
own choice of privacy. The recorded truth is in the golden scenarios; these are the cases beyond it."""

from __future__ import annotations

import errno
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import Hlt, Mmio, abi
from anykvm.backends.soft import SoftBackend, poison, unpoison
from anykvm.backends.soft.guest_memfd import fail_page
from anykvm.testing.machine import CODE, DATA, PML4
from anykvm.testing.private import ALIAS, AREA, BIT, FLAG, PAGE, PRIVATE, SIZE, PrivateGuest, private_guest
from soft_helpers import refused

FAULT = abi.KVM_EXIT_MEMORY_FAULT
READ, WRITE, FETCH = "mov (%rbx), %rax; hlt", "mov %rcx, (%rbx); hlt", "jmp *%rbx"
DEVICE = 0x1000000


@pytest.fixture
def backend(each_profile: str) -> SoftBackend:
    return SoftBackend(each_profile)


@pytest.fixture
def guest(backend: SoftBackend) -> Iterator[PrivateGuest]:
    with private_guest(backend) as made:
        yield made


def prefault(guest: PrivateGuest, gpa: int) -> int:
    """errno of KVM_PRE_FAULT_MEMORY of one page."""
    try:
        guest.vcpu.pre_fault_memory(gpa, PAGE)
    except OSError as error:
        return error.errno or -1
    return 0


# -- attributes --------------------------------------------------------------------------------------------------------


def test_attributes_are_those_of_a_table_of_pages(guest: PrivateGuest) -> None:
    """Random ranges, against a list; where no slot is, a private page is EFAULT and a shared one ENOENT."""
    rng, base, pages = random.Random(3), 1 << 32, [False] * 48
    for _ in range(400):
        first = rng.randrange(len(pages))
        count = rng.randrange(1, min(12, len(pages) - first + 1))
        private = rng.random() < 0.5
        guest.vm.set_memory_attributes(base + first * PAGE, count * PAGE, PRIVATE if private else 0)
        pages[first : first + count] = [private] * count
        at = rng.randrange(len(pages))
        for page in {at, first, first + count - 1, max(0, first - 1), min(len(pages) - 1, first + count)}:
            assert prefault(guest, base + page * PAGE) == (errno.EFAULT if pages[page] else errno.ENOENT)
    got = [prefault(guest, base + page * PAGE) == errno.EFAULT for page in range(len(pages))]
    assert got == pages


def test_the_last_page_there_can_be(guest: PrivateGuest) -> None:
    guest.private((1 << 64) - 2 * PAGE, PAGE)
    with refused(errno.EINVAL, "wraps"):
        guest.private((1 << 64) - PAGE, PAGE)
    with refused(errno.EINVAL):
        guest.vm.set_memory_attributes(AREA, PAGE, PRIVATE | 1)
    with refused(errno.EINVAL):
        guest.vm.set_memory_attributes(AREA, PAGE, PRIVATE, flags=1)


def test_attributes_outlive_slots(guest: PrivateGuest) -> None:
    guest.load(READ)
    guest.private()
    guest.vm.unmap(1)
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, FLAG)
    guest.bind()
    assert guest.vcpu.run() == Hlt()


def test_an_ordinary_vm_has_no_private_memory(backend: SoftBackend) -> None:
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm:
        assert vm.check_extension(abi.KVM_CAP_MEMORY_ATTRIBUTES) == 0
        vm.set_memory_attributes(AREA, SIZE, 0)
        with refused(errno.EINVAL):
            vm.set_memory_attributes(AREA, SIZE, PRIVATE)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [READ, WRITE, FETCH])
@pytest.mark.parametrize("error", [abi.EHWPOISON, errno.ENOMEM])
def test_a_failed_look_up_is_annotated(guest: PrivateGuest, source: str, error: int) -> None:
    """The error itself, in every profile; RIP stays, and the instruction runs once the page can be had."""
    guest.load(source)
    guest.private()
    fail_page(guest.gmem, 8, error)
    assert guest.fails() == (error, FAULT, AREA, PAGE, FLAG)
    assert guest.vcpu.get_regs().rip == (AREA if source == FETCH else CODE)
    fail_page(guest.gmem, 0, 0)
    if source != FETCH:
        assert guest.vcpu.run() == Hlt()


def test_without_memory_it_is_no_memory_fault_to_a_caller(guest: PrivateGuest) -> None:
    """ENOMEM is outside the documented rule: the API raises it, though kvm_run is filled."""
    guest.load(READ)
    guest.private()
    fail_page(guest.gmem, 0, errno.ENOMEM)
    with refused(errno.ENOMEM):
        guest.vcpu.run()
    fail_page(guest.gmem, 0, abi.EHWPOISON)
    assert guest.vcpu.run() == anykvm.MemoryFault(AREA, PAGE, FLAG, abi.EHWPOISON)


def test_shared_memory_faults_as_ever(guest: PrivateGuest) -> None:
    guest.load(READ)
    guest.shared.unmap(0, PAGE)
    untouched = 0xAAAAAAAAAAAAAAAA
    bare = (errno.EFAULT, abi.KVM_EXIT_UNKNOWN, untouched, untouched, untouched)
    annotated = (errno.EFAULT, FAULT, AREA, PAGE, 0)
    assert guest.fails() == (annotated if guest.kvm.backend.profile == "documented" else bare)


def test_a_failed_page_can_only_be_one_of_a_guest_memfd(guest: PrivateGuest) -> None:
    vm = guest.vm.fileno()
    for fd, offset, code in ((guest.gmem, SIZE, errno.EINVAL), (vm, 0, errno.EINVAL), (-1, 0, errno.EBADF)):
        with refused(code):
            fail_page(fd, offset, errno.ENOMEM)


def test_private_page_tables(guest: PrivateGuest) -> None:
    """A private table page without guest_memfd is a fault of the access that needs it."""
    guest.load(READ)
    guest.private(PML4 + 0x1000, PAGE)
    guest.vcpu.set_sregs(guest.vcpu.get_sregs())  # no translation is left
    assert guest.fails() == (errno.EFAULT, FAULT, PML4 + 0x1000, PAGE, FLAG)
    guest.public(PML4 + 0x1000, PAGE)
    assert guest.vcpu.run() == Hlt()


def test_the_emulator_uses_shared_memory(guest: PrivateGuest) -> None:
    """MOVS from a private page to a device: the processor can reach the page; KVM's emulator reads userspace_addr."""
    guest.load(f"movq $0x70, (%rbx); mov %rbx, %rsi; mov ${DEVICE}, %edi; movsb; hlt")
    guest.shared.write(0, b"s")
    guest.private()
    assert guest.vcpu.run() == Mmio(DEVICE, b"s", 1, True)
    assert guest.vcpu.run() == Hlt()
    fail_page(guest.gmem, 0, abi.EHWPOISON)  # the processor's own access comes first
    guest.load(f"mov %rbx, %rsi; mov ${DEVICE}, %edi; movsb; hlt")
    assert guest.fails()[:2] == (abi.EHWPOISON, FAULT)


def test_device_access_by_private_code(guest: PrivateGuest) -> None:
    """The instruction comes from the page the processor executes, not from the shared memory at its address."""
    guest.load(f"movl $0x90909088, (%rbx); movb $0x07, 1(%rbx); movb $0xf4, 2(%rbx); mov ${DEVICE}, %edi; jmp *%rbx")
    guest.shared.write(0, b"\x0f\x0b")  # UD2
    guest.private()
    assert guest.vcpu.run() == Mmio(DEVICE, b"\0", 1, True)  # mov %al, (%rdi)
    assert guest.vcpu.run() == Hlt()


def test_a_locked_access_over_two_private_pages(guest: PrivateGuest) -> None:
    """No host atomic can do it, so it is run alone; it is memory all the same, and private."""
    guest.load("lock addq $1, 4092(%rbx); mov 4092(%rbx), %rax; hlt")
    guest.shared.write(4092, b"\x77" * 8)
    guest.private()
    assert guest.vcpu.run() == Hlt()
    assert guest.rax() == 1
    assert guest.shared.read(4092, 8) == b"\x77" * 8


def test_instructions_that_are_looked_at_are_private_too(guest: PrivateGuest) -> None:
    """OUTS and a hypercall in a private page, whose shared memory holds something else."""
    guest.load("movl $0xc1010f6e, (%rbx); movb $0xf4, 4(%rbx); mov $0xe9, %edx; mov $0x60000, %esi; jmp *%rbx")
    guest.memory[DATA] = 0x41
    guest.shared.write(0, b"\x0f\x0b" * 4)  # UD2
    guest.private()
    assert guest.vcpu.run() == anykvm.Io(anykvm.Io.OUT, 0xE9, 1, 1, b"A")
    assert guest.vcpu.run() == Hlt()
    assert guest.rax() == 2**64 - 1000  # KVM_ENOSYS


# -- conversion --------------------------------------------------------------------------------------------------------


def test_both_memories_keep_their_data(guest: PrivateGuest) -> None:
    guest.shared.write(0, b"shared!!")
    for private, expected in ((False, b"shared!!"), (True, b"\0" * 8), (False, b"shared!!"), (True, b"private!")):
        (guest.private if private else guest.public)()
        guest.load(READ)
        assert guest.vcpu.run() == Hlt()
        assert guest.rax().to_bytes(8, "little") == expected
        if private and expected != b"private!":
            guest.load(WRITE)
            guest.set_regs(rbx=AREA, rcx=int.from_bytes(b"private!", "little"))
            assert guest.vcpu.run() == Hlt()
    guest.vm.discard_guest_memfd(guest.gmem, 0, PAGE)
    guest.load(READ)
    assert guest.vcpu.run() == Hlt() and guest.rax() == 0
    with refused(errno.EINVAL, "not page aligned"):
        guest.vm.discard_guest_memfd(guest.gmem, 8, PAGE)


def test_conversion_under_a_running_guest(guest: PrivateGuest) -> None:
    """What a guest reads after the conversion returned is the other memory, at once."""
    request, value, done = DATA, DATA + 64, DATA + 128
    guest.load(
        f"movq $2, (%rbx); 1: mov {request}, %rcx; mov (%rbx), %rax; mov %rax, {value}; mov %rcx, {done}; "
        f"cmp $-1, %rcx; jne 1b; hlt"
    )
    guest.private()
    view = guest.memory.view

    def word(at: int) -> int:
        return int.from_bytes(view[at : at + 8], "little")

    exits: list[object] = []
    thread = threading.Thread(target=lambda: exits.append(guest.vcpu.run()))
    thread.start()
    deadline = time.monotonic() + 30
    try:
        while not word(value):
            assert time.monotonic() < deadline
        guest.shared.write(0, (1).to_bytes(8, "little"))
        for turn in range(1, 301):
            private = turn % 2 == 0
            (guest.private if private else guest.public)(AREA, PAGE)
            view[request : request + 8] = turn.to_bytes(8, "little")
            while word(done) != turn:
                assert time.monotonic() < deadline
            assert word(value) == (2 if private else 1)
    finally:
        view[request : request + 8] = b"\xff" * 8
        thread.join(30)
    assert exits == [Hlt()]


# -- KVM_PRE_FAULT_MEMORY ----------------------------------------------------------------------------------------------


def test_pre_fault_stops_where_it_cannot_go_on(guest: PrivateGuest) -> None:
    guest.private()
    fail_page(guest.gmem, 3 * PAGE, errno.ENOMEM)
    run = guest.vcpu.kvm_run
    run.exit_reason = 77
    left = guest.vcpu.pre_fault_memory(AREA, SIZE)
    assert (left.gpa, left.size) == (AREA + 3 * PAGE, 5 * PAGE)
    assert (run.exit_reason, run.memory_fault.gpa, run.memory_fault.flags) == (FAULT, AREA + 3 * PAGE, FLAG)
    assert prefault(guest, AREA + 3 * PAGE) == errno.ENOMEM
    fail_page(guest.gmem, 3 * PAGE, 0)
    run.exit_reason = 77
    assert guest.vcpu.pre_fault_memory(left.gpa, left.size).size == 0
    assert run.exit_reason == 77
    assert prefault(guest, AREA + SIZE) == errno.ENOENT


def test_pre_fault_of_poisoned_ordinary_memory(guest: PrivateGuest, sigbus: list[int]) -> None:
    """A SIGBUS for the thread, and EINTR."""
    poison(guest.vm, guest.shared)
    assert prefault(guest, AREA) == errno.EINTR
    unpoison(guest.vm, guest.shared)
    assert sigbus == [signal.SIGBUS]
    assert prefault(guest, AREA) == 0


# -- the guest chooses -------------------------------------------------------------------------------------------------


@pytest.fixture
def choosing(backend: SoftBackend) -> Iterator[PrivateGuest]:
    with private_guest(SoftBackend(backend.profile, private_gpa_bit=BIT)) as made:
        yield made


def test_mismatch_in_both_directions(choosing: PrivateGuest) -> None:
    """A private access to a shared page, and a shared access to a private one; the conversion makes each work."""
    guest = choosing
    guest.load(f"movb $0x70, {ALIAS}; movb $0x73, (%rbx); hlt")
    guest.private_alias()
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, FLAG)
    guest.private(AREA, PAGE)
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, 0)
    assert guest.vcpu.get_regs().rip > CODE
    guest.public(AREA, PAGE)
    assert guest.vcpu.run() == Hlt()
    assert guest.shared[0] == ord("s")
    guest.load(f"mov {ALIAS}, %al; hlt")
    guest.private_alias()
    guest.private(AREA, PAGE)
    assert guest.vcpu.run() == Hlt()
    assert guest.rax() & 0xFF == ord("p")


def test_mismatch_comes_before_a_missing_slot(choosing: PrivateGuest) -> None:
    guest = choosing
    guest.load(f"mov {ALIAS}, %rax; hlt")
    guest.private_alias()
    guest.vm.unmap(1)
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, FLAG)  # mismatch
    guest.private(AREA, PAGE)
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, FLAG)  # no slot
    guest.load(READ)
    assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, 0)
    guest.public(AREA, PAGE)
    assert guest.vcpu.run() == Mmio(AREA, b"", 8, False)


def test_private_tables_by_the_bit(choosing: PrivateGuest) -> None:
    """CR3 and table entries carry the bit too."""
    guest = choosing
    guest.load("mov %cr3, %rax; bts $47, %rax; mov %rax, %cr3; mov $5, %eax; hlt")
    assert guest.fails() == (errno.EFAULT, FAULT, PML4, PAGE, FLAG)
    sregs = guest.vcpu.get_sregs()
    assert sregs.cr3 == PML4 | 1 << BIT
    sregs.cr3 = PML4
    guest.vcpu.set_sregs(sregs)
    assert guest.vcpu.run() == Hlt()


def test_without_the_option_the_bit_is_reserved(guest: PrivateGuest) -> None:
    guest.load(f"mov {ALIAS}, %rax; hlt")
    guest.private_alias()
    trap = guest.trap()
    assert (trap.vector, trap.error) == (14, 9)


def test_the_option_is_for_vms_with_private_memory(mapping_profile: str) -> None:
    with private_guest(SoftBackend(mapping_profile, private_gpa_bit=BIT), type=abi.KVM_X86_DEFAULT_VM) as guest:
        guest.load(f"mov {ALIAS}, %rax; hlt")
        guest.private_alias()
        assert guest.trap().error == 9


@pytest.mark.parametrize("bit", [-1, 12, 39, 52])
def test_which_bits_there_are(bit: int) -> None:
    with pytest.raises(ValueError, match="private_gpa_bit"):
        SoftBackend(private_gpa_bit=bit)
