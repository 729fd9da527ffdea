"""The guests' threads: run, and judge every exit by what the guest had noted and what the VMM was doing."""

from __future__ import annotations

import errno
import random
import signal
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

from anykvm import DirtyRingFull, Exit, Hlt, Intr, Io, MemoryFault, Mmio, Vcpu, abi
from stress import board as b
from stress.guest import PORT_WRONG, WHY
from stress.private import Private, Shared

if TYPE_CHECKING:
    from stress.area import Area
    from stress.world import World


class Runner:
    """One vCPU and its thread; ``writer`` is its number on the board."""

    def __init__(self, world: World, vcpu: Vcpu, writer: int, seed: int) -> None:
        """Not running yet."""
        self.world = world
        self.board = world.board
        self.vcpu = vcpu
        self.writer = writer
        self.note = b.NOTES + writer * b.NOTE_SIZE
        self.random = random.Random(seed)
        self.exits: Counter[str] = Counter()
        self.last: deque[Exit] = deque(maxlen=8)
        self.thread = threading.Thread(target=world.guarded, args=(self.run,), name=f"vCPU {writer}", daemon=True)

    def run(self) -> None:
        """Until the guest halts."""
        # SIGBUS for a poisoned page: it ends KVM_RUN, and is taken here
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
        self.vcpu.set_signal_mask(())
        while not self.world.failed:
            exit = self.vcpu.run()
            self.exits[type(exit).__name__] += 1
            self.last.append(exit)
            match exit:
                case MemoryFault():
                    self.fault(exit)
                    self.look_again()
                case Mmio():
                    self.device(
                        exit
                    )  # what is noted stays: the rest of the access may follow, whatever slots are there by then
                case Intr(abi.KVM_EXIT_INTR):
                    self.interrupted()
                case DirtyRingFull():
                    self.world.wait_for_room()
                case Hlt():
                    if self.board.word(b.STOP):
                        return
                    raise AssertionError(f"vCPU {self.writer} halted")
                case Io(Io.OUT, port, data=data) if port == PORT_WRONG:
                    raise AssertionError(self.wrong(int.from_bytes(data, "little")))
                case _:
                    raise AssertionError(f"vCPU {self.writer}: {exit}, {self.where()}")

    # -- what the guest has noted --------------------------------------------------------------------------------------

    def noted(self) -> tuple[Area, int]:
        """The area that the guest is accessing, and the page, on the board."""
        area = self.world.areas[self.board.word(self.note + b.NOTE_ADDRESS) // b.ADDRESSES]
        return area, self.board.word(self.note + b.NOTE_PAGE)

    def target(self, page: int, state: int) -> int:
        """Whose memory a page is: its own, or its twin's. The guest also notes the page after the last of all areas."""
        if page // b.PAGES == len(self.world.areas):
            return page
        area = self.world.areas[page // b.PAGES]
        return page + area.twin if area.follow and state & b.PRIVATE else page

    def look_again(self) -> None:
        """Note how everything is now; the access that failed is repeated after that."""
        _, page = self.noted()
        at = self.board.word(self.note + b.NOTE_ADDRESS)
        self.board.put(self.note + b.NOTE_SLOT, self.board.word(b.SLOT + 4 * at))
        for n in (0, 1):
            state = self.board.state(page + n)
            self.board.put(self.note + b.NOTE_STATE + 4 * n, state)
            reach = self.board.word(b.REACH + 4 * self.target(page + n, state))
            self.board.put(self.note + b.NOTE_REACH + 4 * n, reach)

    # -- exits ---------------------------------------------------------------------------------------------------------

    def fault(self, exit: MemoryFault) -> None:
        """Was it to be expected that this page could not be had?"""
        area, first = self.noted()
        number = (exit.gpa - area.gpas[self.board.word(self.note + b.NOTE_ADDRESS) % b.ADDRESSES]) // b.PAGE
        n = area.first + number - first
        if n not in (0, 1):
            raise AssertionError(
                f"vCPU {self.writer}: {exit} while it accesses page {first} of {area.name}, {self.where()}"
            )
        state = self.board.word(self.note + b.NOTE_STATE + 4 * n)
        now = self.board.state(first + n)
        if self.mismatch(area, number, exit, state, now):
            return
        private = isinstance(area, Private) or (area.follow and (state | now) & b.PRIVATE)
        reach = self.board.word(self.note + b.NOTE_REACH + 4 * n)
        target = self.target(first + n, state)
        unreachable = reach & 1 or reach != self.board.word(b.REACH + 4 * target) or (area.follow and state != now)
        right = (abi.KVM_MEMORY_EXIT_FLAG_PRIVATE, abi.EHWPOISON) if private else (0, errno.EFAULT)
        if not unreachable or (not area.follow and (exit.flags, exit.errno) != right):
            raise AssertionError(
                f"vCPU {self.writer}: {exit}, and page {number} of {area.name} was there, {self.where()}"
            )
        if self.random.random() < 0.2:
            self.pre_fault(exit.gpa)

    def mismatch(self, area: Area, number: int, exit: MemoryFault, state: int, now: int) -> bool:
        """The guest's choice of privacy was not the attribute's: convert the page, as it asks."""
        wants = isinstance(area, Private)
        if not self.world.guest_chooses or not isinstance(area, Private | Shared):
            return False
        if exit.errno != errno.EFAULT or (exit.flags & exit.PRIVATE != 0) != wants:
            return False
        settled = state == now and not now & b.CHANGING
        if settled and (now & b.PRIVATE != 0) == wants:
            return False
        shared = area.shared if isinstance(area, Private) else area
        shared.convert(range(number, number + 1), wants)
        self.exits["converted by a guest"] += 1
        return True

    def pre_fault(self, gpa: int) -> None:
        """KVM_PRE_FAULT_MEMORY of the page, which may come too early or too late."""
        try:
            self.vcpu.pre_fault_memory(gpa, b.PAGE)
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.ENOENT, errno.EINTR, abi.EHWPOISON):
                raise
        self.exits["KVM_PRE_FAULT_MEMORY"] += 1

    def device(self, exit: Mmio) -> None:
        """No slot, or a read-only one: the access is void."""
        area, _ = self.noted()
        address = self.board.word(self.note + b.NOTE_ADDRESS)
        inside = 0 <= exit.phys_addr - area.gpas[address % b.ADDRESSES] < b.PAGES * b.PAGE
        slot = self.board.word(self.note + b.NOTE_SLOT)
        changed = slot & b.CHANGING or slot != self.board.word(b.SLOT + 4 * address)
        if not inside or not (changed or (slot & b.READ_ONLY and exit.is_write)):
            raise AssertionError(f"vCPU {self.writer}: {exit}, and {area.name} has a slot there, {self.where()}")
        self.board.put(self.note + b.NOTE_VOID, 1)
        if not exit.is_write:
            exit.respond(b"\xff" * exit.len)

    def interrupted(self) -> None:
        """A kick; or SIGBUS, because a page was poisoned."""
        told = signal.sigtimedwait({signal.SIGBUS}, 0)
        if told is None:
            return
        self.exits["SIGBUS"] += 1
        area, first = self.noted()
        reach = [self.board.word(self.note + b.NOTE_REACH + 4 * n) for n in (0, 1)]
        if not any(old & 1 or old != self.board.word(b.REACH + 4 * (first + n)) for n, old in enumerate(reach)):
            raise AssertionError(f"vCPU {self.writer}: SIGBUS, and no page of {area.name} at {first} was poisoned")
        self.look_again()

    # -- explanations --------------------------------------------------------------------------------------------------

    def where(self) -> str:
        """The registers, what alone changes now, and the last exits."""
        regs = self.vcpu.get_regs()
        names = ("rip", "rax", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12")
        values = ", ".join(f"{name} {getattr(regs, name):#x}" for name in names)
        only = self.world.phases.only
        changes = f"{only.area.name}: {only.change.__qualname__}" if only else "all"
        return f"{values}; changes: {changes}; last exits: {list(self.last)}"

    def wrong(self, value: int) -> str:
        """What the guest found, in words."""
        regs = self.vcpu.get_regs()
        page, channel = divmod((regs.r10 - b.CHANNELS) // b.CHANNEL_SIZE, b.PAGE_CHANNELS)
        area = self.world.areas[page // b.PAGES]
        latest, purged, floor, loss = self.board.channel(page, channel)
        return (
            f"vCPU {self.writer} read {value} in channel {channel} of page {page % b.PAGES} of {area.name}, which"
            f" {WHY[regs.rcx & b.U32]}: latest {latest}, purged {purged} (read before: {regs.r11}), floor {floor} since"
            f" {loss}, loss count now {self.board.loss(page)} (before: {regs.r9}), state {self.board.state(page)};"
            f" {self.where()}"
        )
