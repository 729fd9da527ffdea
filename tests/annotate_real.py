"""The annotate layer against a real kernel: faults whose cause a userfaultfd has told, then the same as bare EFAULTs.

Each case runs twice. First a userfaultfd watches the pages that are to be refused, and is told by the kernel which it
needs first, and whether to write: the truth. Then the host refuses them, KVM_RUN fails with EFAULT and says nothing,
and the layer has to find the same page. To be run where /dev/kvm pages in two dimensions (`make oracle`). Behind the
modes' own cases come vector instructions (annotate_vectors.py), as many again.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import fcntl
import os
import random
import select
import signal
import struct
import sys
import threading
import time
from typing import Final

import anykvm
from annotate_bed import REFUSALS, Bed
from annotate_modes import ARENA_GPA, MODES, PAGE, SELECTORS, Mode
from annotate_vectors import CR4_OSXSAVE, VECTOR_MODES, place, saved, state, templates, xcrs
from anykvm import Intr
from anykvm.abi.structures import kvm_regs, kvm_sregs, kvm_vcpu_events
from anykvm.backends import Backend
from anykvm.host import libc
from anykvm.layers.annotate import Access, Cause

_SYS_USERFAULTFD: Final = 323
# _IOWR and _IOR of <linux/userfaultfd.h>, whose type byte is 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_UNREGISTER: Final = 0x8010AA01
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_CONTINUE: Final = 0xC020AA07
_FEATURE_WP, _FEATURE_MINOR_SHMEM, _FEATURE_WP_SHMEM = 1, 1 << 10, 1 << 12
_MODE_WP, _MODE_MINOR = 2, 4
_FLAG_WRITE, _FLAG_WP = 1, 2
_MESSAGE: Final = struct.Struct("<B7xQQQ")


class Watch:
    """A userfaultfd over the arena: reports the first armed page that is needed, and lets everything go on."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        self._ioctl(_UFFDIO_API, "<QQQ", 0xAA, _FEATURE_WP | _FEATURE_MINOR_SHMEM | _FEATURE_WP_SHMEM, 0)
        self._ioctl(_UFFDIO_REGISTER, "<QQQQ", bed.host, bed.size, _MODE_WP | _MODE_MINOR, 0)
        self.armed: dict[int, bool] = {}  # page -> only writes count
        self.first: tuple[int, bool] | None = None
        self._end, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake, b"x")
        self._thread.join()
        for fd in (self.fd, self._end, self._wake):
            os.close(fd)

    def arm(self, pages: dict[int, bool]) -> None:
        """Watch these pages, for writes only where True."""
        self.armed, self.first = pages, None
        for page, writes in pages.items():
            at = self.bed.host + page * PAGE
            libc.madvise(at, PAGE, libc.MADV_DONTNEED)
            if writes:
                self._continue(at)
                self._ioctl(_UFFDIO_WRITEPROTECT, "<QQQ", at, PAGE, 1)

    def disarm(self) -> None:
        for page in self.armed:
            self._ioctl(_UFFDIO_WRITEPROTECT, "<QQQ", self.bed.host + page * PAGE, PAGE, 0)
        self.armed = {}

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while all(fd != self._end for fd, _ in poll.poll()):
            try:
                _, flags, address, _ = _MESSAGE.unpack(os.read(self.fd, _MESSAGE.size))
            except BlockingIOError:
                continue
            self._answer(flags, address & -PAGE)

    def _answer(self, flags: int, at: int) -> None:
        page, write = (at - self.bed.host) // PAGE, bool(flags & _FLAG_WRITE)
        if self.first is None and page in self.armed and (write or not self.armed[page]):
            self.first = page, write
        if flags & _FLAG_WP:
            self._ioctl(_UFFDIO_WRITEPROTECT, "<QQQ", at, PAGE, 0)
        else:
            self._continue(at)

    def _continue(self, at: int) -> None:
        try:
            self._ioctl(_UFFDIO_CONTINUE, "<QQQq", at, PAGE, 0, 0)
        except FileExistsError:
            fcntl.ioctl(self.fd, 0x8010AA02, struct.pack("<QQ", at, PAGE))  # UFFDIO_WAKE

    def _ioctl(self, request: int, layout: str, *values: int) -> None:
        fcntl.ioctl(self.fd, request, bytearray(struct.pack(layout, *values)))


class RealBed(Bed):
    """The bed with cases that can be made again, and refusals that are noted before they are made."""

    def __init__(self, seed: int, mode: Mode, backend: Backend) -> None:
        super().__init__(seed, mode, backend)
        if mode.protected and not mode.long:
            # QEMU 10.0 ends ("invalid tss type") where a nested 32-bit guest enters ring 0 by its TSS.
            self.user, self.selectors = 0.0, tuple(selector for selector in SELECTORS if not selector & 3)
            self.templates = [(source, code) for source, code in self.templates if "iret" not in source]
        # QEMU's CPU asks for FLDENV's operand as for one to be written: no fact of KVM.
        self.templates = [(source, code) for source, code in self.templates if "fldenv" not in source]

    def case(self, seed: int) -> tuple[str, dict[int, str]]:
        """Make case ``seed``: its instruction, and which pages are to be refused, and how."""
        self.random = random.Random(seed)
        source = self.prepare()
        wanted: dict[int, str] = {}
        self.refuse = wanted.__setitem__  # type: ignore[method-assign, assignment]
        self.refused = []
        try:
            self.choose()
        finally:
            del self.refuse
        return source, wanted


