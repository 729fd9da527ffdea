"""Generated steps on memory: slots, what the host has behind them, dirty logs, guest_memfd, page tables."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance.host import PAGE
from anykvm.conformance.layout import TEST
from anykvm.conformance.sequences.choose import Choose
from anykvm.conformance.sequences.step import Step, step
from anykvm.conformance.sequences.world import BUFFERS, FILE_BUFFER, GMEM_BUFFER, PAGES

FAR: Final = TEST + 0x400000
"""Another place for slots."""
APIC: Final = 0xFEE00000
HIGH: Final = 0x100000000
"""Beyond the guest's page tables."""
LIMIT: Final = 1 << 40
"""The end of guest-physical addresses."""
_LOG: Final = c.KVM_MEM_LOG_DIRTY_PAGES
_READ_ONLY: Final = c.KVM_MEM_READONLY
_GMEM: Final = c.KVM_MEM_GUEST_MEMFD
_MMAP: Final = c.GUEST_MEMFD_FLAG_MMAP
_SHARED: Final = c.GUEST_MEMFD_FLAG_INIT_SHARED
_KEEP: Final = 1
_PUNCH: Final = 2
_PRESENT: Final = 0x67
_NO_EXECUTE: Final = 1 << 63
_RESERVED: Final = 1 << 51
_SLOTS: Final = 6


def first_slots(choose: Choose) -> list[Step]:
    """One or two slots at the places that guests look at most."""
    flags = choose.weighted({0: 6, _LOG: 2, _READ_ONLY: 1.5})
    size = choose.of([4, 8, 8, 16]) * PAGE
    steps = [step("slot", slot=1, gpa=TEST, size=size, buffer=choose.below(3), page=0, flags=flags)]
    if choose.chance(0.6):
        gpa = TEST + choose.of([8, 16]) * PAGE
        flags = choose.weighted({0: 3, _LOG: 1, _READ_ONLY: 1})
        steps.append(step("slot", slot=2, gpa=gpa, size=4 * PAGE, buffer=choose.below(3), page=8, flags=flags))
    return steps


def _gpa(choose: Choose) -> int:
    return choose.weighted({TEST: 6, FAR: 1, APIC - 2 * PAGE: 0.3, HIGH - 2 * PAGE: 0.3}) + choose.below(12) * PAGE


def slot(choose: Choose) -> list[Step]:
    """A slot that is well formed, though it may overlap another or be one."""
    flags = choose.weighted({0: 6, _LOG: 2, _READ_ONLY: 2, _LOG | _READ_ONLY: 0.5})
    pages = choose.of([1, 1, 2, 3, 4, 8])
    number = choose.between(1, _SLOTS)
    buffer, page = choose.below(BUFFERS), choose.below(PAGES)
    op = "slot" if choose.chance(0.7) else "slot2"
    return [step(op, slot=number, gpa=_gpa(choose), size=pages * PAGE, buffer=buffer, page=page, flags=flags)]


def logged_slot(choose: Choose) -> list[Step]:
    """A slot with a dirty log."""
    where = dict(gpa=_gpa(choose), size=choose.of([1, 4, 8, 70]) * PAGE, buffer=choose.below(3), page=0)
    return [step("slot", slot=choose.between(1, 3), **where, flags=_LOG)]


