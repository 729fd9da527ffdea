"""Dirty rings: what is pushed when, KVM_EXIT_DIRTY_RING_FULL, KVM_RESET_DIRTY_RINGS. Covers row 21 of run.py."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import signal
import struct
import threading
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import DirtyPage, DirtyRing, DirtyRingFull, GuestMemory, Hlt, Intr, Io, Mmio, Vcpu, abi
from anykvm.abi import KVM_MEM_LOG_DIRTY_PAGES as LOG
from anykvm.backends.soft import PROFILES
from anykvm.testing.machine import CODE, DATA, PML4, Machine
from soft_helpers import refused
from test_dirty_log import HIGH, PAGE, STOP, WRITER, Checker, stress
from test_smp import second

SIZE, SOFT_LIMIT, PAGES = 4096, 256 - 64, 1024
RING, ACQ_REL = abi.KVM_CAP_DIRTY_LOG_RING, abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
DEVICE = 0x3000000
RING_OFFSET = 64 * PAGE
#: Write to %ecx pages from %rdi on.
TOUCH = "1: movb $1, (%rdi); add $0x1000, %rdi; dec %ecx; jnz 1b; hlt"


class RingMachine(Machine):
    """A machine whose VM has dirty rings, and 1024 logged pages at HIGH in slot 1."""

    def __init__(self, kvm: anykvm.Kvm, size: int = SIZE) -> None:
        self.ring_size = size
        super().__init__(kvm)
        self.logged = GuestMemory(PAGES * PAGE)
        self.vm.map(self.logged, HIGH, 1, LOG)
        self.ring = DirtyRing(self.vcpu)

    def create_vm(self, kvm: anykvm.Kvm, type: int) -> anykvm.Vm:
        vm = super().create_vm(kvm, type)
        vm.enable_dirty_ring(self.ring_size)
        return vm

    def harvest(self) -> list[int]:
        """The pages of slot 1 in the first vCPU's ring."""
        found = self.ring.harvest()
        assert all(page.slot == 1 for page in found)
        return [page.offset for page in found]

    def touch(self, count: int, first: int = 0) -> None:
        """Be about to write to so many pages."""
        self.long_mode(TOUCH)
        self.set_regs(rdi=HIGH + first * PAGE, rcx=count)


@pytest.fixture
def profile(each_profile: str) -> str:
    return each_profile


@pytest.fixture
def machine(profile: str) -> Iterator[RingMachine]:
    with anykvm.open("soft", profile) as kvm, RingMachine(kvm) as made:
        yield made


def full(vcpu: Vcpu) -> None:
    """KVM_RUN returns 0 with KVM_EXIT_DIRTY_RING_FULL."""
    vcpu.kvm_run.exit_reason = 0xDEAD
    assert vcpu.run() == DirtyRingFull()


# -- enabling ----------------------------------------------------------------------------------------------------------


