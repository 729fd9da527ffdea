"""The test bed of the annotate layer: random instructions over random pages that the host refuses in random ways.

The soft backend knows what it met (``struct ak_exit`` stays readable), also under the profile that tells nobody. So one
VM gives both: the truth, and the EFAULT that the layer has to explain. Every mode of the processor has a VM of its own.
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
import random
import sys
from types import TracebackType
from typing import Self

import anykvm
from annotate_cases import templates
from annotate_modes import AREAS, ARENA_GPA, MODES, PAGE, SELECTORS, Mode
from anykvm.abi.constants import KVM_VCPUEVENT_VALID_SHADOW
from anykvm.abi.structures import kvm_regs, kvm_sregs, kvm_vcpu_events
from anykvm.backends import Backend
from anykvm.backends.soft import native
from anykvm.backends.soft.files import FILES
from anykvm.host import libc
from anykvm.layers.annotate import Access, Annotate, Cause

KINDS = {0: Access.READ, 1: Access.WRITE, 2: Access.EXEC}
REFUSALS = ("none", "read-only", "unmapped", "beyond")
ALIGNED = ("movaps", "fxsave", "fxrstor", "addps", "paddd", "movntdq", "xorps", "pshufd", "cmpxchg16b")
RING0 = ("lgdt", "lgdtl", "lidt", "lidtl", "invlpg", "hlt", "pause;", "ltr", "lldt")


class Result:
    """How many faults there were, and how the layer did."""

    def __init__(self) -> None:
        self.faults = self.ambiguous = self.skipped = 0
        self.wrong: list[str] = []
        self.roles: collections.Counter[str] = collections.Counter()
        self.sources: collections.Counter[str] = collections.Counter()

    def __str__(self) -> str:
        share = 100 * self.ambiguous / max(1, self.faults)
        return (
            f"{self.faults} faults, {len(self.wrong)} wrong, {self.ambiguous} ambiguous ({share:.1f} %), "
            f"{len(self.sources)} instructions, by role {dict(self.roles)}; {self.skipped} runs did not fault"
        )


class Bed:
    """One VM in one mode whose every page can be refused by the host."""

    def __init__(self, seed: int, mode: Mode, backend: Backend | None = None) -> None:
        self.random = random.Random(seed)
        self.mode = mode
        self.layer = Annotate(backend or anykvm.backend("soft", "linux-7.3"))
        self.kvm = anykvm.open(self.layer)
        self.vm = self.kvm.create_vm()
        self.file = os.memfd_create("ram")
        pages = 4 * len(AREAS) + 8
        self.size = pages * PAGE
        os.ftruncate(self.file, self.size)
        self.host = libc.mmap(0, self.size, 3, libc.MAP_SHARED, self.file)
        self.short = os.memfd_create("short")  # an empty file: every page of it is beyond the end
        self.vm.set_user_memory_region(3, ARENA_GPA, self.size, self.host)
        self.view = mmap.mmap(self.file, self.size)
        order = list(range(pages))
        if mode.levels:
            self.random.shuffle(order)
        self.page = {(name, n): order.pop(0) for name in AREAS for n in (0, 1)}
        self.table = {name: order.pop() for name in AREAS} if mode.levels else {}
        self.top = [order.pop() for _ in range(mode.top)]
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.kvm.get_supported_cpuid())
        self.templates = templates(mode.bits)
        self.selectors: tuple[int, ...] = SELECTORS
        self.user = 0.25 if mode.protected else 0.0
        """How likely a case is in ring 3."""
        self.state = self.vcpu.get_sregs()
        self.refused: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kvm.close()
        self.view.close()
        libc.munmap(self.host, self.size)
        os.close(self.file)
        os.close(self.short)

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Write into an area, over its page boundary if need be."""
        while data:
            page, within = divmod(offset, PAGE)
            if page > 1:
                return
            piece = data[: PAGE - within]
            start = self.page[name, page] * PAGE + within
            self.view[start : start + len(piece)] = piece
            offset, data = offset + len(piece), data[len(piece) :]

    def fill(self, pattern: bytes, places: dict[str, int]) -> None:
        """Pages full of a pattern, the page tables, and the descriptor tables."""
        self.view[:] = pattern * (self.size // len(pattern))
        for name in ("code", "halt"):  # wherever the instruction goes, it ends
            self.put(name, 0, b"\xf4" * 2 * PAGE)
        self.put("idt", places["idt"], self.mode.gates(self.random))
        self.put("gdt", places["gdt"], self.mode.descriptors())
        self.put("tss", places["tss"], self.mode.tss(places["tss kind"]))
        gpas = {area: ARENA_GPA + page * PAGE for area, page in self.table.items()}
        pages = {key: ARENA_GPA + page * PAGE for key, page in self.page.items()}
        for page in (*self.table.values(), *self.top):
            self.view[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        tables = self.mode.tables([ARENA_GPA + page * PAGE for page in self.top], gpas, pages)
        for at, entry in tables.items():
            self.view[at - ARENA_GPA : at - ARENA_GPA + len(entry)] = entry

    def places(self) -> dict[str, int]:
        """Where in their areas the processor's tables are: around the boundary of the pages."""
        r = self.random
        size = 16 if self.mode.long else 8 if self.mode.protected else 4
        return {
            "idt": PAGE - 8 * size + r.choice((0, 0, size // 2, -size)),
            "gdt": PAGE - 8 * r.choice((0, 1, 2, 2, 3, 5, 8)),
            "tss": r.choice((PAGE - 8, PAGE - 8, PAGE - 6, PAGE - 0x28, 0x100)),
            "tss kind": 3 if not self.mode.long and r.random() < 0.15 else 11,
        }

    def pattern(self, source: str, code_base: int) -> bytes:
        """What fills memory: pointers to a HLT; for far transfers with a selector behind each."""
        r = self.random
        size = self.mode.bits // 8
        pointer = (self.mode.linear("halt") - code_base & (1 << self.mode.bits) - 1).to_bytes(size, "little")
        far = "ret" in source or source.startswith("l") or "%fs" in source or "%gs" in source or "%ds" in source
        if not far or r.random() < 0.3:
            return pointer * (8 // size)
        selector = r.choice(self.selectors)
        item = size if size > 2 or r.random() < 0.5 else 4
        pair = pointer.ljust(item, b"\0") + selector.to_bytes(item, "little")
        return pair * (16 // len(pair))

    def offset(self) -> int:
        """Where in an area an operand is: anywhere, or at the boundary of its pages."""
        roll = self.random.random()
        if roll < 0.4:
            return PAGE - self.random.randrange(0, 20)
        if roll < 0.7:
            return self.random.randrange(0, PAGE, 16)
        return self.random.randrange(64, PAGE)

    def refuse(self, page: int, how: str) -> None:
        """Let the host refuse a page of the arena."""
        at = self.host + page * PAGE
        if how == "unmapped":
            libc.munmap(at, PAGE)
        elif how == "beyond":
            libc.mmap(at, PAGE, 3, libc.MAP_SHARED | libc.MAP_FIXED, self.short)
        else:
            libc.mprotect(at, PAGE, 1 if how == "read-only" else 0)
        self.refused.append(page)

    def restore(self) -> None:
        """Give every page back."""
        for page in self.refused:
            libc.mmap(self.host + page * PAGE, PAGE, 3, libc.MAP_SHARED | libc.MAP_FIXED, self.file, page * PAGE)
        self.refused.clear()

    def prepare(self) -> str:
        """Make a case: an instruction, its operands, and what is being delivered."""
        r = self.random
        source, code = r.choice(self.templates)
        mnemonic = source.split()[0]
        cpl = 3 if mnemonic not in RING0 and r.random() < self.user else 0
        places = self.places()
        root = ARENA_GPA + self.top[0] * PAGE if self.top else 0
        sregs = self.mode.sregs(self.state, r, cpl, root, places)
        self.fill(self.pattern(source, sregs.cs.base), places)
        at = self.offset() if r.random() < 0.3 else 256
        at = min(at, 2 * PAGE - 32)
        self.put("code", at, code + b"\xf4")
        self.vcpu.set_sregs(sregs)
        regs, events = self.registers(source, mnemonic, sregs, at), self.events()
        regs.rflags |= 0x200 if events.interrupt.injected else 0
        self.vcpu.set_regs(regs)
        self.vcpu.set_vcpu_events(events)
        return source

    def registers(self, source: str, mnemonic: str, sregs: kvm_sregs, at: int) -> kvm_regs:
        """Make operands that lie in their areas."""
        r = self.random
        mask = (1 << self.mode.bits) - 1
        align = 16 if r.random() < 0.3 or any(name in source for name in ALIGNED) else 1
        regs = kvm_regs(rip=self.mode.linear("code") + at - sregs.cs.base & mask)
        regs.rflags = 2 | (0x400 if r.random() < 0.2 else 0) | (0x800 if mnemonic == "into" else 0)
        for register, area in (("rsi", "source"), ("rdi", "target"), ("rsp", "stack"), ("rbx", "base")):
            segment = sregs.ss if area == "stack" else sregs.ds
            value = self.mode.linear(area) + self.offset() // align * align - segment.base
            setattr(regs, register, value & mask)
        regs.rbp = self.mode.linear("stack") + self.offset() - sregs.ss.base & mask
        regs.rcx = r.choice((0, 1, 2, 5)) if "rep" in source else r.randrange(0, 8)
        regs.rax = r.choice((0, 1, 77, 200, -9)) & mask
        regs.rdx = self.mode.linear("halt") + self.offset() - sregs.cs.base & mask
        if "%dx" in source.replace("*%dx", "") or "%edx, %" in source:
            regs.rdx = r.choice(self.selectors)
        if "xlat" in source:
            regs.rax = 5
        if "cr3" in source:
            regs.rax = sregs.cr3
        regs.r14 = 0x7000000000
        return regs

    def events(self) -> kvm_vcpu_events:
        """What is being delivered: in most cases nothing."""
        r = self.random
        events = kvm_vcpu_events(flags=KVM_VCPUEVENT_VALID_SHADOW)
        roll = r.random()
        if roll < 0.03:
            events.exception.injected = 1
            events.exception.nr = r.choice((0, 6, 13, 14))
            events.exception.has_error_code = int(events.exception.nr > 10 and self.mode.protected)
            events.exception.error_code = 2 if events.exception.nr == 14 else 0
        elif roll < 0.06:
            events.interrupt.injected, events.interrupt.nr = 1, r.randrange(32, 256)
        elif roll < 0.07:
            events.nmi.pending = 1
        return events

    def choose(self) -> None:
        """Refuse some pages."""
        r = self.random
        tables = [*self.table.values(), *self.top]
        if tables and r.random() < 0.1:
            self.refuse(r.choice(tables), r.choice(REFUSALS))
            if r.random() < 0.7:
                return
        for page in r.sample(list(self.page.values()), r.choice((2, 4, 7))):
            if page not in self.refused:
                self.refuse(page, r.choice(REFUSALS))

    def once(self, result: Result) -> None:
        """Run one case and compare."""
        source = self.prepare()
        self.choose()
        try:
            end = self.vcpu.run()
        except OSError as error:
            if error.errno == errno.EFAULT:
                self._compare(source, getattr(error, "cause", None), result)
                return
            raise
        finally:
            self.restore()
        result.skipped += 1
        self.complete(end)

    def complete(self, end: anykvm.Exit) -> None:
        """Complete the instruction of a device access, so that the next run does not begin with that."""
        self.vcpu.immediate_exit = True
        while not isinstance(end, anykvm.Intr):
            end = self.vcpu.run()
        self.vcpu.immediate_exit = False

    def truth(self) -> native.Exit:
        """What the engine met."""
        met: native.Exit = native.Vcpu.from_address(int(FILES.get(self.vcpu.fileno()))).exit  # type: ignore[call-overload]
        return met

    def _compare(self, source: str, cause: Cause | None, result: Result) -> None:
        truth = self.truth()
        result.faults += 1
        result.sources[source] += 1
        wanted = (truth.gpa & -PAGE, KINDS[truth.access])
        name = f"{self.mode.name}, {source}: truth {wanted[0]:#x} {wanted[1].value} hva {truth.hva:#x}"
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        state = f"cpl {sregs.cs.dpl} rip {regs.rip:#x} rsp {regs.rsp:#x} rsi {regs.rsi:#x} rdi {regs.rdi:#x}"
        if cause is None:
            result.wrong.append(f"{name}, nothing found; {state}")
            return
        result.roles[cause.role] += 1
        found = [(suspect.page, suspect.access) for suspect in cause.candidates]
        if cause.ambiguous:
            result.ambiguous += 1
        if (wanted not in found) if cause.ambiguous else (wanted != found[0]):
            result.wrong.append(f"{name}, found {cause.reason} [{cause.instruction}] {state}")


def run(count: int, seed: int, mode: str = "long") -> Result:
    """Make ``count`` faults in a mode."""
    result = Result()
    with Bed(seed, MODES[mode]) as bed:
        while result.faults < count:
            bed.once(result)
    return result


def main(count: int, modes: list[str]) -> int:
    """Make ``count`` faults, as many in each mode, then run all generated opcodes; 0 if all explanations are right."""
    import annotate_fuzz  # which is built on this module

    wrong = 0
    for mode in modes:
        outcome = run(-(-count // len(modes)), 1, mode)
        print(f"{mode}: {outcome}", *outcome.wrong[:20], sep="\n", flush=True)
        wrong += len(outcome.wrong)
    for mode in modes:
        outcome = annotate_fuzz.run(0, 1, mode)
        print(f"{mode}, opcodes: {outcome}", *outcome.wrong[:20], sep="\n", flush=True)
        wrong += len(outcome.wrong)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:] or list(MODES)))
