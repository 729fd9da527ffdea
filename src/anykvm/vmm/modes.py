"""Putting a vCPU into a mode: real, 32-bit protected, or 64-bit long with one-to-one page tables.

A new vCPU stands at the reset vector, as KVM has it. What a boot loader would do from there is done here from outside,
by KVM_SET_CPUID2, KVM_SET_SREGS and KVM_SET_REGS, and by tables written into guest memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import pack
from typing import Final

from anykvm.abi.structures import kvm_regs, kvm_segment, kvm_sregs
from anykvm.api import PAGE_SIZE, GuestMemory, Vcpu

GDT: Final = 0x1000
"""gpa of the descriptor table that the protected and long modes use."""
TABLES: Final = 0x2000
"""gpa of the page tables of long mode; they end where ``long_mode`` says."""
CODE: Final = 0x08
"""Selector of the code segment."""
DATA: Final = 0x10
"""Selector of the data and stack segment."""

_LARGE: Final = 2 << 20  # what a page directory entry maps
_GIB: Final = 1 << 30
_PRESENT_WRITABLE: Final = 0x3
_LARGE_PAGE: Final = 0x80
_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_CODE_TYPE: Final = 0xB  # execute, read, accessed
_DATA_TYPE: Final = 0x3  # read, write, accessed


def real_mode(vcpu: Vcpu, entry: int) -> None:
    """Start in real mode at linear address ``entry``, with all data segments at 0 and SP at 0x7000.

    CS is 0 when the address fits into IP, else the paragraph of its 64 KiB block. Raises ValueError from 1 MiB on.
    """
    if not 0 <= entry < 1 << 20:
        raise ValueError(f"entry {entry:#x} is not below 1 MiB, where real mode ends")
    vcpu.set_cpuid2(vcpu.vm.kvm.get_supported_cpuid())
    vcpu.set_real_mode(entry & 0xFFFF, (entry & 0xF0000) >> 4)
    regs = vcpu.get_regs()
    regs.rsp = 0x7000
    vcpu.set_regs(regs)


def protected_mode(vcpu: Vcpu, memory: GuestMemory, entry: int, stack: int) -> int:
    """Start in 32-bit protected mode at ``entry``: flat 4 GiB segments, no paging, interrupts off.

    ``memory`` is what the VM has at gpa 0: the descriptor table is written to it. Returns the first gpa behind that.
    Raises ValueError for an entry from 4 GiB on; OSError when the memory is not there.
    """
    if not 0 <= entry < 1 << 32:
        raise ValueError(f"entry {entry:#x} is not below 4 GiB, where protected mode ends")
    sregs = _flat(vcpu, memory, long=False)
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE
    sregs.cr4 |= _CR4_OSFXSR | _CR4_OSXMMEXCPT
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=entry, rsp=stack, rflags=2))
    return GDT + PAGE_SIZE


def long_mode(
    vcpu: Vcpu, memory: GuestMemory, entry: int, stack: int, ranges: Iterable[tuple[int, int]] = ((0, 4 * _GIB),)
) -> int:
    """Start in 64-bit mode, ring 0, at ``entry``: addresses are guest-physical, SSE is on, interrupts are off.

    ``memory`` is what the VM has at gpa 0: the descriptor table goes to ``GDT``, page tables to ``TABLES``. They map
    the ``ranges`` (start, length), rounded out to 1 GiB, one to one, writable and executable, by pages of 2 MiB; one
    page of table for each GiB. Returns the first gpa behind the tables.
    Raises ValueError for a range that does not lie below 512 GiB; IndexError when the tables do not fit into
    ``memory``; OSError when the memory is not there.
    """
    end = _identity_map(memory, ranges)
    sregs = _flat(vcpu, memory, long=True)
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_PG
    sregs.cr3 = TABLES
    sregs.cr4 |= _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
    sregs.efer |= _EFER_LME | _EFER_LMA
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=entry, rsp=stack, rflags=2))
    return end


def tables_end(ranges: Iterable[tuple[int, int]]) -> int:
    """Tell the first gpa behind the tables that ``long_mode`` would make.

    >>> hex(tables_end([(0, 1 << 20), (4 << 30, 1 << 30)]))  # PML4, PDPT, and two directories
    '0x6000'
    """
    return TABLES + (2 + len(_gibs(ranges))) * PAGE_SIZE


def _gibs(ranges: Iterable[tuple[int, int]]) -> list[int]:
    found: set[int] = set()
    for start, length in ranges:
        if start < 0 or length < 0 or start + length > 512 * _GIB:
            raise ValueError(f"[{start:#x}, {start + length:#x}) is not below 512 GiB")
        found.update(range(start // _GIB, -(-(start + length) // _GIB)))
    return sorted(found)


def _identity_map(memory: GuestMemory, ranges: Iterable[tuple[int, int]]) -> int:
    upper, directory = TABLES + PAGE_SIZE, TABLES + 2 * PAGE_SIZE
    pointers = bytearray(PAGE_SIZE)
    for gib in _gibs(ranges):
        pointers[gib * 8 : gib * 8 + 8] = pack("<Q", directory | _PRESENT_WRITABLE)
        flags = _PRESENT_WRITABLE | _LARGE_PAGE
        memory.write(directory, pack("<512Q", *(gib * _GIB + index * _LARGE | flags for index in range(512))))
        directory += PAGE_SIZE
    memory.write(upper, pointers)
    memory.write(TABLES, pack("<Q", upper | _PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0"))
    return directory


def _flat(vcpu: Vcpu, memory: GuestMemory, long: bool) -> kvm_sregs:
    """Write the descriptor table, and give the vCPU's SREGS with flat segments that agree with it."""
    # KVM checks EFER against the guest's CPUID: without one there is no long mode to enter.
    vcpu.set_cpuid2(vcpu.vm.kvm.get_supported_cpuid())
    memory.write(GDT, pack("<3Q", 0, 0x00AF9B000000FFFF if long else 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
    sregs = vcpu.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = GDT, 3 * 8 - 1
    sregs.cs = flat_segment(CODE, _CODE_TYPE, long=long)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, flat_segment(DATA, _DATA_TYPE))
    return sregs


def flat_segment(selector: int, type: int, *, dpl: int = 0, long: bool = False) -> kvm_segment:
    """Make a present segment of 4 GiB from 0. ``type`` is the descriptor's (11: code, 3: data); ``long``: 64-bit code.

    >>> flat_segment(0x08, 11, long=True).l
    1
    """
    return kvm_segment(
        base=0, limit=0xFFFFFFFF, selector=selector, type=type, present=1, dpl=dpl, db=not long, s=1, l=long, g=1
    )