def test_capabilities() -> None:
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm:
        for file in (kvm, vm):
            assert file.check_extension(RING) == file.check_extension(ACQ_REL) == 1 << 20
            assert file.check_extension(abi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == 0


@pytest.mark.parametrize("cap", [RING, ACQ_REL])
def test_sizes(cap: int) -> None:
    with anykvm.open("soft") as kvm:
        for size in (0, 1, 16, 2048, 3 * PAGE, PAGE + 16, 1 << 32, (1 << 20) + PAGE):
            with kvm.create_vm() as vm, refused(errno.EINVAL, r"args\[0\]"):
                vm.enable_cap(cap, size)
        for size in (1 << 21, 1 << 31):
            with kvm.create_vm() as vm, refused(errno.E2BIG, r"args\[0\]"):
                vm.enable_cap(cap, size)
        for size in (PAGE, 1 << 16, 1 << 20, 1 << 32 | PAGE):  # a 32-bit number is taken
            with kvm.create_vm() as vm:
                assert vm.enable_cap(cap, size, flags=7) == 0  # flags is not looked at
                with refused(errno.EINVAL, "already"):
                    vm.enable_cap(cap, size)


def test_not_after_a_vcpu_and_not_with_a_bitmap() -> None:
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        with refused(errno.EINVAL, "vCPUs"):
            vm.enable_dirty_ring(SIZE)
        assert vm.dirty_ring_size == 0
        with pytest.raises(ValueError, match="no dirty rings"):
            DirtyRing(vcpu)
        with refused(errno.EINVAL):
            DirtyRing(vcpu, SIZE)
        with refused(errno.EINVAL, "no dirty rings"):
            vm.reset_dirty_rings()
        with refused(errno.EINVAL):
            vm.enable_cap(abi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)


def test_no_bitmaps_with_rings(machine: RingMachine) -> None:
    for slot in (0, 1, 7, 0xFFFF):  # before anything else is looked at
        with refused(errno.ENXIO, "dirty ring"):
            machine.vm.get_dirty_log(slot, 64)
        with refused(errno.ENXIO, "dirty ring"):
            machine.vm.clear_dirty_log(slot, 1, 1, bytes(8))


# -- the mapping -------------------------------------------------------------------------------------------------------


def test_the_ring_is_at_page_64_of_the_vcpu(machine: RingMachine) -> None:
    machine.touch(2, first=5)
    machine.run_to_halt()
    fd = machine.vcpu.fileno()
    with mmap.mmap(fd, SIZE, offset=RING_OFFSET) as ring:
        assert struct.unpack_from("<IIQIIQIIQ", ring) == (1, 1, 5, 1, 1, 6, 0, 0, 0)
        struct.pack_into("<I", ring, 0, 2)
    assert machine.vm.reset_dirty_rings() == 1
    with mmap.mmap(fd, SIZE, offset=RING_OFFSET) as ring:
        assert struct.unpack_from("<IIQI", ring) == (0, 1, 5, 1)
    backend = machine.kvm.backend
    for length, offset in ((SIZE + 1, RING_OFFSET), (SIZE, RING_OFFSET + PAGE), (PAGE, RING_OFFSET + 1)):
        with refused(errno.EINVAL):
            backend.mmap(fd, length, offset)
    assert machine.kvm.get_vcpu_mmap_size() == 3 * PAGE


def test_a_ring_outlives_its_vcpu(machine: RingMachine) -> None:
    machine.touch(3)
    machine.run_to_halt()
    machine.vm.close()
    assert machine.harvest() == [0, 1, 2]


# -- what is pushed ----------------------------------------------------------------------------------------------------


def test_each_page_once_until_it_is_reset(machine: RingMachine, profile: str) -> None:
    read = [9] if PROFILES[profile].map_writable else []  # user space has it writable
    machine.long_mode("movb $1, 0x1005000; movb $1, 0x1003000; movb $2, 0x1005008; mov 0x1009000, %al; hlt")
    machine.run_to_halt()
    machine.touch(6)
    machine.run_to_halt()
    assert machine.harvest() == [5, 3, *read, 0, 1, 2, 4]
    assert machine.harvest() == []
    machine.touch(6)
    machine.run_to_halt()
    assert machine.harvest() == []  # harvested, not reset
    assert machine.vm.reset_dirty_rings() == 6 + len(read)
    assert machine.vm.reset_dirty_rings() == 0
    machine.touch(6)
    machine.run_to_halt()
    assert machine.harvest() == [0, 1, 2, 3, 4, 5]


def test_harvested_in_parts(machine: RingMachine) -> None:
    machine.touch(5)
    machine.run_to_halt()
    assert [page.offset for page in machine.ring.harvest(2)] == [0, 1]
    assert machine.vm.reset_dirty_rings() == 2
    machine.touch(5)
    machine.run_to_halt()
    assert machine.harvest() == [2, 3, 4, 0, 1]
    assert machine.vm.reset_dirty_rings() == 5


def test_slots_are_named(machine: RingMachine) -> None:
    with GuestMemory(4 * PAGE) as memory:
        machine.vm.map(memory, 2 * HIGH, 32763, LOG)
        machine.long_mode("movb $1, 0x1000000; movb $1, 0x2003000; hlt")
        machine.run_to_halt()
        assert machine.ring.harvest() == [DirtyPage(1, 0), DirtyPage(32763, 3)]
        machine.vm.unmap(32763)
        assert machine.vm.reset_dirty_rings() == 2  # the slot is gone: passed over


def test_what_user_space_writes_into_an_entry_does_no_harm(machine: RingMachine) -> None:
    machine.touch(4)
    machine.run_to_halt()
    with mmap.mmap(machine.vcpu.fileno(), SIZE, offset=RING_OFFSET) as ring:
        entries = [(2, 1, 1 << 63), (2, 0xFFFFFFFF, 0), (2, 0, 1), (2, 1, PAGES)]
        for at, entry in enumerate(entries):
            struct.pack_into("<IIQ", ring, 16 * at, *entry)
    assert machine.vm.reset_dirty_rings() == 4
    machine.touch(6)
    machine.run_to_halt()
    with mmap.mmap(machine.vcpu.fileno(), SIZE, offset=RING_OFFSET) as ring:  # 0 to 3 were not armed again
        assert struct.unpack_from("<IIQIIQI", ring, 64) == (1, 1, 4, 1, 1, 5, 0)


def test_page_tables_are_pushed(machine: RingMachine, profile: str) -> None:
    read = [CODE, DATA] if PROFILES[profile].map_writable else []
    machine.long_mode("mov 0x60000, %eax; hlt")
    machine.vm.set_user_memory_region(0, 0, machine.memory.size, machine.memory.address, LOG)
    machine.run_to_halt()
    pages = [page // PAGE for page in (*read, PML4, PML4 + PAGE, PML4 + 2 * PAGE)]
    assert sorted(machine.ring.harvest()) == [DirtyPage(0, page) for page in sorted(pages)]


def test_initially_set_means_nothing_to_a_ring() -> None:
    with anykvm.open("soft") as kvm, RingMachine(kvm) as machine:
        machine.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3)
        with GuestMemory(PAGE) as memory:
            machine.vm.map(memory, 2 * HIGH, 2, LOG)
            machine.long_mode("movb $1, 0x2000000; hlt")
            machine.run_to_halt()
            assert machine.ring.harvest() == [DirtyPage(2, 0)]


def test_each_vcpu_has_its_own(machine: RingMachine) -> None:
    machine.touch(2)
    other = second(machine, CODE)
    regs = other.get_regs()
    regs.rdi, regs.rcx = HIGH + PAGE, 3
    other.set_regs(regs)
    machine.run_to_halt()
    assert other.run() == Hlt()
    ring = DirtyRing(other)
    assert (machine.harvest(), ring.harvest()) == ([0, 1], [DirtyPage(1, 2), DirtyPage(1, 3)])
    assert machine.vm.reset_dirty_rings() == 4


# -- full --------------------------------------------------------------------------------------------------------------


def test_full_at_the_soft_limit_until_reset(machine: RingMachine) -> None:
    machine.touch(PAGES)
    found = []
    while (exit := machine.vcpu.run()) == DirtyRingFull():
        regs = machine.vcpu.get_regs()
        assert regs.rip == CODE  # at the store that filled the ring, which has not been done
        page = (regs.rdi - HIGH) // PAGE
        assert machine.logged.read(page * PAGE, 1) == b"\0"
        full(machine.vcpu)
        harvested = machine.harvest()
        assert len(harvested) == SOFT_LIMIT and harvested[-1] == page
        full(machine.vcpu)  # harvested is not enough
        assert machine.vm.reset_dirty_rings() == SOFT_LIMIT
        found += harvested[:-1]
    assert exit == Hlt()
    assert found + machine.harvest() == list(range(PAGES))


def test_room_for_one_is_room_enough(machine: RingMachine) -> None:
    machine.touch(SOFT_LIMIT + 3)
    full(machine.vcpu)
    machine.ring.harvest(2)
    assert machine.vm.reset_dirty_rings() == 2
    full(machine.vcpu)  # the store's page is still logged, and two more are the limit
    machine.harvest()
    machine.vm.reset_dirty_rings()
    machine.run_to_halt()


def test_a_long_block_stops_in_its_middle(machine: RingMachine) -> None:
    """600 stores without a jump."""
    stores = "; ".join(f"movb $1, {0x1000 * page}(%rdi)" for page in range(600))
    machine.long_mode(stores + "; hlt")
    machine.set_regs(rdi=HIGH)
    pages: set[int] = set()
    while (exit := machine.vcpu.run()) == DirtyRingFull():
        harvested = machine.harvest()
        assert len(harvested) == SOFT_LIMIT
        machine.vm.reset_dirty_rings()
        pages.update(harvested)
    assert exit == Hlt()
    assert pages | set(machine.harvest()) == set(range(600))
    assert all(machine.logged.read(page * PAGE, 1) == b"\1" for page in range(600))


def test_locked_counts_are_done_once(machine: RingMachine) -> None:
    machine.long_mode("1: lock incl (%rdi); add $0x1000, %rdi; dec %ecx; jnz 1b; hlt")
    machine.set_regs(rdi=HIGH, rcx=PAGES)
    while machine.vcpu.run() == DirtyRingFull():
        machine.harvest()
        machine.vm.reset_dirty_rings()
    assert {machine.logged.read(page * PAGE, 4) for page in range(PAGES)} == {b"\1\0\0\0"}


def test_string_stores_go_on_where_they_were(machine: RingMachine) -> None:
    machine.long_mode("mov $0xAB, %al; rep stosb; hlt")
    machine.set_regs(rdi=HIGH + 5, rcx=300 * PAGE)
    while (exit := machine.vcpu.run()) == DirtyRingFull():
        machine.harvest()
        machine.vm.reset_dirty_rings()
    assert exit == Hlt()
    assert machine.logged.read(0, 300 * PAGE + 6) == bytes(5) + b"\xab" * (300 * PAGE) + b"\0"


def fill_but_one(machine: RingMachine, source: str) -> None:
    """Have room for one entry more, then stand at `source`; %rdi is a clean page's address."""
    machine.touch(SOFT_LIMIT - 1)
    machine.run_to_halt()
    machine.long_mode(source + "; hlt")
    machine.set_regs(rdi=HIGH + 500 * PAGE, rdx=0x10, rcx=3, rbx=DEVICE)


def answer(vcpu: Vcpu, kind: type[Io | Mmio], data: bytes) -> None:
    """Answer the exit the guest runs into: what is stored then fills the ring."""
    exit = vcpu.run()
    assert isinstance(exit, kind)
    exit.data = data
    full(vcpu)


def test_a_completion_comes_first(machine: RingMachine) -> None:
    """INSB's item is stored at the next KVM_RUN, whose guest is then not entered."""
    fill_but_one(machine, "insb")
    answer(machine.vcpu, Io, b"x")
    assert machine.logged.read(500 * PAGE, 1) == b"x"
    assert machine.vcpu.get_regs().rip == CODE + 1
    assert machine.harvest()[-1] == 500
    machine.vm.reset_dirty_rings()
    machine.run_to_halt()


def test_an_emulated_instruction_is_not_torn(machine: RingMachine) -> None:
    """MOVS from a device: its store fills the ring, and is done once."""
    fill_but_one(machine, "mov %rbx, %rsi; movsb")
    answer(machine.vcpu, Mmio, b"y")
    assert machine.logged.read(500 * PAGE, 1) == b"y"
    regs = machine.vcpu.get_regs()
    assert (regs.rsi, regs.rdi) == (DEVICE + 1, HIGH + 500 * PAGE + 1)
    machine.harvest()
    machine.vm.reset_dirty_rings()
    machine.run_to_halt()


def test_immediate_exit_comes_before(machine: RingMachine) -> None:
    machine.touch(PAGES)
    full(machine.vcpu)
    machine.vcpu.immediate_exit = True
    assert machine.vcpu.run() == Intr(abi.KVM_EXIT_DIRTY_RING_FULL)  # row 17 keeps the reason
    machine.vcpu.immediate_exit = False
    full(machine.vcpu)


@contextlib.contextmanager
def pending_signal() -> Iterator[None]:
    """SIGUSR1 is blocked and pending; its handler does nothing."""
    old = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, old)


