"""Private memory: every page twice, in a guest_memfd and in ordinary memory, and an attribute that says which counts.

Where the guest chooses by an address bit, the two are two areas, and an access that the attribute contradicts is a
memory fault, answered by a conversion. Where the attribute chooses, guests look at the board, and the second area, the
twin, has no address of its own.
"""

from __future__ import annotations

import ctypes
import random
import threading
from typing import TYPE_CHECKING, Final

from anykvm import abi
from anykvm.abi import KVM_MEM_GUEST_MEMFD
from anykvm.backends.soft.guest_memfd import fail_page
from anykvm.testing.machine import PML4
from stress import board as b
from stress.area import SIZE, STRIDE, Area, Change, anonymous, gpa_of
from stress.host_areas import ACCESSES

if TYPE_CHECKING:
    from stress.world import World

GPA_BIT: Final = 47
_ALONE: Final = {name: often for name, often in ACCESSES.items() if "across" not in name}
_HUGE: Final = 0x87

_SYS_PREAD64 = 17
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Shared(Area):
    """The ordinary memory, the slot and the attribute of both."""

    operations = ACCESSES
    weight = 3

    def __init__(self, world: World, index: int) -> None:
        """With a guest_memfd; all of it shared."""
        super().__init__(world, index)
        self.host = anonymous(index)
        self.fd = self.vm.create_guest_memfd(SIZE)
        self.vm.set_user_memory_region2(
            99, self.gpas[0], SIZE, self.host.address, KVM_MEM_GUEST_MEMFD, self.fd, guest_memfd_offset=0
        )
        self.lock = threading.Lock()
        self.follow = not world.guest_chooses
        if self.follow:
            self.twin = b.PAGES
            self.operations = _ALONE  # pages of one access could be of both kinds

    def changes(self) -> list[tuple[int, Change]]:
        """Conversions, and what is done to the ordinary memory."""
        return [(3, self.flip), (2, self.store), (1, self.discard), (1, self.protect), (1, self.noise)]

    def flip(self, choose: random.Random) -> None:
        """Pages become private, or shared."""
        page = self.page(choose)
        count = choose.randrange(1, b.PAGES - page + 1)
        self.convert(range(page, page + count), choose.random() < 0.5)
        self.did("pages converted")

    def convert(self, pages: range, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES; any thread."""
        both = [area + page for area in (self.first, self.first + b.PAGES) for page in pages]
        with self.lock:
            for page in both:
                self.board.converting(page)
            attributes = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
            self.vm.set_memory_attributes(self.gpas[0] + pages[0] * b.PAGE, len(pages) * b.PAGE, attributes)
            for page in both:
                self.board.converted(page, private)

    def noise(self, choose: random.Random) -> None:
        """Attributes where nothing is, and another guest_memfd that comes and goes."""
        self.vm.set_memory_attributes(1 << 38, choose.randrange(1, 9) * b.PAGE, choose.choice((0, 8)))
        fd = self.vm.create_guest_memfd(SIZE)
        self.world.machine.kvm.backend.close(fd)
        self.did("other attributes and files")

    def close(self) -> None:
        """Close the guest_memfd."""
        self.world.machine.kvm.backend.close(self.fd)


class Private(Area):
    """The guest_memfd's memory. It comes right after `Shared`."""

    operations = ACCESSES
    weight = 3

    def __init__(self, world: World, index: int, shared: Shared) -> None:
        """Linear addresses of its own, if the guest chooses by them."""
        super().__init__(world, index)
        assert index == shared.index + 1
        self.shared = shared
        self.gpas = shared.gpas
        self.vas = (gpa_of(index),) * b.ADDRESSES
        if not world.guest_chooses:
            self.weight = 0
            return
        entry = PML4 + 0x2000 + 8 * (self.vas[0] >> 21)
        world.machine.quads(entry, self.gpas[0] | _HUGE | 1 << GPA_BIT)
        assert STRIDE >= SIZE

    @property
    def accessed(self) -> int:
        """Index of the area by which guests get at this memory."""
        return self.index if self.world.guest_chooses else self.shared.index

    def changes(self) -> list[tuple[int, Change]]:
        """Of the file."""
        return [(3, self.punch), (1, self.fail)]

    def punch(self, choose: random.Random) -> None:
        """A hole: the page is zero when it is next read."""
        page = self.page(choose)
        with self.losing(page):
            self.vm.discard_guest_memfd(self.shared.fd, page * b.PAGE, b.PAGE)
        self.did("hole punched")

    def fail(self, choose: random.Random) -> None:
        """The look-up of a page fails for a while: EHWPOISON."""
        page = self.page(choose)
        with self.failing(page):
            fail_page(self.shared.fd, page * b.PAGE, abi.EHWPOISON)
            fail_page(self.shared.fd, page * b.PAGE, 0)
        self.did("look-up failed and repaired")

    def read(self, page: int) -> bytes:
        """The file itself, by the raw system call: a guest_memfd refuses pread(2), the memfd it is does not."""
        data = ctypes.create_string_buffer(b.PAGE)
        offset = ctypes.c_long(page * b.PAGE)
        if _syscall(_SYS_PREAD64, self.shared.fd, data, ctypes.c_long(b.PAGE), offset) != b.PAGE:
            raise OSError(ctypes.get_errno(), "pread64")
        return data.raw
