"""Areas whose host mapping changes while their slots stay: anonymous memory, code, a file, a userfaultfd's."""

from __future__ import annotations

import ctypes
import os
import random
import select
import struct
import threading
from typing import TYPE_CHECKING

from anykvm.abi import KVM_MEM_LOG_DIRTY_PAGES
from anykvm.conformance.host import READ_WRITE, Host
from anykvm.conformance.uffd import Userfaultfd
from anykvm.host import libc
from stress import board as b
from stress.area import SIZE, Area, Change, anonymous, gpa_of, reserve

if TYPE_CHECKING:
    from stress.world import World

ACCESSES = {
    "read_vmm": 2,
    "read_aligned": 3,
    "read_unaligned": 1,
    "write_aligned": 3,
    "write_unaligned": 1,
    "exchange": 1,
    "compare_exchange": 1,
    "write_across": 2,
    "read_across": 2,
}
_FREE = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS


class Anonymous(Area):
    """Two slots over the same memory; the second comes and goes."""

    operations = ACCESSES
    weight = 4

    def __init__(self, world: World, index: int) -> None:
        """Map it twice."""
        super().__init__(world, index)
        self.host = anonymous(index)
        self.gpas = self.vas = (gpa_of(index), gpa_of(index, 1)) * 2
        self.vm.map(self.host, self.gpas[0])
        self.alias = self.vm.map(self.host, self.gpas[1])

    def changes(self) -> list[tuple[int, Change]]:
        """All that mmap(2) and its kin can do to it."""
        return [
            (4, self.store),
            (4, self.replace),
            (4, self.protect),
            (3, self.discard),
            (2, self.fresh),
            (2, self.hole),
            (1, self.slot),
        ]

    def fresh(self, choose: random.Random) -> None:
        """A zeroed page is mapped over the old one, in one step."""
        page = self.page(choose)
        with self.losing(page):
            libc.mmap(self.host.address + page * b.PAGE, b.PAGE, READ_WRITE, _FREE | libc.MAP_FIXED)
        self.did("mmap over")

    def hole(self, choose: random.Random) -> None:
        """Pages are unmapped; later there are others."""
        page = self.page(choose)
        count = choose.randrange(1, min(4, b.PAGES - page) + 1)
        pages = range(page, page + count)
        with self.failing(*pages), self.losing(*pages):
            self.host.unmap(page * b.PAGE, count * b.PAGE)
            at = self.host.address + page * b.PAGE
            libc.mmap(at, count * b.PAGE, READ_WRITE, _FREE | libc.MAP_FIXED_NOREPLACE)
        self.did("munmap and mmap")

    def slot(self, choose: random.Random) -> None:
        """The second slot goes and comes back."""
        self.slot_changes((1, 3))
        self.vm.unmap(self.alias)
        self.vm.map(self.host, self.gpas[1], self.alias)
        self.slot_present((1, 3))
        self.did("second slot deleted and created")


