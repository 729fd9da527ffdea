"""The board: memory in which guests and VMM tell each other what may be read, by plain loads and stores.

Every page under test has *channels*: words (or strips of words) that one writer alone writes, with numbers that only
grow. Of each channel the board has

- ``latest``: no larger number was ever written. The writer sets it before the store.
- ``floor``: a number that was there, and the page's loss count then. The writer sets it when the store is done. As
  long as the count is the same, whoever reads must find it, or a larger one.
- ``purged``: numbers up to this one were thrown away by the VMM. From then on nobody may find one of them.

Of each page: ``loss``, a count that is odd while the VMM throws the page's contents away; ``reach``, odd while an
access may fail; ``state``, odd while the page is being converted, and with PRIVATE set while it is private. Of each of
an area's four addresses: ``slot``, odd while there is no slot, with READ_ONLY set while it is read-only. The x86 order
of loads and stores, in guests and in the VMM, is all the locking there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from anykvm import GuestMemory

_T = TypeVar("_T")

PAGE: Final = 4096
PAGES: Final = 16
"""Pages of an area."""
AREAS: Final = 12
VCPUS: Final = 3
ADDRESSES: Final = 4

BOARD: Final = 0x200000
"""Guest-physical and linear address; it is in the machine's own memory, whose slot nobody touches."""
SIZE: Final = 0x100000
STOP: Final = BOARD
PICK: Final = BOARD + 0x100
"""32 bytes: the areas that guests choose from, as often as they shall."""
CALLED: Final = BOARD + 0x140
"""Which pages of an area of functions are called: a bit for each."""
DESCRIPTORS: Final = BOARD + 0x1000
LOSS: Final = BOARD + 0x3000
REACH: Final = BOARD + 0x4000
STATE: Final = BOARD + 0x5000
SLOT: Final = BOARD + 0x6000
CHANNELS: Final = BOARD + 0x10000
NOTES: Final = BOARD + 0x80000
NOTE_SIZE: Final = 0x10000

# a descriptor: 4 linear addresses, then
DESCRIPTOR_SIZE: Final = 256
FIRST_PAGE: Final = 32
FOLLOW: Final = 36
"""All ones: what is found at the address is as ``state`` says, this area's memory or its twin's."""
TWIN: Final = 40
"""Pages from this area to its twin."""
WANTS: Final = 44
"""PRIVATE, or 0: what ``state`` must say, or an access is a memory fault (if the area does not follow it)."""
OPERATIONS: Final = 64
"""16 addresses of guest code."""

# channels of a page
CHANNEL_SIZE: Final = 16
PAGE_CHANNELS: Final = 16
VMM: Final = 0
ALIGNED: Final = 0  # + writer, 1..VCPUS
TAIL: Final = 4
UNALIGNED: Final = 4  # + writer
HEAD: Final = 8
CHANNELS_USED: Final = 9

# where they are in the page
AT_VMM: Final = 0xC4
"""The operand of ``mov $number, %eax; ret``, which is at 3 bytes below a word: guests may call it."""
AT_ALIGNED: Final = 0x40  # + 16 * writer
AT_UNALIGNED: Final = 0x81  # + 16 * writer
STRIP: Final = 16
"""Words on either side of the boundary after an even page; one word on either side after an odd one."""

# a vCPU's note: what it is about to access, and how that was when it looked
NOTE_ADDRESS: Final = 0x00  # index of the address, over all areas
NOTE_SLOT: Final = 0x04
NOTE_PAGE: Final = 0x08
NOTE_STATE: Final = 0x0C  # of that page and the next
NOTE_REACH: Final = 0x14  # of that page and the next
NOTE_VOID: Final = 0x1C  # set by the vCPU's thread: a device took the access, nothing can be concluded
NOTE_CHECKED: Final = 0x20
NOTE_WRITTEN: Final = 0x28
NOTE_BEGAN: Final = 0x30
"""The page's state when the round began; the vCPU's thread brings NOTE_STATE up to date."""
NOTE_TALLY: Final = 0x100  # increments done: of each page 8 counters
NOTE_SCRATCH: Final = 0x800
NOTE_STACK: Final = 0x2000

# flags of state and slot words, whose bit 0 says that they are changing
CHANGING: Final = 1
PRIVATE: Final = 2
READ_ONLY: Final = 2
STEP: Final = 4

U32: Final = 0xFFFFFFFF


def owner(page: int) -> int:
    """Who writes over the boundary between this page of an area and the next; 0: there is no next."""
    return 0 if page == PAGES - 1 else 1 + (page >> 1) % VCPUS


def strip(page: int) -> int:
    """Words on either side of the boundary after this page."""
    return 1 if page % 2 else STRIP


