"""Post-copy: a guest computes the CRC-32 of a file in its memory, and every page of that memory arrives on demand.

The guest (``guests/crc32.S``) visits the pages in the order it is given and computes each page's CRC at that visit; no
page is there before the guest touches it, except those prefetched with another. Where things are:

====================  ==========================================================
gpa                   what
====================  ==========================================================
0x1000                descriptor table, then page tables (``modes.long_mode``)
0x10000               the guest's code; its stack ends at 0x20000
0x100000              1 MiB of tables the guest makes for itself
0x200000              the order of the pages; behind it, the CRC of each page
``FILE_GPA`` (4 GiB)  the file, page by page
====================  ==========================================================
"""

from __future__ import annotations

import os
import random
import stat
import zlib
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Final, Literal

from anykvm.api import PAGE_SIZE, GuestMemory, Hlt, Intr, Io, Kvm, MemoryFault, Mmio, Vcpu, Vm
from anykvm.backends.base import layers
from anykvm.host.closing import Closing
from anykvm.vmm.guests import guest
from anykvm.vmm.interrupts import raise_pending, watched
from anykvm.vmm.lazy import LazyMemory
from anykvm.vmm.modes import long_mode
from anykvm.vmm.resolvers import FileResolver, SourceError, Unresolvable

FILE_GPA: Final = 4 << 30
"""Where the guest finds the file."""
LARGEST: Final = 256 << 30
"""The longest file, in bytes."""
RESULT_PORT: Final = 0xF4
"""Where the guest sends its answer."""

_CODE, _STACK, _TABLES, _ORDER = 0x10000, 0x20000, 0x100000, 0x200000
_PROGRESS_NS: Final = 50_000_000
_CHUNK: Final = 1 << 20

Order = Literal["random", "sequential"]


class FileError(Exception):
    """The file cannot be used: its text is one line that says why."""

    def __init__(self, text: str, while_running: bool = False) -> None:
        """Take the text, and whether the guest was running already."""
        super().__init__(text)
        self.while_running = while_running


@dataclass
class Faults:
    """What was measured at each fault, in order."""

    page: array[int] = field(default_factory=lambda: array("Q"))
    """The page that was missing, counted from the start of the file."""
    time_ns: array[int] = field(default_factory=lambda: array("Q"))
    """When KVM_RUN returned with it, since the guest was started."""
    latency_ns: array[int] = field(default_factory=lambda: array("Q"))
    """From then until the VMM was ready to run the guest again."""


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    size: int
    """Bytes of the file."""
    pages: int
    order: Order
    prefetch: int
    seed: int
    backend: str
    profile: str
    layers: tuple[str, ...]
    """As ``anykvm.backends.base.layers``: with Annotate, KVM need not have named the pages itself."""
    guards: bool
    """Whether absent pages were guard regions, or else PROT_NONE."""
    crc_guest: int
    crc_zlib: int
    wall_ns: int
    """From the first KVM_RUN to the last."""
    faults: Faults

    @property
    def correct(self) -> bool:
        """Whether the guest and zlib agree."""
        return self.crc_guest == self.crc_zlib

    @property
    def handling_ns(self) -> int:
        """The VMM's part of ``wall_ns``: the sum of all latencies."""
        return sum(self.faults.latency_ns)

    @property
    def faults_per_second(self) -> float:
        """Faults by wall time, the guest's computing included."""
        return len(self.faults.page) * 1e9 / self.wall_ns if self.wall_ns else 0.0

    def latency_us(self, quantile: float) -> float | None:
        """Give a quantile (0 to 1) of the latencies in microseconds; None if there was no fault."""
        ordered = sorted(self.faults.latency_ns)
        return ordered[min(int(len(ordered) * quantile), len(ordered) - 1)] / 1e3 if ordered else None


class Source(Closing):
    """The file, open. A context manager."""

    def __init__(self, path: str) -> None:
        """Open it. Raises FileError for what is not a regular file that can be read, or is longer than ``LARGEST``."""
        try:
            # Without O_NONBLOCK, opening a FIFO would wait for its other end.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        self.path = path
        status = os.fstat(self.fd)
        self.size = status.st_size
        self._modified = status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileError(f"{path}: not a regular file")
        if self.size > LARGEST:
            self.close()
            raise FileError(f"{path}: longer than {LARGEST >> 30} GiB")

    @property
    def changed(self) -> bool:
        """Whether it was written to or cut since it was opened."""
        status = os.fstat(self.fd)
        return (status.st_size, status.st_mtime_ns) != (self.size, self._modified)

    def crc32(self) -> int:
        """Compute zlib's CRC of the bytes there were when it was opened. Raises FileError when some are gone."""
        crc = position = 0
        while position < self.size:
            try:
                data = os.pread(self.fd, min(_CHUNK, self.size - position), position)
            except OSError as error:
                raise FileError(f"{self.path}: {error.strerror}", while_running=True) from None
            if not data:
                raise FileError(f"{self.path}: it became shorter while the guest ran", while_running=True)
            crc, position = zlib.crc32(data, crc), position + len(data)
        return crc

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