class Code(Area):
    """Pages that guests call: functions that the VMM rewrites and replaces. Dirty logging is switched on and off."""

    operations = {"fetch": 6, "read_vmm": 2, "read_aligned": 2, "write_aligned": 3, "write_unaligned": 3}

    def __init__(self, world: World, index: int) -> None:
        """One slot."""
        super().__init__(world, index)
        self.host = anonymous(index)
        self.slot = self.vm.map(self.host, self.gpas[0])
        self.logged = False

    def changes(self) -> list[tuple[int, Change]]:
        """Changes after which there is still a function."""
        return [(6, self.store), (3, self.replace), (3, self.protect), (1, self.toggle)]

    def toggle(self, choose: random.Random) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES."""
        self.logged = not self.logged
        flags = KVM_MEM_LOG_DIRTY_PAGES if self.logged else 0
        self.vm.set_user_memory_region(self.slot, self.gpas[0], SIZE, self.host.address, flags)
        self.did("dirty logging on or off")


class File(Area):
    """A shared mapping of a file that shrinks, grows and gets holes; the VMM writes by another mapping."""

    operations = ACCESSES

    def __init__(self, world: World, index: int) -> None:
        """One slot."""
        super().__init__(world, index)
        self.fd = os.memfd_create("stress")
        os.ftruncate(self.fd, SIZE)
        fixed = libc.MAP_SHARED | libc.MAP_FIXED_NOREPLACE
        self.host = Host(libc.mmap(reserve(index), SIZE, READ_WRITE, fixed, self.fd), SIZE)
        self.mine = Host(libc.mmap(0, SIZE, READ_WRITE, libc.MAP_SHARED, self.fd), SIZE)
        self.vm.map(self.host, self.gpas[0])

    def changes(self) -> list[tuple[int, Change]]:
        """Of the file, and of its mapping."""
        return [
            (4, self.store),
            (3, self.protect),
            (2, self.punch),
            (1, self.truncate),
            (2, self.forget),
            (2, self.again),
        ]

    def store(self, choose: random.Random) -> None:
        """The VMM writes the file by its own mapping."""
        page = self.page(choose)
        self.store_at(self.mine.address + page * b.PAGE, page)
        self.did("VMM store")

    def punch(self, choose: random.Random) -> None:
        """A hole in the file: zeros."""
        page = self.page(choose)
        with self.losing(page):
            libc.fallocate(self.fd, libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE, page * b.PAGE, b.PAGE)
        self.did("hole punched")

    def truncate(self, choose: random.Random) -> None:
        """The file's end goes, and comes back as zeros; between them an access is beyond it."""
        page = self.page(choose)
        pages = range(page, b.PAGES)
        with self.failing(*pages), self.losing(*pages):
            os.ftruncate(self.fd, page * b.PAGE)
            os.ftruncate(self.fd, SIZE)
        self.did("file truncated and extended")

    def forget(self, choose: random.Random) -> None:
        """MADV_DONTNEED of a shared mapping: the file keeps its contents."""
        page = self.page(choose)
        self.host.advise(libc.MADV_DONTNEED, page * b.PAGE, b.PAGE)
        self.did("MADV_DONTNEED")

    def again(self, choose: random.Random) -> None:
        """The same page of the file is mapped anew."""
        page = self.page(choose)
        at, flags = self.host.address + page * b.PAGE, libc.MAP_SHARED | libc.MAP_FIXED
        libc.mmap(at, b.PAGE, READ_WRITE, flags, self.fd, page * b.PAGE)
        self.did("mmap over")

    def close(self) -> None:
        """Close the file and unmap it."""
        self.mine.unmap()
        os.close(self.fd)


class Userfault(Area):
    """Memory that a handler thread puts into place, page by page, each with the VMM's next number."""

    operations = ACCESSES
    weight = 1

    def __init__(self, world: World, index: int) -> None:
        """One slot. Raises OSError where there is no userfaultfd for us."""
        super().__init__(world, index)
        self.host = Host(libc.mmap(reserve(index), SIZE, READ_WRITE, _FREE | libc.MAP_FIXED_NOREPLACE), SIZE)
        try:
            self.faults = Userfaultfd(self.host)
        except OSError:
            self.host.unmap()
            raise
        self.vm.map(self.host, self.gpas[0])
        self.stop, self._wake = os.pipe()
        self.thread = threading.Thread(target=world.guarded, args=(self.serve,))

    def start(self) -> None:
        """Start the handler, which serves until `close`: also whoever looks at the memory at the end."""
        self.thread.start()

    def read(self, page: int) -> bytes:
        """A page as it is in memory; a plain access, as an ordinary user's handler is not asked for the kernel's."""
        data = ctypes.create_string_buffer(b.PAGE)
        ctypes.memmove(data, self.host.address + page * b.PAGE, b.PAGE)  # without the GIL, which the handler needs
        return data.raw

    def changes(self) -> list[tuple[int, Change]]:
        """Pages are taken away."""
        return [(1, self.discard)]

    def serve(self) -> None:
        """The handler."""
        poll = select.poll()
        poll.register(self.faults.fd, select.POLLIN)
        poll.register(self.stop, select.POLLIN)
        while True:
            if any(fd == self.stop for fd, _ in poll.poll()):
                return
            for message in self.faults.pending():
                self.resolve(message["off"] // b.PAGE)

    def resolve(self, page: int) -> None:
        """Copy a page there; another vCPU's fault may have been first."""
        loss = self.board.loss(self.first + page)
        number = self.board.intend(self.first + page)
        data = bytearray(b.PAGE)
        struct.pack_into("<I", data, b.AT_VMM, number)
        try:
            self.faults.copy(page * b.PAGE, bytes(data))
        except FileExistsError:
            return
        self.board.publish(self.first + page, number, loss)
        self.did("page copied")

    def close(self) -> None:
        """End the handler."""
        os.write(self._wake, b"x")
        if self.thread.ident is not None:
            self.thread.join()
        for fd in (self.stop, self._wake, self.faults.fd):
            os.close(fd)
