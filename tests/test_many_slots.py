"""All 32764 slots at once, what finds them, and a log for each."""

from __future__ import annotations

import random
import time
from bisect import bisect_right, insort

import pytest

import anykvm
from anykvm import GuestMemory, abi
from anykvm.backends.soft.ordered import CHUNK, SortedNumbers
from anykvm.testing.machine import Machine
from soft_helpers import refused

PAGE, SLOTS = 4096, 32764
HIGH = 0x10000000


@pytest.mark.parametrize("order", ["down", "shuffled"])
def test_create_and_delete_all(order: str) -> None:
    """In any order; a minute would mean that each one looks at all others."""
    numbers = list(range(SLOTS))
    if order == "down":
        numbers.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(numbers)
    began = time.perf_counter()
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm, GuestMemory(PAGE) as memory:
        for number in numbers:
            vm.set_user_memory_region(number, number * PAGE, PAGE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
        with refused(22, "32764"):
            vm.set_user_memory_region(SLOTS, SLOTS * PAGE, PAGE, memory.address)
        with refused(17):
            vm.set_user_memory_region(5, 7 * PAGE, PAGE, memory.address)
        for number in numbers:
            if number % 64 == 0:
                assert vm.get_dirty_log(number) == bytes(8)
            vm.unmap(number)
        with refused(22):
            vm.unmap(0)
    assert time.perf_counter() - began < 30


def test_the_lowest_free_slot_is_found_at_once() -> None:
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm, GuestMemory(PAGE) as memory:
        began = time.perf_counter()
        for number in range(SLOTS):
            assert vm.map(memory, number * PAGE) == number
        assert time.perf_counter() - began < 20
        vm.unmap(70)
        vm.unmap(7)
        assert [vm.map(memory, page * PAGE) for page in (70, 7)] == [7, 70]
        vm.unmap(3)
        assert vm.map(memory, 3 * PAGE, 3) == 3


def test_a_guest_sees_each_of_many_aliases() -> None:
    """10000 slots over one page: the guest counts it up through each, and each has it in its own log."""
    count = 10000
    with anykvm.open("soft") as kvm, Machine(kvm) as machine, GuestMemory(PAGE) as memory:
        for number in range(count):
            machine.vm.map(memory, HIGH + 2 * number * PAGE, 1 + number, abi.KVM_MEM_LOG_DIRTY_PAGES)
        machine.long_mode("1: incl (%rdi); add $0x4000, %rdi; dec %ecx; jnz 1b; hlt")
        machine.set_regs(rdi=HIGH, rcx=count // 2)  # every other slot
        machine.run_to_halt()
        assert int.from_bytes(memory.read(0, 4), "little") == count // 2
        logs = [machine.vm.get_dirty_log(1 + number)[0] for number in range(count)]
        assert logs == [1, 0] * (count // 2)


def test_sorted_numbers_against_a_list() -> None:
    chance, numbers, model = random.Random(2), SortedNumbers(), list[int]()
    for step in range(12 * CHUNK):
        number = chance.randrange(8 * CHUNK)
        at = bisect_right(model, number)
        present = at > 0 and model[at - 1] == number
        assert numbers.at_or_below(number) == (model[at - 1] if at else None)
        if present and step > 6 * CHUNK:
            numbers.remove(number)
            model.remove(number)
        elif not present and step <= 8 * CHUNK:
            numbers.add(number)
            insort(model, number)
    for number in list(model):
        numbers.remove(number)
    assert numbers.at_or_below(1 << 64) is None