def test_full_comes_before_a_signal(machine: RingMachine) -> None:
    machine.touch(PAGES)
    full(machine.vcpu)
    with pending_signal():
        machine.vcpu.set_signal_mask(set())
        full(machine.vcpu)
        machine.harvest()
        machine.vm.reset_dirty_rings()
        assert machine.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
    machine.vcpu.set_signal_mask(None)


# -- under running guests ----------------------------------------------------------------------------------------------


def test_nothing_is_missed_under_concurrent_writes() -> None:
    with anykvm.open("soft") as kvm, RingMachine(kvm) as machine:
        checker, rounds = Checker(machine.logged), 400
        machine.long_mode(WRITER)
        machine.set_regs(rbx=1)
        vcpus = [machine.vcpu, second(machine, CODE)]
        rings = [machine.ring, DirtyRing(vcpus[1])]

        def harvest() -> set[int]:
            """A write between a ring's harvest and the reset is not pushed: pages are read after the reset."""
            found = {page.offset for ring in rings for page in ring.harvest()}
            machine.vm.reset_dirty_rings()
            return found

        def judge() -> None:
            for _ in range(rounds):
                checker.round(harvest)

        stress(machine, vcpus, judge, to_the_end)
        checker.round(harvest)
        assert checker.copy == checker.now()
        assert checker.seen > rounds / 4