def odd_slot(choose: Choose) -> list[Step]:
    """A slot with something about it."""
    args = dict(slot=choose.between(1, _SLOTS), gpa=_gpa(choose), size=4 * PAGE, buffer=0, page=0, flags=0)
    # Of slots of an impossible size none is logged: the kernel would allocate their bitmaps.
    odd: dict[str, list[int]] = {
        "slot": [0x7FFB, 0x7FFC, 0x7FFF, 0x8000, 0xFFFF, 0x10001, 0x10002, 0x20000, 0xFFFFFFFF],
        "gpa": [TEST + 8, TEST + 1, LIMIT, LIMIT - 4 * PAGE, LIMIT - PAGE, (1 << 64) - PAGE, (1 << 64) - 4 * PAGE,
                1 << 52, 0xFEE00000, 0xFFFFE000, 0, 0x1FF000],
        "size": [0, PAGE - 1, 4 * PAGE + 8, 1 << 43, (1 << 43) - PAGE, 1 << 63, (1 << 64) - PAGE, 1 << 40],
        "page": [],
        "flags": [4, 8, 3, 6, 5, 1 << 31, 0xFFFFFFFF],
    }  # fmt: skip
    field = choose.of(list(odd))
    if field == "page":
        args["buffer"] = -1
        # Not around 1 << 47: where user addresses end depends on the host's processor.
        args["page"] = choose.of([0, 8, 1, 0x100000, 0xFFFF800000000000, (1 << 64) - PAGE, 1 << 60])
    else:
        args[field] = choose.of(odd[field])
    if args["size"] > 1 << 30:
        args["buffer"], args["page"] = -1, 0x100000
    return [step("slot" if choose.chance(0.5) else "slot2", **args)]


def delete(choose: Choose) -> list[Step]:
    """Delete a slot, which may not be there."""
    flags = choose.weighted({0: 6, _READ_ONLY: 1, _LOG: 1})
    return [step("slot", slot=choose.between(1, _SLOTS), gpa=0, size=0, buffer=-1, page=0, flags=flags)]


def change_slot(choose: Choose) -> list[Step]:
    """Move one of the first slots, or change its flags or, in vain, its size or memory."""
    gpa = TEST + choose.of([0, 0, 0, 1, 2, 8, 16]) * PAGE
    size = choose.of([4, 8, 8, 16]) * PAGE
    flags = choose.weighted({0: 3, _LOG: 4, _READ_ONLY: 1})
    number = choose.between(1, 2)
    return [step("slot", slot=number, gpa=gpa, size=size, buffer=choose.below(3), page=(number - 1) * 8, flags=flags)]


def host_change(choose: Choose) -> list[Step]:
    """What a VMM may do to its own memory at any time.

    No mapping is made that may be written or executed but not read: KVM asks the mapping's flags, the soft backend the
    processor, which cannot forbid only reading (conformance/differences, prot_read).
    """
    place = dict(buffer=choose.below(BUFFERS), page=choose.below(10), count=choose.of([1, 1, 1, 2, 4]))
    op = choose.weighted(
        {"unmap": 2, "protect": 4, "fresh": 2, "map_file": 1, "truncate": 0.7, "discard": 1, "move": 0.7, "put": 1}
    )
    if op == "protect":
        return [step(op, **place, prot=choose.of([0, 1, 1, 3]))]
    if op == "map_file":
        return [step(op, **place, prot=choose.of([1, 3, 3]))]
    if op == "truncate":
        return [step(op, pages=choose.of([0, 1, 2, 4, 16]))]
    if op == "move":
        return [step(op, **place, to=choose.below(BUFFERS), to_page=choose.below(10))]
    if op == "put":
        offset = place["page"] * PAGE + choose.of([0, 8, 0xFF8])
        return [step(op, buffer=place["buffer"], offset=offset, value=choose.bits(64))]
    return [step(op, **place)]


def pre_fault(choose: Choose) -> list[Step]:
    """KVM_PRE_FAULT_MEMORY."""
    gpa = _gpa(choose) + choose.weighted({0: 9, 8: 1})
    size = choose.weighted({PAGE: 4, 4 * PAGE: 3, 0: 0.5, PAGE - 1: 0.5, (1 << 64) - PAGE: 0.5})
    return [step("pre_fault", gpa=gpa, size=size, flags=choose.weighted({0: 9, 1: 1}))]