def visiting_order(pages: int, order: Order, seed: int) -> array[int]:
    """Give the order in which the guest visits the pages: ascending, or shuffled by ``seed``.

    >>> list(visiting_order(3, "sequential", 0)), sorted(visiting_order(3, "random", 0))
    ([0, 1, 2], [0, 1, 2])
    """
    indices = array("I", range(pages))
    if order == "random":
        random.Random(seed).shuffle(indices)
    return indices


def run(
    kvm: Kvm,
    source: Source,
    order: Order = "random",
    prefetch: int = 0,
    seed: int = 0,
    progress: Callable[[int], object] = lambda present: None,
) -> Result:
    """Run the guest over the file. ``progress`` is called now and then with how many pages have arrived.

    Raises Unresolvable when a fault cannot be resolved or KVM does not report it as one (a bare EFAULT, an MMIO exit);
    FileError when the file becomes shorter or cannot be read; OSError when KVM fails otherwise; KeyboardInterrupt.
    """
    pages = -(-source.size // PAGE_SIZE)
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm())
        low = stack.enter_context(GuestMemory(_round(_ORDER + 8 * pages), shared=False))
        vm.map(low, 0)
        resolver = None
        guards = False
        if pages:
            memory = LazyMemory(pages * PAGE_SIZE)
            stack.enter_context(memory)
            vm.map(memory, FILE_GPA)
            resolver = FileResolver(source.fd, source.size, memory, FILE_GPA, prefetch)
            stack.callback(resolver.close)
            guards = memory.guards
        low.write(_CODE, guest("crc32"))
        low.write(_ORDER, visiting_order(pages, order, seed).tobytes())
        vcpu = _start(vm, low, source.size)
        faults = Faults()
        try:
            crc, wall = _drive(vcpu, resolver, faults, progress)
        except SourceError as error:
            raise FileError(f"{source.path}: {error}", while_running=True) from None
        return Result(
            size=source.size,
            pages=pages,
            order=order,
            prefetch=prefetch,
            seed=seed,
            backend=kvm.backend.name,
            profile=kvm.backend.profile,
            layers=layers(kvm.backend),
            guards=guards,
            crc_guest=crc,
            crc_zlib=source.crc32(),
            wall_ns=wall,
            faults=faults,
        )


def _round(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _start(vm: Vm, low: GuestMemory, size: int) -> Vcpu:
    vcpu = vm.create_vcpu()
    long_mode(vcpu, low, _CODE, _STACK, ((0, low.size), (FILE_GPA, size)))
    regs = vcpu.get_regs()
    regs.rdi, regs.rsi, regs.rdx = FILE_GPA, size, _ORDER
    regs.rcx, regs.r8 = _ORDER + 4 * -(-size // PAGE_SIZE), _TABLES
    vcpu.set_regs(regs)
    return vcpu


def _drive(
    vcpu: Vcpu, resolver: FileResolver | None, faults: Faults, progress: Callable[[int], object]
) -> tuple[int, int]:
    """Run the vCPU to its end, resolving faults; returns the guest's CRC and the time it took in ns."""
    crc = None
    pages, times, latencies = faults.page.append, faults.time_ns.append, faults.latency_ns.append
    with watched(vcpu):
        start = shown = perf_counter_ns()
        while True:
            exit = vcpu.run()
            came = perf_counter_ns()
            # First by type: this is the path that is measured in microseconds.
            if type(exit) is MemoryFault and resolver is not None:
                if resolver.resolve(exit):
                    pages((exit.gpa - FILE_GPA) // PAGE_SIZE)
                    times(came - start)
                    latencies(perf_counter_ns() - came)
                if came - shown > _PROGRESS_NS:
                    progress(resolver.present)
                    shown = came
                continue
            match exit:
                case Io(Io.OUT, port, size=4, data=data) if port == RESULT_PORT:
                    crc = int.from_bytes(data, "little")
                case Intr():
                    raise_pending()
                case Hlt() if crc is not None:
                    progress(resolver.present if resolver else 0)
                    return crc, came - start
                case Mmio(address) if address >= FILE_GPA:
                    raise Unresolvable(
                        f"this KVM reports the missing page at gpa {address:#x} as MMIO, not as a memory fault"
                    )
                case _:
                    raise Unresolvable(f"the guest ended with {exit!r}")
