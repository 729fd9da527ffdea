"""Slots, host mappings and guest accesses in any order, against a small model: every access has exactly the outcome
that the slots and the host's mapping say at that moment."""

from __future__ import annotations

import ctypes
import errno

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import anykvm
from anykvm import GuestMemory, Hlt, MemoryFault, Mmio, abi
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, Machine

PAGE = 4096
PAGES = 4
WINDOW = 0x1000000  # gpas 16 MiB up: eight frames the slots may cover
FRAMES = 8
NONE, READ, WRITE = 0, 1, 3

LOAD = "mov (%rsi), %rax; hlt"
STORE = "mov %rbx, (%rsi); hlt"
FETCH = "call *%rsi; hlt"

pages = st.integers(0, PAGES - 1)
frames = st.integers(0, FRAMES - 1)
counts = st.integers(1, 3)
slots = st.integers(1, 3)


class Model(RuleBasedStateMachine):
    """Two host buffers of four pages each; up to three slots over them; one vCPU that loads, stores and fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.kvm = anykvm.open("soft")
        self.machine = Machine(self.kvm)
        self.buffers = [GuestMemory(PAGES * PAGE) for _ in range(2)]
        self.prot = [[WRITE] * PAGES for _ in range(2)]
        self.content: list[list[int]] = [[0] * PAGES for _ in range(2)]
        self.slots: dict[int, tuple[int, int, int, int, bool]] = {}  # id: frame, count, buffer, page, read-only
        self.serial = 0

    @initialize()
    def code(self) -> None:
        self.machine.long_mode("hlt")
        for at, source in ((0x100, LOAD), (0x200, STORE), (0x300, FETCH)):
            self.machine.memory.write(CODE + at, assemble(source))

    def teardown(self) -> None:
        self.machine.vm.close()
        self.machine.memory.close()
        for buffer in self.buffers:
            buffer.close()
        self.kvm.close()

    # -- what may change ---------------------------------------------------------------------------------------------

    def _set(self, slot: int, frame: int, count: int, buffer: int, page: int, read_only: bool) -> None:
        self.machine.vm.set_user_memory_region(
            slot=slot,
            guest_phys_addr=WINDOW + frame * PAGE,
            memory_size=count * PAGE,
            userspace_addr=self.buffers[buffer].address + page * PAGE,
            flags=abi.KVM_MEM_READONLY if read_only else 0,
        )

    @rule(slot=slots, frame=frames, count=counts, buffer=st.integers(0, 1), page=pages, read_only=st.booleans())
    def set_slot(self, slot: int, frame: int, count: int, buffer: int, page: int, read_only: bool) -> None:
        count = min(count, PAGES - page)
        wanted = (frame, count, buffer, page, read_only)
        old = self.slots.get(slot)
        expected = 0
        if old is not None and (old[1:4] != wanted[1:4] or old[4] != read_only):
            expected = errno.EINVAL  # only the place may change
        elif any(o != slot and f < frame + count and frame < f + c for o, (f, c, *_) in self.slots.items()):
            expected = errno.EEXIST
        try:
            self._set(slot, *wanted)
        except OSError as error:
            assert error.errno == expected, (error, wanted, self.slots)
        else:
            assert not expected, (wanted, self.slots)
            self.slots[slot] = wanted

    @rule(slot=slots)
    def delete_slot(self, slot: int) -> None:
        try:
            self._set(slot, 0, 0, 0, 0, False)
        except OSError as error:
            assert error.errno == errno.EINVAL and slot not in self.slots
        else:
            del self.slots[slot]

    @rule(buffer=st.integers(0, 1), page=pages, prot=st.sampled_from((NONE, READ, WRITE)))
    def protect(self, buffer: int, page: int, prot: int) -> None:
        if self.prot[buffer][page] >= 0:
            self.buffers[buffer].protect(page * PAGE, PAGE, prot)
            self.prot[buffer][page] = prot

    @rule(buffer=st.integers(0, 1), page=pages)
    def unmap(self, buffer: int, page: int) -> None:
        if self.prot[buffer][page] >= 0:
            self.buffers[buffer].unmap(page * PAGE, PAGE)
            self.prot[buffer][page] = -1

    @rule(buffer=st.integers(0, 1), page=pages)
    def map_again(self, buffer: int, page: int) -> None:
        if self.prot[buffer][page] < 0:
            self.buffers[buffer].map(page * PAGE, PAGE, WRITE)
            self.prot[buffer][page] = WRITE
            self.content[buffer][page] = 0

    @rule(buffer=st.integers(0, 1), page=pages)
    @precondition(lambda self: True)
    def host_writes(self, buffer: int, page: int) -> None:
        if self.prot[buffer][page] == WRITE:
            self.serial += 1
            ctypes.c_uint64.from_address(self.buffers[buffer].address + page * PAGE).value = self.serial
            self.content[buffer][page] = self.serial

    # -- what the guest does -----------------------------------------------------------------------------------------

    def _place(self, frame: int) -> tuple[int, int, bool] | None:
        for first, count, buffer, page, read_only in self.slots.values():
            if first <= frame < first + count:
                return buffer, page + frame - first, read_only
        return None

    def _go(self, at: int, frame: int, rbx: int = 0) -> object:
        self.machine.set_regs(rip=CODE + at, rsi=WINDOW + frame * PAGE, rbx=rbx, rsp=0x70000)
        return self.machine.vcpu.run()

    @rule(frame=frames)
    def load(self, frame: int) -> None:
        place, exit = self._place(frame), self._go(0x100, frame)
        if place is None:
            assert isinstance(exit, Mmio) and exit.phys_addr == WINDOW + frame * PAGE and not exit.is_write
            exit.respond(0xABCD)
            assert self.machine.vcpu.run() == Hlt() and self.machine.vcpu.get_regs().rax == 0xABCD
        elif self.prot[place[0]][place[1]] in (READ, WRITE):
            assert exit == Hlt()
            assert self.machine.vcpu.get_regs().rax == self.content[place[0]][place[1]]
        else:
            assert exit == MemoryFault(WINDOW + frame * PAGE, PAGE, 0, errno.EFAULT)
            assert self.machine.vcpu.get_regs().rip == CODE + 0x100

    @rule(frame=frames)
    def store(self, frame: int) -> None:
        self.serial += 1
        place, exit = self._place(frame), self._go(0x200, frame, self.serial)
        if place is None or place[2]:
            assert exit == Mmio(WINDOW + frame * PAGE, self.serial.to_bytes(8, "little"), 8, True)
            assert self.machine.vcpu.run() == Hlt()
        elif self.prot[place[0]][place[1]] == WRITE:
            assert exit == Hlt()
            self.content[place[0]][place[1]] = self.serial
        else:
            assert exit == MemoryFault(WINDOW + frame * PAGE, PAGE, 0, errno.EFAULT)
            assert self.machine.vcpu.get_regs().rip == CODE + 0x200

    @rule(frame=frames)
    def fetch(self, frame: int) -> None:
        place = self._place(frame)
        if place is None or self.prot[place[0]][place[1]] not in (READ, WRITE):
            exit = self._go(0x300, frame)
            if place is None:
                assert isinstance(exit, anykvm.InternalError)
                self.machine.vcpu.set_vcpu_events(self.machine.vcpu.get_vcpu_events())
                self._forget_exception()
            else:
                assert exit == MemoryFault(WINDOW + frame * PAGE, PAGE, 0, errno.EFAULT)

    def _forget_exception(self) -> None:
        events = self.machine.vcpu.get_vcpu_events()
        events.exception.injected = events.exception.pending = 0
        self.machine.vcpu.set_vcpu_events(events)

    @invariant()
    def memory_is_as_the_model_has_it(self) -> None:
        for buffer, prots in enumerate(self.prot):
            for page, prot in enumerate(prots):
                if prot in (READ, WRITE):
                    found = ctypes.c_uint64.from_address(self.buffers[buffer].address + page * PAGE).value
                    assert found == self.content[buffer][page]


Model.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestModel = Model.TestCase
