"""An area whose slot is deleted, moved and made read-only. What no slot maps, no guest writes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from anykvm.abi import KVM_MEM_READONLY
from anykvm.host import libc
from stress import board as b
from stress.area import SIZE, Area, Change, anonymous, gpa_of
from stress.host_areas import ACCESSES

if TYPE_CHECKING:
    from stress.world import World

LOOKS = 3


class Moving(Area):
    """One slot that is now at one, now at the other of two guest-physical addresses."""

    operations = ACCESSES
    weight = 4

    def __init__(self, world: World, index: int) -> None:
        """At the first."""
        super().__init__(world, index)
        self.host = anonymous(index)
        self.gpas = self.vas = (gpa_of(index), gpa_of(index, 1)) * 2
        self.slot = self.vm.map(self.host, self.gpas[0])
        self.place = 0
        self.slot_changes((1, 3))

    def changes(self) -> list[tuple[int, Change]]:
        """Of its slot."""
        return [
            (3, self.store),
            (2, self.delete),
            (3, self.move),
            (2, self.read_only),
            (1, self.protect),
            (1, self.discard),
        ]

    def here(self) -> tuple[int, int]:
        """Which of its addresses have the slot."""
        return self.place, self.place + 2

    def delete(self, choose: random.Random) -> None:
        """The slot goes and comes back, somewhere."""
        self.slot_changes(self.here())
        self.vm.unmap(self.slot)
        self.untouched()
        self.place = choose.randrange(2)
        self.vm.map(self.host, self.gpas[self.place], self.slot)
        self.slot_present(self.here())
        self.did("slot deleted and created")

    def move(self, choose: random.Random) -> None:
        """KVM_SET_USER_MEMORY_REGION with another guest_phys_addr."""
        self.slot_changes(self.here())
        self.place = 1 - self.place
        self.vm.set_user_memory_region(self.slot, self.gpas[self.place], SIZE, self.host.address)
        self.slot_present(self.here())
        self.did("slot moved")

    def read_only(self, choose: random.Random) -> None:
        """Delete it, create it read-only; and back."""
        self.slot_changes(self.here())
        self.vm.unmap(self.slot)
        self.vm.map(self.host, self.gpas[self.place], self.slot, KVM_MEM_READONLY)
        self.slot_present(self.here(), read_only=True)
        self.untouched()
        self.slot_changes(self.here())
        self.vm.unmap(self.slot)
        self.vm.map(self.host, self.gpas[self.place], self.slot)
        self.slot_present(self.here())
        self.did("slot made read-only and writable")

    def untouched(self) -> None:
        """Nobody writes this memory any more."""
        before = libc.copy_out(self.host.address, SIZE)
        for _ in range(LOOKS):
            now = libc.copy_out(self.host.address, SIZE)
            if now != before:
                at = next(n for n in range(SIZE) if now[n] != before[n])
                raise AssertionError(
                    "a guest wrote memory that no slot lets it write any more:"
                    f" page {at // b.PAGE}, offset {at % b.PAGE:#x}"
                )