def dirty_log(choose: Choose) -> list[Step]:
    """Read or clear a log, or harvest or reset a ring."""
    number = choose.weighted({1: 5, 2: 3, 3: 1, 5: 0.3, 0x10001: 0.2, 0x7FFD: 0.2, 0x20001: 0.2, 0xFFFF: 0.2})
    op = choose.weighted({"dirty_get": 5, "dirty_clear": 4, "ring_harvest": 2, "ring_reset": 1})
    if op == "dirty_get":
        return [step(op, slot=number, bad=choose.chance(0.05))]
    if op == "ring_harvest":
        return [step(op, limit=choose.of([1, 2, 100]))]
    if op == "ring_reset":
        return [step(op)]
    first = choose.weighted({0: 6, 64: 2, 1: 0.5, 63: 0.5, 128: 0.5, 1 << 63: 0.3})
    count = choose.weighted({64: 3, 8: 2, 16: 2, 4: 2, 70: 1, 6: 1, 0: 1, 1: 1, 1 << 31: 0.3})
    bits = choose.of([1, 3, 0xFF, choose.bits(64), (1 << 128) - 1])
    return [step(op, slot=number, first=first, count=count, bits=bits, bad=choose.chance(0.05))]


def gmem(choose: Choose) -> list[Step]:
    """Make, map, empty or close a guest_memfd.

    Only whole pages are given back, and always with FALLOC_FL_KEEP_SIZE; no file without GUEST_MEMFD_FLAG_MMAP is
    mapped: a file of the soft backend cannot refuse what raw system calls ask of it (README, status table).
    """
    op = choose.weighted({"create": 3, "map": 3, "punch": 3, "allocate": 1, "close": 0.7, "odd": 0.7})
    number = choose.weighted({0: 4, 1: 1})
    page, count = choose.below(8), choose.of([1, 1, 2, 8])
    if op == "create":
        return [step("gmem_create", size=choose.of([8, 16, 16]) * PAGE, flags=_MMAP | _SHARED)]
    if op == "odd":
        size = choose.of([0, PAGE - 1, 8 * PAGE, 16 * PAGE, (1 << 64) - PAGE, 1 << 63])
        return [step("gmem_create", size=size, flags=choose.of([4, 8, 1 << 63, _MMAP | _SHARED]))]
    if op == "map":
        return [step("gmem_map", gmem=number, buffer=GMEM_BUFFER, page=0, count=PAGES)]
    if op == "punch":
        return [step("gmem_allocate", gmem=number, mode=_KEEP | _PUNCH, page=page, count=count)]
    if op == "allocate":
        return [step("gmem_allocate", gmem=number, mode=_KEEP, page=page, count=count)]
    return [step("gmem_close", gmem=number)]


def gmem_slot(choose: Choose) -> list[Step]:
    """Bind a guest_memfd to a slot, after making one if there may be none."""
    steps = [step("gmem_create", size=16 * PAGE, flags=_MMAP | _SHARED)] if choose.chance(0.5) else []
    gmem_number = choose.weighted({0: 6, 1: 2, 5: 0.3})
    buffer = choose.weighted({GMEM_BUFFER: 4, 0: 1, FILE_BUFFER: 0.5})
    size = choose.of([1, 4, 8, 16]) * PAGE
    offset = choose.weighted({0: 6, 4 * PAGE: 2, 12 * PAGE: 1, 8: 0.3, 17 * PAGE: 0.3, (1 << 64) - PAGE: 0.3})
    flags = choose.weighted({_GMEM: 9, _GMEM | _LOG: 0.3, _GMEM | _READ_ONLY: 0.3})
    where = dict(slot=choose.between(1, _SLOTS), gpa=_gpa(choose), size=size, buffer=buffer, page=0)
    return [*steps, step("slot2", **where, flags=flags, gmem=gmem_number, offset=offset)]


def page_table_entry(choose: Choose) -> list[Step]:
    """Change how the guest maps a page of the 2 MiB around TEST."""
    page = choose.below(10)
    target = TEST + choose.weighted({page: 4, choose.below(12): 2, 0x1F0: 1}) * PAGE
    flags = choose.weighted(
        {_PRESENT: 3, 0x7: 2, 0x3: 1, 0x61: 2, 0x0: 2, 0x66: 1, _NO_EXECUTE | _PRESENT: 1, _RESERVED | _PRESENT: 1,
         0x5: 1, 0x1: 1}
    )  # fmt: skip
    return [step("page_table_entry", page=page, entry=target | flags)]