def to_the_end(vcpu: Vcpu) -> None:
    assert vcpu.run() == Hlt()


def test_a_ring_that_fills_while_another_thread_harvests() -> None:
    """A writer that dirties pages faster than they are harvested waits at DIRTY_RING_FULL, and loses none."""
    with anykvm.open("soft") as kvm, RingMachine(kvm) as machine:
        machine.long_mode(
            f"""
        1:  mov ${HIGH:#x}, %rdi; mov ${PAGES}, %ecx
        2:  incq (%rdi); add $0x1000, %rdi; dec %ecx; jnz 2b
            incq {DATA:#x}
            cmpl $0, {STOP:#x}; je 1b
            hlt"""
        )
        told: queue.Queue[bool] = queue.Queue()  # True: full, False: halted
        room: queue.Queue[None] = queue.Queue()

        def vcpu_thread() -> None:
            while (exit := machine.vcpu.run()) == DirtyRingFull():
                told.put(True)
                room.get(timeout=30)
            told.put(exit != Hlt())

        thread = threading.Thread(target=vcpu_thread)
        thread.start()
        fulls = 0
        while told.get(timeout=30):
            fulls += 1
            if fulls == 100:
                machine.memory.write(STOP, b"\1")
            assert len(set(machine.harvest())) == SOFT_LIMIT
            assert machine.vm.reset_dirty_rings() == SOFT_LIMIT
            room.put(None)
        thread.join()
        passes = int.from_bytes(machine.memory.read(DATA, 8), "little")
        counts = {int.from_bytes(machine.logged.read(page * PAGE, 8), "little") for page in range(PAGES)}
        assert counts == {passes}
        assert passes >= 100 * (SOFT_LIMIT - 1) // PAGES and fulls >= 100
