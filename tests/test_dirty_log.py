"""Dirty bitmaps: KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, page by page, and their errnos."""

from __future__ import annotations

import ctypes
import errno
import random
import threading
from collections.abc import Callable, Iterator

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Io, Vcpu, abi
from anykvm.abi import KVM_MEM_LOG_DIRTY_PAGES as LOG
from anykvm.testing.machine import CODE, DATA, PML4, Machine
from soft_helpers import refused
from test_smp import second, together

PAGE, PAGES = 4096, 150
HIGH = 0x1000000
STOP = DATA + 0x800
MANUAL = abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2


@pytest.fixture
def logged(machine: Machine) -> Iterator[GuestMemory]:
    """Memory at HIGH, in slot 1, that is logged."""
    with GuestMemory(PAGES * PAGE) as memory:
        machine.vm.map(memory, HIGH, 1, LOG)
        yield memory


def pages(bitmap: bytes) -> set[int]:
    """The pages set in a bitmap."""
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


def bitmap_of(*which: int, size: int = 24) -> bytes:
    """A bitmap with these pages set."""
    return sum(1 << page for page in which).to_bytes(size, "little")


def harvest(machine: Machine, slot: int = 1) -> set[int]:
    return pages(machine.vm.get_dirty_log(slot))


def run(machine: Machine, source: str) -> None:
    machine.long_mode(source + "; hlt")
    machine.run_to_halt()


def write(machine: Machine, *which: int) -> None:
    """Let the guest write to these pages."""
    run(machine, "; ".join(f"movb $1, {HIGH + page * PAGE:#x}" for page in which))


WRITES = [
    ("movb $1, 0x1003fff", {3}),
    ("mov $0x1003ffc, %rdi; movq $1, (%rdi)", {3, 4}),  # across
    ("mov $0x1000ff8, %rdi; movq $1, (%rdi)", {0}),  # up to the end
    ("mov $0x1003000, %rdi; mov $0x2001, %ecx; xor %eax, %eax; rep stosb", {3, 4, 5}),
    ("mov $0x1002ff0, %rsi; mov $0x1004ff0, %rdi; mov $4, %ecx; rep movsq", {4, 5}),
    ("mov $0x1005008, %rsp; push %rax; push %rax", {5, 4}),
    ("lock incl 0x1006000", {6}),
    ("mov $7, %eax; lock cmpxchg %ebx, 0x1006000", {6}),  # fails, and is a write cycle all the same
    ("mov $0x1006ff0, %rdi; fxsave (%rdi)", {6, 7}),
    ("movdqu %xmm0, 0x1007ff1", {7, 8}),
    ("movb $1, 0x1095000; movb $1, 0x1000000", {0, 149}),
    ("mov 0x1003000, %eax; cmpb $1, 0x1004000; lea 0x1005000, %rax", set()),  # reads
    ("mov $0x1003000, %rsi; mov $0x60000, %rdi; mov $0x2000, %ecx; rep movsb", set()),
]


@pytest.mark.parametrize(("source", "dirty"), WRITES)
def test_exactly_what_the_guest_writes(machine: Machine, logged: GuestMemory, source: str, dirty: set[int]) -> None:
    run(machine, source)
    assert harvest(machine) == dirty
    run(machine, source)  # again, with what the engine has learnt
    assert harvest(machine) == dirty
    assert harvest(machine) == set()


def test_read_then_write_in_one_block(machine: Machine, logged: GuestMemory) -> None:
    run(machine, "mov 0x1003000, %eax; mov 0x1004000, %eax; mov %eax, 0x1003000")
    assert harvest(machine) == {3}


def test_execution_is_no_write(machine: Machine, logged: GuestMemory) -> None:
    logged.write(9 * PAGE, b"\xc3")  # ret
    run(machine, "mov $0x1009000, %rax; call *%rax")
    assert harvest(machine) == set()


def test_user_space_writes_are_not_logged(machine: Machine, logged: GuestMemory) -> None:
    logged.write(3 * PAGE, b"user space")
    run(machine, "mov 0x1003000, %eax")
    assert harvest(machine) == set()


def test_a_write_that_faults_is_not_logged(machine: Machine, logged: GuestMemory) -> None:
    logged.protect(3 * PAGE, PAGE, 0)
    machine.long_mode("movb $1, 0x1003000; hlt")
    assert isinstance(machine.vcpu.run(), anykvm.MemoryFault)
    assert harvest(machine) == set()
    logged.protect(3 * PAGE, PAGE, 3)
    machine.run_to_halt()
    assert harvest(machine) == {3}


