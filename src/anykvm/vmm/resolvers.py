"""Resolvers: what a VMM does about a memory fault before it runs the vCPU again.

``FileResolver`` is post-copy: the guest runs at once, and each page is brought from its source when the guest first
touches it. KVM_RUN ends with a memory fault that names the page; nothing of the instruction has happened, so running
again retries it.
"""

from __future__ import annotations

from errno import EFAULT
from os import preadv
from typing import Final

from anykvm.api import PAGE_SIZE, MemoryFault
from anykvm.vmm.lazy import LazyMemory

REPEATS: Final = 3
"""How many faults on a page that is there are taken for a race before the resolver gives up."""
_RUNS: Final = 30_000  # half of Linux's default vm.max_map_count, less what the process has anyway


class Unresolvable(Exception):
    """This fault cannot be resolved: its text is one line that says why."""


class SourceError(Exception):
    """The source of the pages cannot be read, or no longer has what it had: its text is one line that says what."""


class FileResolver:
    """Brings pages from a file into ``LazyMemory`` at ``gpa``, on the memory faults of one VM.

    A page is copied: once it is there, what happens to the file does not matter to the guest. Bytes behind the end of
    the file, in its last page, are zero. ``prefetch`` pages that follow the missing one and are not there either are
    brought with it, by the same read. (Without guard regions, files of more than 117 MiB have some prefetched always,
    to keep the number of mappings within Linux's limit.)
    """

    def __init__(self, fd: int, size: int, memory: LazyMemory, gpa: int, prefetch: int = 0) -> None:
        """Resolve faults on the ``size`` bytes of file ``fd``, which must stay open."""
        self.pages: Final = -(-size // PAGE_SIZE)
        """How many pages there are to bring."""
        self.present = 0
        """How many are there."""
        self._fd = fd
        self._size = size
        self._admit = memory.admit
        self._gpa = gpa
        # Each run of pages that are there is a mapping of its own where they are told apart by protection; a run begins
        # with as many pages as this or joins the next, so there are never more than _RUNS.
        self._most = max(prefetch + 1, 1 if memory.guards else -(-self.pages // _RUNS))
        self._there = bytearray(self.pages)  # one byte a page
        self._view = memory.view
        self._last_page = -1
        self._repeats = 0

    def resolve(self, fault: MemoryFault) -> int:
        """Bring the page of ``fault``, and those prefetched with it; returns how many.

        Zero means that the page was there already: another vCPU's fault brought it, or the fault is not about its
        absence at all; after ``REPEATS`` of these in a row on one page it is the latter.
        Raises Unresolvable for a fault outside of the memory, on private memory, of a poisoned page, or repeated;
        SourceError when the file has become shorter or cannot be read; OSError when the memory cannot be had.
        """
        page = (fault.gpa - self._gpa) // PAGE_SIZE
        if not 0 <= page < self.pages or fault.flags or fault.errno != EFAULT:
            raise Unresolvable(f"{fault!r} is not about a page of the file")
        there = self._there
        if there[page]:
            return self._again(page, fault)
        count = 1
        if self._most > 1:
            # Only a run of absent pages: a page that is there may have been written to by the guest.
            stop = there.find(1, page + 1, page + self._most)
            count = (stop if stop >= 0 else min(page + self._most, self.pages)) - page
        # The page becomes accessible before it is filled: a single vCPU, which waits for this, cannot see it so.
        offset = page * PAGE_SIZE
        end = min(offset + count * PAGE_SIZE, self._size)
        self._admit(offset, count * PAGE_SIZE)
        try:
            got = preadv(self._fd, (self._view[offset:end],), offset)
        except OSError as error:
            raise SourceError(error.strerror or str(error)) from None
        if got < end - offset:
            self._read_on(offset + got, end)
        if count == 1:
            there[page] = 1
        else:
            there[page : page + count] = b"\1" * count
        self.present += count
        return count

    def close(self) -> None:
        """Let go of the memory, which can then be closed."""
        self._view.release()

    def _read_on(self, offset: int, end: int) -> None:
        """Finish a read that was cut short: by the system, or because the file ends there now."""
        while offset < end:
            try:
                got = preadv(self._fd, (self._view[offset:end],), offset)
            except OSError as error:
                raise SourceError(error.strerror or str(error)) from None
            if not got:
                raise SourceError(f"it became shorter while the guest ran: no byte {offset:#x} any more")
            offset += got

    def _again(self, page: int, fault: MemoryFault) -> int:
        self._repeats = self._repeats + 1 if page == self._last_page else 1
        self._last_page = page
        if self._repeats > REPEATS:
            raise Unresolvable(f"{fault!r} came again {REPEATS} times though its page is there")
        return 0
