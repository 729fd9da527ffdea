"""What all memory under test has in common: 16 pages, their channels on the board, up to four guest addresses."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from anykvm.conformance.host import READ_WRITE, Host
from anykvm.host import libc
from stress import board as b
from stress.guest import FUNCTION

if TYPE_CHECKING:
    from stress.world import World

SIZE: Final = b.PAGES * b.PAGE
STRIDE: Final = 0x400000
_HOST: Final = 0x200000000000
"""Host addresses of our own choice, far below those the kernel gives out: a hole that a test makes stays one."""
_MREMAP_MAYMOVE_FIXED: Final = 3

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.mremap.restype = ctypes.c_void_p

Change = Callable[[random.Random], None]


def gpa_of(index: int, copy: int = 0) -> int:
    """Guest-physical address of an area, or of its other place: each in 2 MiB of its own."""
    return 0x10000000 + index * STRIDE + copy * 0x200000


class Area:
    """Pages under test. A subclass makes the memory and the slots, and lists its changes.

    An area belongs to one updater thread. ``words`` is where the VMM writes its channel.
    """

    operations: dict[str, int]
    """What guests do here, as often."""
    weight = 2
    """How often guests come here."""
    follow = False
    twin = 0

    def __init__(self, world: World, index: int) -> None:
        """The ``index``-th of the world."""
        self.world = world
        self.board = world.board
        self.vm = world.machine.vm
        self.index = index
        self.first = index * b.PAGES
        self.gpas = (gpa_of(index),) * b.ADDRESSES
        """Guest-physical addresses."""
        self.vas = self.gpas
        """Linear ones."""
        self.done: Counter[str] = Counter()

    # -- to be said by each kind ---------------------------------------------------------------------------------------

    def changes(self) -> list[tuple[int, Change]]:
        """How often, and what."""
        raise NotImplementedError

    def read(self, page: int) -> bytes:
        """A page as it is in memory."""
        return self.host.get(page * b.PAGE, b.PAGE)

    def start(self) -> None:
        """The world begins to turn."""

    def close(self) -> None:
        """Release what the end of the VM does not."""

    host: Host

    @property
    def accessed(self) -> int:
        """Index of the area by which guests get at this memory."""
        return self.index

    # -- tools ---------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The kind."""
        return type(self).__name__.lower()

    def did(self, what: str) -> None:
        """Count a change."""
        self.done[f"{self.name}: {what}"] += 1

    def page(self, choose: random.Random) -> int:
        """One of its pages."""
        return choose.randrange(b.PAGES)

    @contextmanager
    def losing(self, *pages: int) -> Iterator[list[list[int]]]:
        """While the contents of pages are thrown away."""
        done = [self.board.losing(self.first + page) for page in pages]
        yield done
        for page, numbers in zip(pages, done, strict=True):
            self.board.lost(self.first + page, numbers)

    @contextmanager
    def failing(self, *pages: int) -> Iterator[None]:
        """While accesses to pages may fail."""
        numbers = [self.first + page for page in pages]
        self.board.unreachable(numbers)
        yield
        self.board.unreachable(numbers)

    def address(self, copy: int) -> int:
        """Index of one of its addresses on the board."""
        return self.index * b.ADDRESSES + copy

    def slot_changes(self, copies: Iterable[int]) -> None:
        """There may be no slot at these of its addresses."""
        for copy in copies:
            self.board.slot_changes(self.address(copy))

    def slot_present(self, copies: Iterable[int], read_only: bool = False) -> None:
        """There is one."""
        for copy in copies:
            self.board.slot_present(self.address(copy), read_only)

    # -- changes that many kinds have ----------------------------------------------------------------------------------

    def store_at(self, address: int, page: int) -> None:
        """The VMM writes its channel, by a mapping of the page."""
        loss = self.board.loss(self.first + page)
        number = self.board.intend(self.first + page)
        ctypes.c_uint32.from_address(address + b.AT_VMM).value = number
        self.board.publish(self.first + page, number, loss)

    def store(self, choose: random.Random) -> None:
        """The VMM writes memory."""
        page = self.page(choose)
        self.store_at(self.host.address + page * b.PAGE, page)
        self.did("VMM store")

    def protect(self, choose: random.Random) -> None:
        """mprotect: nothing, or only reads, for a moment."""
        page = self.page(choose)
        prot = choose.choice((libc.PROT_NONE, libc.PROT_READ))
        with self.failing(page):
            self.host.protect(prot, page * b.PAGE, b.PAGE)
            self.host.protect(READ_WRITE, page * b.PAGE, b.PAGE)
        self.did("mprotect none" if prot == libc.PROT_NONE else "mprotect read")

    def discard(self, choose: random.Random) -> None:
        """MADV_DONTNEED of private memory: zeros."""
        page = self.page(choose)
        with self.losing(page):
            self.host.advise(libc.MADV_DONTNEED, page * b.PAGE, b.PAGE)
        self.did("MADV_DONTNEED")

    def replace(self, choose: random.Random) -> None:
        """A prepared page takes the place of the old one in one step: mremap."""
        page = self.page(choose)
        fresh = libc.mmap(0, b.PAGE, READ_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        put_function(fresh)
        with self.losing(page):
            number = self.board.intend(self.first + page)
            ctypes.c_uint32.from_address(fresh + b.AT_VMM).value = number
            at = self.host.address + page * b.PAGE
            if _libc.mremap(fresh, b.PAGE, b.PAGE, _MREMAP_MAYMOVE_FIXED, at) != at:
                raise OSError(ctypes.get_errno(), "mremap")
        self.board.publish(self.first + page, number, self.board.loss(self.first + page))
        self.did("mremap")


def put_function(address: int) -> None:
    """Write the function around the VMM's channel into a page."""
    at, head, behind, tail = FUNCTION
    ctypes.memmove(address + at, head, len(head))
    ctypes.memmove(address + behind, tail, len(tail))


def reserve(index: int) -> int:
    """Host address of an area, 2 MiB each; nothing is mapped there."""
    return _HOST + index * 0x200000


def anonymous(index: int) -> Host:
    """Private anonymous memory at an area's host address."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
    host = Host(libc.mmap(reserve(index), SIZE, READ_WRITE, flags), SIZE)
    for page in range(b.PAGES):
        put_function(host.address + page * b.PAGE)
    return host