def test_string_input_is_logged(machine: Machine, logged: GuestMemory) -> None:
    machine.long_mode("mov $0x1003ffe, %rdi; mov $4, %ecx; mov $0x10, %edx; rep insb; hlt")
    while isinstance(exit := machine.vcpu.run(), Io):
        exit.data = b"abcd"[: exit.count]
    assert exit == Hlt() and harvest(machine) == {3, 4}
    assert logged.read(0x3FFE, 2) == b"ab"


def test_accessed_bits_of_page_tables_are_writes(machine: Machine) -> None:
    machine.long_mode("mov 0x60000, %eax; hlt")
    machine.vm.set_user_memory_region(0, 0, machine.memory.size, machine.memory.address, LOG)
    machine.run_to_halt()
    assert harvest(machine, 0) == {PML4 // PAGE, PML4 // PAGE + 1, PML4 // PAGE + 2}


def test_both_aliases_have_a_log_of_their_own(machine: Machine, logged: GuestMemory) -> None:
    machine.vm.set_user_memory_region(2, 2 * HIGH, logged.size, logged.address, LOG)
    run(machine, "movb $1, 0x1003000; movb $2, 0x2004000; mov 0x2003000, %al; mov 0x1004000, %ah")
    assert (harvest(machine, 1), harvest(machine, 2)) == ({3}, {4})
    assert machine.vcpu.get_regs().rax & 0xFFFF == 0x0201
    run(machine, "movb $1, 0x2003000")
    assert (harvest(machine, 1), harvest(machine, 2)) == (set(), {3})


# -- the life of a bitmap ----------------------------------------------------------------------------------------------


def set_flags(machine: Machine, memory: GuestMemory, flags: int, gpa: int = HIGH, slot: int = 1) -> None:
    machine.vm.set_user_memory_region(slot, gpa, memory.size, memory.address, flags)


def test_off_forgets_and_on_begins_anew(machine: Machine, logged: GuestMemory) -> None:
    write(machine, 1)
    set_flags(machine, logged, 0)
    with refused(errno.ENOENT, "KVM_MEM_LOG_DIRTY_PAGES"):
        machine.vm.get_dirty_log(1)
    write(machine, 2)
    set_flags(machine, logged, LOG)
    assert harvest(machine) == set()
    write(machine, 2)  # it was writable when logging began
    assert harvest(machine) == {2}


def test_a_moved_slot_keeps_its_bitmap(machine: Machine, logged: GuestMemory) -> None:
    write(machine, 1, 149)
    set_flags(machine, logged, LOG, 2 * HIGH)
    run(machine, "movb $1, 0x2003000")
    assert harvest(machine) == {1, 3, 149}
    set_flags(machine, logged, 0, HIGH)  # moved and switched off in one
    with refused(errno.ENOENT):
        machine.vm.get_dirty_log(1)


def test_nothing_is_changed_by_the_same_again(machine: Machine, logged: GuestMemory) -> None:
    write(machine, 1)
    set_flags(machine, logged, LOG)
    assert harvest(machine) == {1}


def test_a_new_slot_begins_clean(machine: Machine, logged: GuestMemory) -> None:
    write(machine, 1)
    machine.vm.unmap(1)
    with refused(errno.ENOENT, "does not exist"):
        machine.vm.get_dirty_log(1, PAGES)
    set_flags(machine, logged, LOG)
    assert harvest(machine) == set()


def test_a_read_only_slot_can_be_logged(machine: Machine, logged: GuestMemory) -> None:
    machine.vm.set_user_memory_region(2, 2 * HIGH, PAGE, logged.address, LOG | abi.KVM_MEM_READONLY)
    run(machine, "mov 0x2000000, %al")
    assert harvest(machine, 2) == set()


def test_the_other_address_space(machine: Machine, logged: GuestMemory) -> None:
    machine.vm.set_user_memory_region(1 << 16 | 1, HIGH, PAGE, logged.address, LOG)
    write(machine, 0)
    assert harvest(machine, 1 << 16 | 1) == set()
    assert harvest(machine) == {0}


def test_the_bitmap_is_of_words(machine: Machine, logged: GuestMemory) -> None:
    """150 pages are three words, and no more is written."""
    write(machine, 149)
    room = (ctypes.c_uint8 * 40)(*[0xAA] * 40)
    machine.vm.ioctl(abi.KVM_GET_DIRTY_LOG, abi.kvm_dirty_log(slot=1, dirty_bitmap=ctypes.addressof(room)))
    assert bytes(room[:24]) == bitmap_of(149) and bytes(room[24:]) == b"\xaa" * 16


# -- KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 --------------------------------------------------------------------------------


def test_manual_protect_keeps_until_cleared(machine: Machine, logged: GuestMemory) -> None:
    machine.vm.enable_cap(MANUAL, 1)
    write(machine, 1, 2, 64, 149)
    assert harvest(machine) == harvest(machine) == {1, 2, 64, 149}
    machine.vm.clear_dirty_log(1, 0, 64, bitmap_of(1, 5, size=8))
    assert harvest(machine) == {2, 64, 149}
    machine.vm.clear_dirty_log(1, 128, 22, bitmap_of(21, 22, 63, size=8))
    assert harvest(machine) == {2, 64}
    write(machine, 1, 149)
    assert harvest(machine) == {1, 2, 64, 149}
    machine.vm.enable_cap(MANUAL, 0)
    assert harvest(machine) == {1, 2, 64, 149}
    assert harvest(machine) == set()


def test_clear_works_without_manual_protect(machine: Machine, logged: GuestMemory) -> None:
    write(machine, 1, 2)
    machine.vm.clear_dirty_log(1, 0, 150, bitmap_of(1))
    assert harvest(machine) == {2}


def test_initially_set(machine: Machine, logged: GuestMemory) -> None:
    machine.vm.enable_cap(MANUAL, 3)
    assert harvest(machine) == set()  # logging began before
    set_flags(machine, logged, 0)
    set_flags(machine, logged, LOG)
    assert harvest(machine) == set(range(PAGES))
    everything = b"\xff" * 24
    machine.vm.clear_dirty_log(1, 0, PAGES, everything)
    assert harvest(machine) == set()
    write(machine, 7)
    assert harvest(machine) == {7}
    for npages in (1, 8, 64, 65):
        with GuestMemory(npages * PAGE) as memory:
            machine.vm.map(memory, 2 * HIGH, 2, LOG)
            assert harvest(machine, 2) == set(range(npages))
            machine.vm.unmap(2)


def test_enabling(machine: Machine) -> None:
    vm = machine.vm
    assert vm.check_extension(MANUAL) == machine.kvm.check_extension(MANUAL) == 3
    for options in (0, 1, 3, 0, 1):
        assert vm.enable_cap(MANUAL, options) == 0
    for options in (2, 4, 5, 7, 1 << 32):
        with refused(errno.EINVAL, r"args\[0\]"):
            vm.enable_cap(MANUAL, options)
    with refused(errno.EINVAL, "flags"):
        vm.enable_cap(MANUAL, 1, flags=1)


# -- errnos ------------------------------------------------------------------------------------------------------------

SLOTS = [
    (2, errno.ENOENT),  # not there
    (0, errno.ENOENT),  # not logged
    (32764, errno.EINVAL),
    (0xFFFF, errno.EINVAL),
    (1 << 16 | 1, errno.ENOENT),
    (2 << 16 | 1, errno.EINVAL),
]


@pytest.mark.parametrize(("slot", "code"), SLOTS)
def test_slots_that_have_no_log(machine: Machine, logged: GuestMemory, slot: int, code: int) -> None:
    with refused(code):
        machine.vm.get_dirty_log(slot, PAGES)
    with refused(code):
        machine.vm.clear_dirty_log(slot, 0, 64, bytes(8))


RANGES = [
    # first_page, num_pages, errno; the slot has 150 pages
    (0, 150, 0),
    (0, 64, 0),
    (64, 86, 0),
    (128, 22, 0),
    (0, 0, 0),
    (64, 0, 0),
    (1, 64, errno.EINVAL),
    (63, 1, errno.EINVAL),
    (0, 1, errno.EINVAL),
    (0, 149, errno.EINVAL),
    (0, 151, errno.EINVAL),
    (0, 192, errno.EINVAL),
    (128, 64, errno.EINVAL),
    (128, 21, errno.EINVAL),
    (192, 0, errno.EINVAL),
    (1 << 63, 64, errno.EINVAL),
]


@pytest.mark.parametrize(("first", "count", "code"), RANGES)
def test_ranges(machine: Machine, logged: GuestMemory, first: int, count: int, code: int) -> None:
    if not code:
        machine.vm.clear_dirty_log(1, first, count, b"\xff" * 24)
        return
    with refused(code, "first_page|num_pages|multiple"):
        machine.vm.clear_dirty_log(1, first, count, b"\xff" * 24)


def test_order_of_checks(machine: Machine) -> None:
    """first_page is looked at before the slot, the rest after it."""
    with refused(errno.EINVAL, "first_page"):
        machine.vm.clear_dirty_log(5, 1, 64, bytes(8))
    with refused(errno.ENOENT):
        machine.vm.clear_dirty_log(5, 0, 1, bytes(8))


def test_bad_pointers(machine: Machine, logged: GuestMemory) -> None:
    """A bitmap that cannot be read clears nothing; one that cannot be written is lost, as in the kernel."""
    write(machine, 1)
    bad = 0x7FFFFFFFF000
    with refused(errno.EFAULT):
        machine.vm.ioctl(abi.KVM_CLEAR_DIRTY_LOG, abi.kvm_clear_dirty_log(slot=1, num_pages=150, dirty_bitmap=bad))
    assert harvest(machine) == {1}
    write(machine, 2)
    with refused(errno.EFAULT):
        machine.vm.ioctl(abi.KVM_GET_DIRTY_LOG, abi.kvm_dirty_log(slot=1, dirty_bitmap=bad))
    assert harvest(machine) == set()
    write(machine, 2)
    assert harvest(machine) == {2}


# -- under running guests ----------------------------------------------------------------------------------------------

#: Until the stop word is set: pick a page, count its first word up, wait a little.
WRITER = f"""
1:  imul $1103515245, %rbx, %rbx; add $12345, %rbx
    mov %rbx, %rax; shr $16, %rax; and $127, %eax; shl $12, %eax; add ${HIGH:#x}, %eax
    lock incq (%rax)
    mov $1500, %ecx
2:  dec %ecx; jnz 2b
    cmpl $0, {STOP:#x}; je 1b
    hlt"""


class Checker:
    """A copy kept from harvests alone. A page that is not in a harvest has not changed since it was copied last."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.copy = self.now()
        self.seen = 0

    def now(self) -> list[int]:
        return [int.from_bytes(self.memory.read(page * PAGE, 8), "little") for page in range(128)]

    def round(self, harvest: Callable[[], set[int]]) -> int:
        """One harvest; how many pages were in it."""
        before = self.now()
        found = harvest()
        missed = [page for page in range(128) if page not in found and before[page] != self.copy[page]]
        assert not missed, f"changed since the last harvest, and not in this one: {missed}"
        for page in found:
            self.copy[page] = int.from_bytes(self.memory.read(page * PAGE, 8), "little")
        self.seen += len(found)
        return len(found)


def stress(machine: Machine, vcpus: list[Vcpu], body: Callable[[], None], halts: Callable[[Vcpu], None]) -> None:
    """Run the vCPUs in threads and `body` in another; at its end the guests are told to halt."""

    def harvester() -> None:
        try:
            body()
        finally:
            machine.memory.write(STOP, b"\1")

    together(harvester, *(lambda vcpu=vcpu: halts(vcpu) for vcpu in vcpus))


def writers(machine: Machine) -> list[Vcpu]:
    machine.long_mode(WRITER)
    machine.set_regs(rbx=1)
    other = second(machine, CODE)
    return [machine.vcpu, other]


def to_halt(vcpu: Vcpu) -> None:
    assert vcpu.run() == Hlt()


@pytest.mark.parametrize("how", ["get", "clear", "toggle"])
def test_nothing_is_missed_under_concurrent_writes(machine: Machine, logged: GuestMemory, how: str) -> None:
    """With `toggle` logging is also switched off and on: what that forgets is copied anew."""
    checker, rounds, chance = Checker(logged), 400, random.Random(1)

    def get() -> set[int]:
        return pages(machine.vm.get_dirty_log(1))

    def clear() -> set[int]:
        bitmap = machine.vm.get_dirty_log(1)
        machine.vm.clear_dirty_log(1, 0, PAGES, bitmap)
        return pages(bitmap)

    def body() -> None:
        if how == "clear":
            machine.vm.enable_cap(MANUAL, 1)
        for _ in range(rounds):
            if how == "toggle" and chance.random() < 0.3:
                set_flags(machine, logged, 0)
                set_flags(machine, logged, LOG)
                checker.copy = checker.now()
            checker.round(clear if how == "clear" else get)

    stress(machine, writers(machine), body, to_halt)
    checker.round(clear if how == "clear" else get)
    assert checker.copy == checker.now()  # the copy is the memory: a migration would have worked
    assert checker.seen > rounds / 4  # and the guests did write


def test_a_harvest_does_not_wait_for_the_guest(machine: Machine, logged: GuestMemory) -> None:
    """A guest that never exits is interrupted for each harvest, and goes on."""
    machine.long_mode(f"1: incq {HIGH:#x}; cmpl $0, {STOP:#x}; je 1b; hlt")
    found: list[set[int]] = []
    begun = threading.Event()

    def body() -> None:
        while not found or found[-1] != {0}:
            found.append(harvest(machine))
        begun.set()
        for _ in range(50):
            before = logged.read(0, 8)
            while logged.read(0, 8) == before:
                pass  # the guest goes on
            assert harvest(machine) == {0}

    stress(machine, [machine.vcpu], body, to_halt)
    assert begun.is_set()
