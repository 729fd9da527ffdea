"""Memory: dirty-log harvests, and slots beside many others. Each function returns microseconds an operation."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import anykvm
from anykvm import GuestMemory, Kvm, Vcpu, Vm
from anykvm.abi import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from anykvm.vmm.modes import long_mode
from bench.guests import TOUCH

CODE, STACK, LOW, GIB, PAGE = 0x80000, 0x90000, 1 << 20, 1 << 30, 4096
FIRST = GIB  # where the logged slot is
ROUNDS = 15


class LoggedGuest:
    """A guest that writes to chosen pages of a logged slot of 1 GiB."""

    def __init__(self, kvm: Kvm, low: GuestMemory, memory: GuestMemory) -> None:
        self.vm: Vm = kvm.create_vm()
        self.vm.map(low, 0, 0)
        self.vm.map(memory, FIRST, 1, KVM_MEM_LOG_DIRTY_PAGES)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        low.write(CODE, TOUCH)
        long_mode(self.vcpu, low, CODE, STACK, ((0, 2 * GIB),))

    def dirty(self, pages: int) -> None:
        """Write to the first pages of the slot."""
        if pages:
            regs = self.vcpu.get_regs()
            regs.rip, regs.rdi, regs.rcx = CODE, FIRST, pages
            self.vcpu.set_regs(regs)
            self.vcpu.run()


def harvest(pages: int, manual: bool = False) -> float:
    """KVM_GET_DIRTY_LOG of a slot of 1 GiB with so many dirty pages; `manual`: and KVM_CLEAR_DIRTY_LOG of all of it."""
    with anykvm.open("soft") as kvm, GuestMemory(LOW) as low, GuestMemory(GIB) as memory:
        guest = LoggedGuest(kvm, low, memory)
        if manual:
            guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)

        def once() -> float:
            guest.dirty(pages)
            start = time.perf_counter()
            bitmap = guest.vm.get_dirty_log(1)
            if manual:
                guest.vm.clear_dirty_log(1, 0, GIB // PAGE, bitmap)
            took = time.perf_counter() - start
            assert int.from_bytes(bitmap, "little").bit_count() == pages
            return took * 1e6

        once()
        return median(once() for _ in range(ROUNDS))


def slots(counts: tuple[int, ...]) -> list[float]:
    """Create and delete a slot in the middle of so many others, for each of `counts`: the best round, taken in turn."""
    with anykvm.open("soft") as kvm, GuestMemory(PAGE) as memory:
        operations = [slot_pair(kvm, memory.address, present) for present in counts]
        best = [timed(operation) for operation in operations]
        for _ in range(ROUNDS):
            best = [min(old, timed(operation)) for old, operation in zip(best, operations, strict=True)]
        return best


def slot_pair(kvm: Kvm, hva: int, present: int) -> Callable[[], None]:
    """Make a VM with `present` slots; returns what creates one more among them and deletes it."""
    vm = kvm.create_vm()
    vm.create_vcpu()
    for number in range(present):
        vm.set_user_memory_region(number, 2 * number * PAGE, PAGE, hva)
    gpa = (2 * (present // 2) + 1) * PAGE

    def pair() -> None:
        vm.set_user_memory_region(present, gpa, PAGE, hva)
        vm.set_user_memory_region(present, gpa, 0, hva)

    return pair


def timed(operation: Callable[[], None], count: int = 200) -> float:
    """Microseconds of one, in a loop."""
    start = time.perf_counter()
    for _ in range(count):
        operation()
    return (time.perf_counter() - start) / count * 1e6
