"""The world a sequence acts in: a machine, host memory at addresses of its own, files, and what was last seen.

Everything lies at fixed addresses far below those that mmap(2) chooses by itself, so that a range that a sequence
unmaps stays unmapped: what something else put there would be the guest's to find.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi.structures import kvm_cpuid_entry2
from anykvm.api.dirty_ring import DirtyRing
from anykvm.api.vm import Vm
from anykvm.backends.soft.cpuid import supported_cpuid
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, Host, memfd
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab
from anykvm.host import libc
from anykvm.host.libc import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, PROT_NONE

ARENA: Final = 0x100000000000
"""Where the first buffer lies."""
STRIDE: Final = 0x10000000
"""From one buffer to the next."""
BUFFERS: Final = 4
"""Buffers: 0 and 1 private memory, 2 a file's, 3 a guest_memfd's once a step maps it there."""
FILE_BUFFER: Final = 2
GMEM_BUFFER: Final = 3
PAGES: Final = 16
"""Pages of a buffer; behind them is inaccessible memory."""
WRITTEN: Final = 3
"""Pages of a buffer that the host has written when the sequence begins."""
GUARD_PAGES: Final = 512
PAGE_TABLE: Final = 0x60000
"""In slot 0: the page table of the 2 MiB around ``layout.TEST``."""
FREE: Final = 0x80000
"""In slot 0, from here on: nothing but HLT for some pages, so that a guest that got there stops."""
HALTS: Final = b"\xf4" * (4 * PAGE)
LOW: Final = bytes.fromhex("f4f4b170") * 256 + b"\xf4" * (3 * PAGE // 4)
"""The first page: as code it halts at once; as real mode's interrupt table every entry leads to ``FREE``."""
NO_DESCRIPTOR: Final = 0x7FFF
"""Never open."""
RING_BYTES: Final = 4096
"""Of the dirty ring of a machine with one."""


class World:
    """What the steps of one sequence share."""

    def __init__(self, lab: Lab, setup: str) -> None:
        """Make it; ``setup``: ``plain``, ``manual`` (logs that only KVM_CLEAR_DIRTY_LOG clears), ``initially_set`` (and
        begin full) or ``ring`` (dirty rings)."""
        self.lab = lab
        self.setup = setup
        self.at = "begin"
        """What the record of the step now performed is called."""
        # The same processor everywhere, or every reserved bit would be a difference.
        self.m = Machine(lab.backend, lab.signals, self._keep, cpuid=common_cpuid(), prepare=self._enable)
        self.buffers = [Host(ARENA + STRIDE * number, PAGES * PAGE) for number in range(BUFFERS)]
        for buffer in self.buffers:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
            libc.mmap(buffer.address, GUARD_PAGES * PAGE, PROT_NONE, flags)
            buffer.fix()
        self.file = memfd(PAGES * PAGE)
        self.buffers[FILE_BUFFER].map_file(self.file)
        for number, buffer in enumerate(self.buffers[:GMEM_BUFFER]):
            for page in range(WRITTEN):
                buffer.put64(page * PAGE, FREE + PAGE * number + page)
        layout.map_small_pages(self.m.memory, layout.TEST, PAGE_TABLE, Host(self.m.memory.address + PAGE_TABLE, PAGE))
        for address, data in ((0, LOW), (layout.CODE, HALTS), (FREE, HALTS)):
            self.m.memory.put(address, data)  # where a guest may get to that jumps to what it has read
        self.m.registers()
        self.gmems: list[int] = []
        self.ring = DirtyRing(self.m.vcpu) if setup == "ring" else None

    def begin(self, number: int, op: str) -> None:
        """Name the records from now on."""
        self.at = f"{number}.{op}"

    def note(self, **seen: Any) -> None:
        """Record what a step saw."""
        self.lab.record(self.at, **seen)

    def _keep(self, step: str, **fields: Any) -> None:
        self.lab.record(f"{self.at}.{step}", **fields)

    def _enable(self, vm: Vm) -> None:
        enable, full = c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, c.KVM_DIRTY_LOG_INITIALLY_SET
        if self.setup in ("manual", "initially_set"):
            vm.enable_cap(c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, enable | (full if self.setup == "initially_set" else 0))
        elif self.setup == "ring":
            vm.enable_dirty_ring(RING_BYTES)

    def gmem(self, index: int) -> int:
        """Give the descriptor of the guest_memfd a step made, one that is not open if it made none."""
        return self.gmems[index] if 0 <= index < len(self.gmems) else NO_DESCRIPTOR

    def close_gmem(self, index: int) -> int:
        """Close one."""
        fd = self.gmem(index)
        if fd != NO_DESCRIPTOR:
            self.gmems[index] = NO_DESCRIPTOR
        os.close(fd)
        return 0

    def address(self, buffer: int, page: int) -> int:
        """Give the host address of a page of a buffer; a negative buffer: the page is the address."""
        return page if buffer < 0 else self.buffers[buffer].address + page * PAGE

    def memory(self) -> dict[str, str]:
        """Say what the host sees in each buffer: of each page with anything in it, what is not zero."""
        return {f"b{number}": " ".join(_pages(buffer)) for number, buffer in enumerate(self.buffers)}


def common_cpuid() -> list[kvm_cpuid_entry2]:
    """Give the CPUID of the guest: the soft backend's processor, which KVM with any other can play."""
    return supported_cpuid()


def _pages(buffer: Host) -> Iterable[str]:
    with contextlib.suppress(OSError):
        if not buffer.get(0, PAGES * PAGE).strip(b"\0"):
            return
    for page in range(PAGES):
        try:
            data = buffer.get(page * PAGE, PAGE)
        except OSError as error:
            yield f"{page}:errno{error.errno}"
            continue
        if data.strip(b"\0"):
            yield f"{page}:{_bytes(data)}"


def _bytes(page: bytes) -> str:
    """Show what is not zero in a page, as offset=bytes."""
    shown: list[str] = []
    at = 0
    while at < PAGE:
        rest = page[at:].lstrip(b"\0")
        at = PAGE - len(rest)
        if not rest:
            break
        end = page.find(b"\0\0", at)
        end = PAGE if end < 0 else end
        shown.append(f"{at:x}={page[at:end].hex()}")
        at = end
    return ",".join(shown)
