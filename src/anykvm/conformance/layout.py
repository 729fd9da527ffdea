"""Where things are in a scenario's guest, and the page tables and descriptor tables that its memory begins with.

Slot 0 is 2 MiB at 0. It holds identity page tables for 4 GiB in 2 MiB pages, a GDT, and an IDT whose every vector
reports itself on port 0xE0 and halts; so a guest that took an exception says which.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Final

from anykvm.abi.structures import kvm_sregs
from anykvm.conformance.host import PAGE, Host
from anykvm.vmm.modes import flat_segment

MEMORY_SIZE: Final = 0x200000
"""Size of slot 0."""
PML4: Final = 0x1000
PDPT: Final = 0x2000
PAGE_DIRECTORIES: Final = 0x3000
"""Four of them, one page each."""
GDT: Final = 0x7000
TSS: Final = 0x7800
IDT: Final = 0x8000
CODE: Final = 0x10000
"""Where ``Machine.at`` puts guest code."""
STACK: Final = 0x30000
HANDLERS: Final = 0x40000
"""The exception handlers, 16 bytes each."""
EXCEPTION_PORT: Final = 0xE0
"""Where they report their vector."""
TEST: Final = 0x10000000
"""Where the slots under test lie: guest-virtual and guest-physical address."""
RBX: Final = 0x1122334455667788
"""What is in RBX: the value that guest code stores."""

CODE_SELECTOR: Final = 8
DATA_SELECTOR: Final = 16
TSS_SELECTOR: Final = 24

_PRESENT_USER: Final = 0x7  # present, writable, user
_ACCESSED_DIRTY: Final = 0x60
_LARGE_PAGE: Final = 0x80


def build(memory: Host) -> None:
    """Write page tables, GDT, IDT and handlers into slot 0's memory."""
    for address, data in _image():
        memory.put(address, data)


@cache
def _image() -> list[tuple[int, bytes]]:
    tables = bytearray()
    for directory in range(4):
        flags = _PRESENT_USER | _ACCESSED_DIRTY | _LARGE_PAGE
        tables += struct.pack("<512Q", *((directory << 30) + (entry << 21) | flags for entry in range(512)))
    directories = [PAGE_DIRECTORIES + directory * PAGE | _PRESENT_USER for directory in range(4)]
    gates, stubs = bytearray(), bytearray()
    for vector in range(256):
        handler = HANDLERS + 16 * vector
        low = (handler & 0xFFFF) | CODE_SELECTOR << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
        gates += struct.pack("<QQ", low, handler >> 32)
        stubs += handler_code(vector).ljust(16, b"\0")
    return [
        (PML4, struct.pack("<Q", PDPT | _PRESENT_USER)),
        (PDPT, struct.pack("<4Q", *directories)),
        (PAGE_DIRECTORIES, bytes(tables)),
        (GDT + CODE_SELECTOR, struct.pack("<QQ", 0x00AF9B000000FFFF, 0x00CF93000000FFFF)),
        (IDT, bytes(gates)),
        (HANDLERS, bytes(stubs)),
    ]


def handler_code(vector: int) -> bytes:
    """Give an exception handler's bytes: ``mov al, vector; out 0xe0, al; hlt; jmp .-1``."""
    return bytes((0xB0, vector, 0xE6, EXCEPTION_PORT, 0xF4, 0xEB, 0xFD))


def map_small_pages(memory: Host, virtual: int, table_gpa: int, table: Host) -> None:
    """Map the 2 MiB around ``virtual`` to itself in 4 KiB pages, by ``table``, which the guest has at ``table_gpa``."""
    base = virtual & ~0x1FFFFF
    table.put(0, struct.pack("<512Q", *(base + page * PAGE | 0x67 for page in range(512))))
    entry = PAGE_DIRECTORIES + (virtual >> 30) * PAGE + 8 * (virtual >> 21 & 511)
    memory.put64(entry, table_gpa | 0x67)


def long_mode(sregs: kvm_sregs) -> kvm_sregs:
    """Change a vCPU's system registers to 64-bit mode, ring 0, with the tables that ``build`` made."""
    sregs.cs = flat_segment(CODE_SELECTOR, 0xB, long=True)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, flat_segment(DATA_SELECTOR, 3))
    task = sregs.tr
    task.selector, task.type, task.present, task.s, task.base, task.limit = TSS_SELECTOR, 0xB, 1, 0, TSS, 0x67
    task.g = task.db = task.l = task.unusable = 0
    sregs.gdt.base, sregs.gdt.limit = GDT, 0x3F
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, PML4, 0x620, 0xD00
    return sregs
