"""The modes a case is executed in: descriptors, page tables, special registers. Memory below 128 KiB is theirs; it is
written anew before each case."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from anykvm.abi.structures import kvm_segment, kvm_sregs

SIZE = 4 << 20
IMAGE = 0x20000
HANDLER, GDT, IDT, TSS, LDT, PML4, CODE = 0x900, 0x1000, 0x2000, 0x4000, 0x4800, 0x5000, 0x9000
STACK, DATA = 0xF000, 0x60000
USER = 3
TABLES = 4


@dataclass(frozen=True)
class Mode:
    """A mode of the processor."""

    name: str
    bits: int
    """Of the code segment."""
    cpl: int = 0
    long: bool = False
    protected: bool = True
    virtual: bool = False
    """Virtual 8086 mode."""

    @property
    def flags(self) -> int:
        """Bits of RFLAGS that belong to the mode."""
        return 2 | (1 << 17 | 3 << 12 if self.virtual else 0)


MODES = (
    Mode("long0", 64, long=True),
    Mode("long3", 64, USER, long=True),
    Mode("compat3", 32, USER, long=True),
    Mode("prot0", 32),
    Mode("prot3", 32, USER),
    Mode("prot16", 16),
    Mode("real", 16, protected=False),
    Mode("v86", 16, USER, virtual=True),
)
BY_NAME = {mode.name: mode for mode in MODES}


def _descriptor(base: int, limit: int, access: int, flags: int) -> int:
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15 | flags << 4) << 48
        | base >> 24 << 56
    )


def _gate(selector: int, offset: int, count: int, access: int) -> int:
    return offset & 0xFFFF | selector << 16 | count << 32 | access << 40 | offset >> 16 << 48


def descriptors(long: bool) -> bytes:
    """The GDT: code and data of both rings, and one of each kind a selector may meet by accident."""
    flat = 0xFFFFF
    entries = [
        0,
        _descriptor(0, flat, 0x9B, 0xA if long else 0xC),  # 08 kernel code
        _descriptor(0, flat, 0x93, 0xC),  # 10 kernel data
        _descriptor(0, flat, 0xF3, 0xC),  # 18 user data
        _descriptor(0, flat, 0xFB, 0xA if long else 0xC),  # 20 user code
        _descriptor(TSS, 0x67, 0x8B, 0),  # 28 the TSS, busy
        0,  # 30 its upper half
        _descriptor(0, flat, 0xFB, 0xC),  # 38 32-bit user code
        _descriptor(0, 0xFFFF, 0x9B, 0),  # 40 16-bit code
        _descriptor(0, flat, 0x9F, 0xC),  # 48 conforming code
        _descriptor(0, 0xFFF, 0x97, 0xC),  # 50 expand-down data
        _descriptor(0, flat, 0x13, 0xC),  # 58 not present
        _descriptor(LDT, 0x3F, 0x82, 0),  # 60 an LDT
        0,  # 68
        _gate(8, HANDLER, 0, 0xEC),  # 70 a call gate
        0,  # 78
        _gate(8, HANDLER, 31, 0xE4),  # 80 a 16-bit call gate with parameters
        0,  # 88
        _gate(0x98, 0, 0, 0xE5),  # 90 a task gate
        _descriptor(TSS + 0x100, 0x67, 0x89, 0),  # 98 another TSS
        0,  # A0
        _descriptor(TSS + 0x200, 0x2B, 0x81, 0),  # A8 a 16-bit TSS
        0,  # B0
        _descriptor(TSS + 0x300, 1, 0x89, 0),  # B8 a TSS that is too short
        0,  # C0
        _descriptor(0xFFFFF000, flat, 0xF2, 0xC),  # C8 data at the end of the address space
    ]
    return struct.pack(f"<{len(entries)}Q", *entries)


def image(mode: Mode) -> bytes:
    """Memory from 0 to IMAGE."""
    memory = bytearray(b"\xf4" * IMAGE)  # HLT wherever a jump leads
    memory[0:0x400] = b"".join(struct.pack("<HH", HANDLER + vector, 0) for vector in range(256))
    table = descriptors(mode.long)
    memory[GDT : GDT + len(table)] = table
    gates = [HANDLER + vector | 8 << 16 | 0xEE << 40 for vector in range(256)]  # RIP tells the vector
    table = b"".join(struct.pack("<QQ", gate, 0) if mode.long else struct.pack("<Q", gate) for gate in gates)
    memory[IDT : IDT + len(table)] = table
    memory[TSS : TSS + 0x800] = bytes(0x800)
    task = struct.pack("<IIII", 0, STACK - 0x1000, 0x10, 0)
    if mode.long:
        task = struct.pack("<IQQQ", 0, *[STACK - 0x1000] * 3)
    memory[TSS : TSS + len(task)] = task
    memory[TSS + 0x66 : TSS + 0x68] = b"\x68\0"
    memory[LDT : LDT + 0x40] = struct.pack("<Q", _descriptor(0, 0xFFFFF, 0xF3, 0xC)) * 8
    tables = (PML4 + 0x1000 | 7, PML4 + 0x2000 | 7)
    for level, entry in enumerate(tables):
        memory[PML4 + level * 0x1000 : PML4 + (level + 1) * 0x1000] = struct.pack("<Q", entry).ljust(0x1000, b"\0")
    pages = struct.pack("<512Q", *(index << 21 | 0x87 for index in range(512)))
    memory[PML4 + 0x2000 : PML4 + 0x3000] = pages
    return bytes(memory)


def special_registers(mode: Mode, sregs: kvm_sregs) -> kvm_sregs:
    """Of the mode, from those that the vCPU has."""
    ring = mode.cpl
    if not mode.protected or mode.virtual:
        cs = data = kvm_segment(base=0, limit=0xFFFF, selector=0, type=3, present=1, dpl=ring, s=1)
        cs = kvm_segment(base=0, limit=0xFFFF, selector=0, type=3 if mode.virtual else 11, present=1, dpl=ring, s=1)
    else:
        selector = {64: 0x20, 32: 0x38 if mode.long else 0x20}.get(mode.bits, 0x40) if ring else 8
        wide, size = int(mode.bits == 64), int(mode.bits == 32)
        limit = 0xFFFF if mode.bits == 16 else 0xFFFFFFFF
        cs = kvm_segment(
            base=0, limit=limit, selector=selector | ring, type=11, present=1, dpl=ring, db=size, s=1, l=wide, g=1
        )
        cs.g = int(mode.bits != 16)
        data = kvm_segment(base=0, limit=0xFFFFFFFF, selector=0x18 | ring if ring else 0x10, type=3, present=1)
        data.dpl, data.s, data.g, data.db = ring, 1, 1, int(mode.bits != 16)
    sregs.cs = cs
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.tr = kvm_segment(base=TSS, limit=0x67, selector=0x28, type=11, present=1)
    sregs.ldt = kvm_segment(base=LDT, limit=0x3F, selector=0x60, type=2, present=1)
    sregs.gdt.base, sregs.gdt.limit = GDT, len(descriptors(mode.long)) - 1
    sregs.idt.base, sregs.idt.limit = (IDT, 0xFFF if mode.long else 0x7FF) if mode.protected else (0, 0x3FF)
    sregs.cr0 = (0x80010033 if mode.long else 0x33) if mode.protected else 0x32
    sregs.cr2 = sregs.cr8 = 0
    sregs.cr3, sregs.cr4, sregs.efer = (PML4, 0x50620, 0xD01) if mode.long else (0, 0x50600, 0)
    return sregs