def words(page: int) -> dict[int, list[int]]:
    """Of each channel of a page of an area, the offsets of its words."""
    found = {VMM: [AT_VMM]}
    for writer in range(1, VCPUS + 1):
        found[ALIGNED + writer] = [AT_ALIGNED + 16 * writer]
        found[UNALIGNED + writer] = [AT_UNALIGNED + 16 * writer]
    if page < PAGES - 1:
        found[TAIL] = [PAGE - 4 * n for n in range(strip(page), 0, -1)]
    if page:
        found[HEAD] = [4 * n for n in range(strip(page - 1))]
    return found


def spread(weights: dict[_T, int], places: int) -> list[_T]:
    """Fill places in proportion to weights, none of which is lost."""
    total = sum(weights.values())
    ordered = [item for item, weight in weights.items() for _ in range(weight)]
    found = [ordered[n * total // places] for n in range(places)]
    assert set(found) == {item for item, weight in weights.items() if weight}
    return found


class Board:
    """The VMM's access to it. Pages are counted over all areas."""

    def __init__(self, memory: GuestMemory) -> None:
        """In the machine's memory."""
        self._words = memory.view[BOARD : BOARD + SIZE].cast("I")
        self._quads = memory.view[BOARD : BOARD + SIZE].cast("Q")
        self._bytes = memory.view[BOARD : BOARD + SIZE]

    def word(self, at: int) -> int:
        """Read 4 bytes at a guest-physical address."""
        return self._words[(at - BOARD) >> 2]

    def put(self, at: int, value: int) -> None:
        """Write 4 bytes."""
        self._words[(at - BOARD) >> 2] = value & U32

    def quad(self, at: int) -> int:
        """Read 8 bytes."""
        return self._quads[(at - BOARD) >> 3]

    def put_quad(self, at: int, value: int) -> None:
        """Write 8 bytes."""
        self._quads[(at - BOARD) >> 3] = value

    def put_bytes(self, at: int, data: bytes) -> None:
        """Write bytes."""
        self._bytes[at - BOARD : at - BOARD + len(data)] = data

    # -- channels ------------------------------------------------------------------------------------------------------

    def channel(self, page: int, channel: int) -> tuple[int, int, int, int]:
        """Read latest, purged, floor and the floor's loss count."""
        at = CHANNELS + (page * PAGE_CHANNELS + channel) * CHANNEL_SIZE
        floor = self.quad(at + 8)
        return self.word(at), self.word(at + 4), floor >> 32, floor & U32

    def intend(self, page: int) -> int:
        """Say that the VMM's next number is about to be written; returns it."""
        at = CHANNELS + page * PAGE_CHANNELS * CHANNEL_SIZE
        number = self.word(at) + 1
        self.put(at, number)
        return number

    def publish(self, page: int, number: int, loss: int) -> None:
        """Say that the VMM's number is there, since a time when the loss count was ``loss``."""
        if not loss & CHANGING:
            self.put_quad(CHANNELS + page * PAGE_CHANNELS * CHANNEL_SIZE + 8, number << 32 | loss)

    def loss(self, page: int) -> int:
        """Read a page's loss count."""
        return self.word(LOSS + 4 * page)

    def losing(self, page: int) -> list[int]:
        """Contents are about to be thrown away; returns what ``lost`` wants."""
        self.put(LOSS + 4 * page, self.loss(page) + 1)
        first = (CHANNELS - BOARD >> 3) + page * PAGE_CHANNELS * 2
        return [floor >> 32 for floor in self._quads[first + 1 : first + 2 * CHANNELS_USED : 2]]

    def lost(self, page: int, done: list[int]) -> None:
        """Contents have been thrown away: numbers that were there before can no more be found."""
        at = CHANNELS + page * PAGE_CHANNELS * CHANNEL_SIZE + 4
        for number in done:
            self.put(at, max(number, self.word(at)))
            at += CHANNEL_SIZE
        self.put(LOSS + 4 * page, self.loss(page) + 1)

    # -- pages and slots -----------------------------------------------------------------------------------------------

    def unreachable(self, pages: Iterable[int]) -> None:
        """From now on an access may fail; called again: from now on none may."""
        for page in pages:
            self.put(REACH + 4 * page, self.word(REACH + 4 * page) + 1)

    def state(self, page: int) -> int:
        """Read a page's state."""
        return self.word(STATE + 4 * page)

    def converting(self, page: int) -> None:
        """A page is about to become private or shared."""
        self.put(STATE + 4 * page, self.state(page) | CHANGING)

    def converted(self, page: int, private: bool) -> None:
        """It has."""
        self.put(STATE + 4 * page, (self.state(page) & ~3) + STEP | (PRIVATE if private else 0))

    def slot_changes(self, address: int) -> None:
        """There may be a slot at this address, or not."""
        self.put(SLOT + 4 * address, self.word(SLOT + 4 * address) | CHANGING)

    def slot_present(self, address: int, read_only: bool = False) -> None:
        """There is one now."""
        self.put(SLOT + 4 * address, (self.word(SLOT + 4 * address) & ~3) + STEP | (READ_ONLY if read_only else 0))