class VectorBed(RealBed):
    """The same with vector instructions and XSAVE: operands alone are refused, and nothing is delivered."""

    def __init__(self, seed: int, mode: Mode, backend: Backend) -> None:
        super().__init__(seed, mode, backend)
        self.user = 0.0
        self.templates = templates(mode.bits)

    def prepare(self) -> str:
        source = super().prepare()
        self.vcpu.set_xcrs(xcrs())
        self.vcpu.set_xsave(state(self.random, bytes(self.vcpu.get_xsave())))
        if "xrstor" in source:
            at = self.vcpu.get_regs().rsi + self.vcpu.get_sregs().ds.base - self.mode.linear("source")
            self.put("source", at & 0xFFFFFFFF, saved(self.random))
        return source

    def registers(self, source: str, mnemonic: str, sregs: kvm_sregs, at: int) -> kvm_regs:
        regs = super().registers(source, mnemonic, sregs, at)
        sregs.cr4 |= CR4_OSXSAVE
        self.vcpu.set_sregs(sregs)
        place(self.random, mnemonic, regs)
        return regs

    def events(self) -> kvm_vcpu_events:
        return kvm_vcpu_events()

    def choose(self) -> None:
        pages = [self.page[area, number] for area in ("source", "target") for number in (0, 1)]
        for page in self.random.sample(pages, self.random.choice((1, 2, 3))):
            self.refuse(page, self.random.choice(REFUSALS))


def truths(bed: RealBed, count: int) -> dict[int, tuple[int, bool]]:
    """Which page each case needs first of those it will be refused, and whether to write."""
    found = {}
    watch = Watch(bed)
    try:
        for seed in range(count):
            _, wanted = bed.case(seed)
            watch.arm({page: how == "read-only" for page, how in wanted.items()})
            signal.setitimer(signal.ITIMER_REAL, 5)
            exit = bed.vcpu.run()
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(exit, Intr):
                raise SystemExit(f"{bed.mode.name}, case {seed} does not end")
            bed.complete(exit)
            if watch.first is not None:
                found[seed] = watch.first
            watch.disarm()
    finally:
        watch.close()
    return found


class Score:
    """What became of the cases."""

    def __init__(self) -> None:
        self.faults = self.ambiguous = self.quiet = 0
        self.unfound: list[str] = []
        self.wrong: list[str] = []
        self.access: list[str] = []
        self.roles: collections.Counter[str] = collections.Counter()

    def __str__(self) -> str:
        return (
            f"{self.faults} faults of {os.uname().release}, {len(self.wrong)} wrong, "
            f"{len(self.unfound)} without an explanation, {self.ambiguous} ambiguous, "
            f"{len(self.access)} with another kind of access, by role {dict(self.roles)}; "
            f"{self.quiet} runs did not fault"
        )


def explain(bed: RealBed, seed: int, truth: tuple[int, bool] | None, score: Score) -> None:
    """Run a case into its EFAULT, and compare."""
    source, wanted = bed.case(seed)
    for page, how in wanted.items():
        bed.refuse(page, how)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        end = bed.vcpu.run()
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        compare(bed, f"case {seed}, {source}", truth, getattr(error, "cause", None), score)
    else:
        score.quiet += 1
        if truth is not None and not isinstance(end, Intr):
            score.wrong.append(f"case {seed}, {source}: no EFAULT, though {truth} was needed")
        bed.restore()
        bed.complete(end)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        bed.restore()


def compare(bed: RealBed, name: str, truth: tuple[int, bool] | None, cause: object, score: Score) -> None:
    """Judge an explanation."""
    score.faults += 1
    if not isinstance(cause, Cause):
        score.unfound.append(f"{name}: needed {truth}, found nothing")
        return
    if truth is None:
        score.wrong.append(f"{name}: nothing was needed, found {cause.reason}")
        return
    page, write = truth
    score.roles[cause.role] += 1
    score.ambiguous += cause.ambiguous
    found = {suspect.page: suspect for suspect in (cause.candidates if cause.ambiguous else cause.candidates[:1])}
    suspect = found.get(ARENA_GPA + page * PAGE)
    if suspect is None:
        score.wrong.append(f"{name}: needed {ARENA_GPA + page * PAGE:#x} write {write}, found {cause.reason}")
    elif (suspect.access is Access.WRITE) != write:
        score.access.append(f"{name}: needed write {write}, found {cause.reason} [{cause.instruction}]")


def judge(name: str, bed: RealBed, count: int) -> int:
    """Run ``count`` cases and print the score; gives how many explanations were wrong, or 1 if nothing failed."""
    score, start = Score(), time.monotonic()
    known = truths(bed, count)
    for seed in range(count):
        explain(bed, seed, known.get(seed), score)
    print(f"{name}: {score}; {time.monotonic() - start:.1f} s", flush=True)
    print(*score.wrong[:20], *score.unfound[:20], *score.access[:3], sep="\n", flush=True)
    return len(score.wrong) + (not score.faults)


def main(count: int, modes: list[str]) -> int:
    """Run ``count`` cases, as many in each mode, and as many vector instructions; 0 if all explanations are right."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    wrong = 0
    backend = anykvm.backend("device")
    beds: tuple[tuple[type[RealBed] | type[VectorBed], str, list[str]], ...] = (
        (RealBed, "", modes),
        (VectorBed, ", vectors", [m for m in modes if m in VECTOR_MODES]),
    )
    for kind, name, wanted in beds:
        for mode in wanted:
            with kind(1, MODES[mode], backend) as bed:
                wrong += judge(mode + name, bed, -(-count // len(wanted)))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:] or list(MODES)))
