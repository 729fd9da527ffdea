"""An area with a dirty log, whose contents are never lost: no write may be missed, and counters must be exact."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Final

from anykvm import abi
from anykvm.backends.soft import poison, unpoison
from stress import board as b
from stress.area import SIZE, Area, Change, anonymous, gpa_of
from stress.guest import COUNTERS
from stress.host_areas import ACCESSES

if TYPE_CHECKING:
    from stress.world import World

_LOG: Final = abi.KVM_MEM_LOG_DIRTY_PAGES
_IGNORED: Final = slice(b.AT_VMM & ~15, (b.AT_VMM & ~15) + 16)
"""What the VMM writes itself is not logged."""


class Logged(Area):
    """One slot, or two over the same memory, each with a log of its own. A copy of it is kept from harvests alone."""

    operations = {
        **{name: 1 for name in ACCESSES if "across" not in name},
        "read_aligned": 2,
        "write_aligned": 2,
        **dict.fromkeys(COUNTERS, 1),
    }
    weight = 4

    def __init__(self, world: World, index: int) -> None:
        """Logged from the start."""
        super().__init__(world, index)
        self.host = anonymous(index)
        self.gpas = self.vas = (gpa_of(index), gpa_of(index, 1)) * 2
        self.slots = [self.vm.map(self.host, gpa, flags=_LOG) for gpa in self.gpas[:2]]
        self.manual = False
        self.copy = self.now()
        self.harvested = 0

    def changes(self) -> list[tuple[int, Change]]:
        """Nothing that loses contents."""
        always: list[tuple[int, Change]] = [
            (6, self.harvest),
            (2, self.toggle),
            (2, self.protect),
            (1, self.poison),
            (1, self.store),
        ]
        return always if self.world.rings else [*always, (1, self.manual_protect)]

    def now(self) -> list[bytes]:
        """What is in its pages, without the VMM's channel."""
        data = bytearray(self.host.get(0, SIZE))
        pages = [data[at : at + b.PAGE] for at in range(0, SIZE, b.PAGE)]
        for page in pages:
            page[_IGNORED] = bytes(16)
        return [bytes(page) for page in pages]

    # -- dirty logs ----------------------------------------------------------------------------------------------------

    def harvest(self, choose: random.Random) -> None:
        """Of all that changed since the last harvest, before this one, every page must be in it."""
        before = self.now()
        found = self.from_rings() if self.world.rings else self.from_bitmaps()
        missed = [page for page in range(b.PAGES) if page not in found and before[page] != self.copy[page]]
        if missed:
            raise AssertionError(f"pages {missed} have changed since the last harvest, and are not in the dirty log")
        if found:
            now = self.now()
            for page in found:
                self.copy[page] = now[page]
        self.harvested += len(found)
        self.did("dirty rings harvested and reset" if self.world.rings else "KVM_GET_DIRTY_LOG")

    def from_bitmaps(self) -> set[int]:
        """Both slots' logs."""
        found = set()
        for slot in self.slots:
            bitmap = self.vm.get_dirty_log(slot)
            if self.manual:
                self.vm.clear_dirty_log(slot, 0, b.PAGES, bitmap)
            bits = int.from_bytes(bitmap, "little")
            found |= {page for page in range(b.PAGES) if bits >> page & 1}
        return found

    def from_rings(self) -> set[int]:
        """All vCPUs' rings. What is harvested is read only after the reset."""
        found = {page for ring in self.world.rings for page in ring.harvest()}
        self.vm.reset_dirty_rings()
        self.world.room_in_rings()
        return {page.offset for page in found if page.slot in self.slots}

    def toggle(self, choose: random.Random) -> None:
        """Logging off and on forgets everything; the copy begins anew."""
        for slot, gpa in zip(self.slots, self.gpas, strict=False):
            self.vm.set_user_memory_region(slot, gpa, SIZE, self.host.address, 0)
            self.vm.set_user_memory_region(slot, gpa, SIZE, self.host.address, _LOG)
        self.copy = self.now()
        self.did("dirty logging off and on")

    def manual_protect(self, choose: random.Random) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 on or off."""
        self.manual = not self.manual
        self.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, int(self.manual))
        self.did("manual dirty log protection on or off")

    def poison(self, choose: random.Random) -> None:
        """A page counts as broken for a while."""
        page = self.page(choose)
        with self.failing(page):
            poison(self.vm, self.host, page * b.PAGE)
            unpoison(self.vm, self.host, page * b.PAGE)
        self.did("poisoned and repaired")

    # -- at the end ----------------------------------------------------------------------------------------------------

    def check_counters(self) -> int:
        """Each counter is the sum of what the vCPUs say they have added; returns how much that is."""
        total = 0
        data = self.host.get(0, SIZE)
        for page in range(b.PAGES):
            own = [self.tally(writer, page, 1) for writer in range(1, b.VCPUS + 1)]
            want = {COUNTERS["count_own"] + 8 * writer: own[writer - 1] for writer in range(1, b.VCPUS + 1)}
            for kind, name in enumerate(COUNTERS):
                if name != "count_own" and (name != "count_over_page" or page < b.PAGES - 1):
                    want[COUNTERS[name]] = sum(self.tally(writer, page, kind) for writer in range(1, b.VCPUS + 1))
            for offset, count in want.items():
                (is_,) = struct.unpack_from("<Q", data, page * b.PAGE + offset)
                if is_ != count:
                    raise AssertionError(
                        f"counter at {offset:#x} of page {page} is {is_}, and was incremented {count} times"
                    )
                total += count
        return total

    def tally(self, writer: int, page: int, kind: int) -> int:
        """How often a vCPU has incremented a counter."""
        return self.board.quad(b.NOTES + writer * b.NOTE_SIZE + b.NOTE_TALLY + 64 * page + 8 * kind)
