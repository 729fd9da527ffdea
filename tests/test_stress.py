"""vCPUs in threads while another thread remaps, protects, replaces and deletes what they access: every value a guest
reads was legal at that moment, and nothing crashes.

Each page's first word is a version that only grows. The updater publishes a version once the change that brought it is
complete (the system call or ioctl has returned); from then on no vCPU may read an older one. A few seconds as a test;
`ANYKVM_STRESS_SECONDS=300 pytest tests/test_stress.py` for as long as one likes.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time

import anykvm
from anykvm import GuestMemory, Io, MemoryFault, Mmio, Vcpu
from anykvm.host import libc
from machine import CODE, Machine
from test_smp import second

PAGE, PAGES = 4096, 16
HIGH = 0x1000000
SECONDS = float(os.environ.get("ANYKVM_STRESS_SECONDS", "4"))
RW, NONE = 3, 0

#: Read the first word of page %ecx = 0..15 in turn and report it: port 0x10 + page.
READER = f"""
1:  mov $0, %ebx
2:  mov %ebx, %edi; shl $12, %edi; add ${HIGH:#x}, %edi
    mov (%rdi), %eax
    mov %ebx, %edx; add $0x10, %edx
    out %eax, %dx
    inc %ebx; cmp ${PAGES}, %ebx; jne 2b
    jmp 1b
"""


class Updater:
    """Changes one thing at a time; `published` are the versions that count."""

    def __init__(self, machine: Machine) -> None:
        self.vm = machine.vm
        self.memory = [GuestMemory(PAGES * PAGE, shared=False) for _ in range(2)]
        self.current = 0
        self.latest = [0] * PAGES
        self.published = [0] * PAGES
        self.slot = self.vm.map(self.memory[0], HIGH)
        self.random = random.Random(1)
        self.done = 0

    def _store(self, buffer: int, page: int) -> None:
        ctypes.c_uint32.from_address(self.memory[buffer].address + page * PAGE).value = self.latest[page]

    def store(self, page: int) -> None:
        """The VMM writes memory."""
        self.latest[page] += 1
        self._store(self.current, page)
        self.published[page] = self.latest[page]

    def replace(self, page: int) -> None:
        """A prepared page takes the place of the old one in one step."""
        self.latest[page] += 1
        fresh = libc.mmap(0, PAGE, RW, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        ctypes.c_uint32.from_address(fresh).value = self.latest[page]
        at = self.memory[self.current].address + page * PAGE
        assert libc.mremap(fresh, PAGE, PAGE, libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED, at) == at
        self.published[page] = self.latest[page]

    def protect(self, page: int) -> None:
        """Nobody may access it, for a moment; then it holds something newer."""
        at = self.memory[self.current].address + page * PAGE
        libc.mprotect(at, PAGE, NONE)
        libc.mprotect(at, PAGE, RW)
        self.store(page)

    def move(self, page: int) -> None:
        """The slot goes, and comes back over other memory with newer contents."""
        other = 1 - self.current
        for each in range(PAGES):
            self.latest[each] += 1
            self._store(other, each)
        self.vm.unmap(self.slot)
        self.slot = self.vm.map(self.memory[other], HIGH)
        self.current = other
        self.published = list(self.latest)

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self.random.choices((self.store, self.replace, self.protect, self.move), (4, 4, 4, 1))[0]
            kind(self.random.randrange(PAGES))
            self.done += 1


def read(vcpu: Vcpu, updater: Updater, until: float, seen: list[int]) -> None:
    """Run one vCPU and check what it reads."""
    while time.monotonic() < until:
        floor = updater.published
        floor = list(floor)
        exit = vcpu.run()
        if isinstance(exit, Io):
            page, value = exit.port - 0x10, int.from_bytes(exit.data, "little")
            if value != 0xFFFFFFFF:  # the answer to a device read, below
                assert floor[page] <= value <= updater.latest[page], (page, floor[page], value, updater.latest[page])
            seen.append(page)
        elif isinstance(exit, MemoryFault):
            assert HIGH <= exit.gpa < HIGH + PAGES * PAGE
        else:
            assert isinstance(exit, Mmio) and not exit.is_write, exit
            exit.respond(0xFFFFFFFF)


def test_every_value_read_was_legal() -> None:
    with anykvm.open("soft") as kvm, Machine(kvm) as machine:
        machine.long_mode(READER)
        updater = Updater(machine)
        vcpus = [machine.vcpu, second(machine, CODE)]
        until = time.monotonic() + SECONDS
        errors: list[BaseException] = []
        reads: list[list[int]] = [[] for _ in vcpus]

        def body(vcpu: Vcpu, seen: list[int]) -> None:
            try:
                read(vcpu, updater, until, seen)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=pair) for pair in zip(vcpus, reads, strict=True)]
        for thread in threads:
            thread.start()
        updater.run(until)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert updater.done > 100 and all(set(seen) == set(range(PAGES)) for seen in reads)
        for vcpu in vcpus:
            vcpu.close()
        machine.vm.close()
        for memory in updater.memory:
            memory.close()
