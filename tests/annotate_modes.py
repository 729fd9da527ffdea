"""The modes of the annotate layer's test bed: where its areas are, and their page tables, descriptors and registers."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from random import Random

from anykvm.abi.structures import kvm_segment, kvm_sregs

PAGE = 4096
ARENA_GPA = 0x10000
AREAS = ("code", "halt", "source", "target", "base", "stack", "inner", "idt", "gdt", "tss")
VIRTUAL = 0x40000000
KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TSS, FRESH_DS, FRESH_CS, LDT = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x38, 0x40, 0x48
SELECTORS = (KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TSS, FRESH_DS, FRESH_CS, LDT, 0)
GATES = 256


@dataclass(frozen=True)
class Mode:
    """A mode of the processor, as the bed sets it up."""

    name: str
    bits: int
    """Of the code."""
    levels: int
    """Of page tables; 0 without paging."""
    long: bool = False
    protected: bool = True

    @property
    def stride(self) -> int:
        """Between areas, so that each has a page table of its own."""
        return 4 << 20 if self.levels == 2 else 2 << 20 if self.levels else 2 * PAGE

    def linear(self, area: str) -> int:
        """Where an area is."""
        return (VIRTUAL if self.levels else ARENA_GPA) + AREAS.index(area) * self.stride

    @property
    def top(self) -> int:
        """How many page tables are above those of the areas."""
        return max(self.levels - 1, 0)

    def tables(self, top: list[int], tables: dict[str, int], pages: dict[tuple[str, int], int]) -> dict[int, bytes]:
        """All page tables: entries by gpa. The arguments are gpas, ``top`` from the root down."""
        size, bits = (4, 10) if self.levels == 2 else (8, 9)
        found: dict[int, bytes] = {}

        def enter(table: int, level: int, linear: int, target: int, flags: int = 7) -> None:
            index = linear >> 12 + bits * level & (1 << bits) - 1
            found[table + index * size] = (target | flags).to_bytes(size, "little")

        for area in AREAS if self.levels else ():
            linear = self.linear(area)
            for depth, table in enumerate(top):
                below = top[depth + 1] if depth + 1 < len(top) else tables[area]
                flags = 1 if self.levels == 3 and depth == 0 else 7  # a PDPTE of PAE has no rights
                enter(table, self.levels - 1 - depth, linear, below, flags)
            for number in (0, 1):
                enter(tables[area], 0, linear + number * PAGE, pages[area, number])
        return found

    def gates(self, random: Random) -> bytes:
        """The interrupt descriptor table, or the vector table of real mode: every vector goes to a HLT."""
        halt = self.linear("halt")
        if not self.protected:
            return struct.pack("<HH", 0, halt >> 4) * GATES
        kind = 0xE if self.long or random.random() < 0.8 else 6
        found = b""
        for vector in range(GATES):
            low = halt & 0xFFFF | KERNEL_CS << 16 | (0xE0 | kind) << 40
            if kind == 0xE:
                low |= (halt >> 16 & 0xFFFF) << 48
            if self.long:
                low |= (1 if vector % 3 == 0 else 0) << 32
            found += struct.pack("<QQ", low, halt >> 32) if self.long else struct.pack("<Q", low)
        return found

    def descriptors(self) -> bytes:
        """The global descriptor table; FRESH_* have never been loaded, TSS and LDT are not used."""
        code = 0x00AF9B000000FFFF if self.long else 0x00CF9B000000FFFF
        data, accessed, user = 0x00CF93000000FFFF, 1 << 40, 3 << 45
        user_code = code if self.bits == 64 else 0x00CF9B000000FFFF
        plain = (0, code, data, data | user, user_code | user, 0x0000890060000067, 0)
        return struct.pack("<11Q", *plain, data & ~accessed, code & ~accessed, 0x00008200000000FF, 0)

    def tss(self, kind: int) -> bytes:
        """A task state segment: the stacks of the inner rings."""
        inner = self.linear("inner") + PAGE + 24
        if self.long:
            return struct.pack("<IQQQ8xQ", 0, inner, inner, inner, inner).ljust(0x68, b"\0")
        if kind == 3:
            return struct.pack("<HHH", 0, inner & 0xFFFF, KERNEL_DS).ljust(0x2C, b"\0")
        return struct.pack("<III", 0, inner, KERNEL_DS).ljust(0x68, b"\0")

    def sregs(self, state: kvm_sregs, random: Random, cpl: int, root: int, places: dict[str, int]) -> kvm_sregs:
        """All of the mode; ``places`` are the offsets of the tables in their areas."""
        sregs = kvm_sregs.from_buffer_copy(state)
        sregs.cs = self._segment(USER_CS if cpl else KERNEL_CS, 11, cpl, "code", random)
        data = self._segment(USER_DS if cpl else KERNEL_DS, 3, cpl, "source", random)
        sregs.ds = sregs.es = data
        sregs.ss = self._segment(data.selector, 3, cpl, "stack", random)
        for name in ("fs", "gs"):
            segment = self._segment(data.selector, 3, cpl, "source", random)
            segment.base += 0x20 if name == "fs" else 0x1000
            setattr(sregs, name, segment)
        kind = places["tss kind"]
        sregs.tr = kvm_segment(base=self.linear("tss") + places["tss"], limit=0x67, selector=TSS, type=kind, present=1)
        sregs.gdt.base, sregs.gdt.limit = self.linear("gdt") + places["gdt"], 0x57
        sregs.idt.base, sregs.idt.limit = self.linear("idt") + places["idt"], 0xFFF
        sregs.cr0 = 0x80010033 if self.levels else 0x33 if self.protected else 0x32
        sregs.cr3, sregs.cr4, sregs.efer = root, 0x600, 0
        if self.levels > 2:
            sregs.cr4, sregs.efer = 0x620, 0x801
        if self.long:
            sregs.efer = 0xD01
        return sregs

    def _segment(self, selector: int, type: int, cpl: int, area: str, random: Random) -> kvm_segment:
        base, limit, large = 0, 0xFFFFFFFF, 1
        if self.bits == 16:
            # The pages of the areas from this one's on are within 64 KiB; a stack has a page below it.
            base, limit, large = self.linear(area) - (2 * PAGE if area == "stack" else 0), 0xFFFF, 0
        elif self.bits == 32 and random.random() < 0.3:
            base = random.choice((0x1000, 0x12345000, 0xFFFF0000))
        if not self.protected:
            selector = base >> 4
        segment = kvm_segment(base=base, limit=limit, selector=selector, type=type, present=1, dpl=cpl, s=1, g=large)
        segment.l = int(self.bits == 64 and type == 11)
        segment.db = int(self.bits == 32 or (self.bits == 64 and type != 11))
        return segment


MODES = {
    mode.name: mode
    for mode in (
        Mode("long", 64, 4, long=True),
        Mode("compatibility", 32, 4, long=True),
        Mode("pae", 32, 3),
        Mode("32-bit", 32, 2),
        Mode("unpaged", 32, 0),
        Mode("segmented", 16, 0),
        Mode("real", 16, 0, protected=False),
    )
}
