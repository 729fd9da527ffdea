"""Slots: each field at its boundary, and the order in which fields are checked: ABI.md 4.1."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.slot_arguments import KERNEL_ADDRESS, try_slot

AREA = "slot_arguments"
_BASE: Final = TEST + 0x10000


def _machine(lab: Lab) -> tuple[Machine, Host]:
    return lab.machine(), anonymous(16 * PAGE)


@scenario("slot_alignment", area=AREA)
def slot_alignment(lab: Lab) -> None:
    """Size, guest and host address at a page less one, a page, a page and one, and unaligned by each power of two."""
    m, host = _machine(lab)
    for size in (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE):
        try_slot(lab, m, f"size_{size}", 1, TEST, size, host)
    for bit in range(13):
        try_slot(lab, m, f"gpa_bit_{bit}", 1, TEST + (1 << bit), PAGE, host)
        try_slot(lab, m, f"hva_bit_{bit}", 1, TEST, PAGE, host.address + (1 << bit))


@scenario("slot_flag_bits", area=AREA)
def slot_flag_bits(lab: Lab) -> None:
    """Each flag bit in both forms of the ioctl; both known ones together."""
    m, host = _machine(lab)
    for bit in range(32):
        try_slot(lab, m, f"v1_bit_{bit}", 1, TEST, PAGE, host, 1 << bit)
        if 1 << bit != c.KVM_MEM_GUEST_MEMFD:
            outcome = lab.step(f"v2_bit_{bit}", m.slot2(1, TEST, PAGE, host, 1 << bit))
            if not outcome.failed:
                m.delete_slot(1)
    try_slot(lab, m, "both", 1, TEST, PAGE, host, 3)


@scenario("slot_overlaps", area=AREA)
def slot_overlaps(lab: Lab) -> None:
    """A second slot that touches the first by a page, at either end, within, around, and that only is next to it."""
    m, host = _machine(lab)
    m.slot(1, _BASE, 4 * PAGE, host)
    for step, first, pages in (
        ("last_page", 3, 1),
        ("first_page", 0, 1),
        ("tail_by_one", 3, 4),
        ("head_by_one", -3, 4),
        ("within", 1, 2),
        ("around", -1, 6),
        ("same", 0, 4),
        ("after", 4, 1),
        ("before", -1, 1),
    ):
        try_slot(lab, m, step, 2, _BASE + first * PAGE, pages * PAGE, host)


@scenario("slot_id_bounds", area=AREA)
def slot_id_bounds(lab: Lab) -> None:
    """Slot numbers at the limits of user slots and of the index, in each address space."""
    m, host = _machine(lab)
    for slot in (32763, 32764, 32766, 32767, 32768, 0xFFFF, 0x10000, 0x17FFB, 0x17FFC, 0x20000, 0xFFFF0000):
        try_slot(lab, m, f"slot_{slot:#x}", slot, TEST, PAGE, host)


@scenario("slot_page_counts", area=AREA)
def slot_page_counts(lab: Lab) -> None:
    """At most 2^31 - 1 pages; and the guest addresses they need."""
    m = lab.machine()
    for step, gpa, pages in (
        ("2^31-1", 0x100000000, (1 << 31) - 1),
        ("2^31", 0x100000000, 1 << 31),
        ("2^31+1", 0x100000000, (1 << 31) + 1),
        ("2^52-1", 0, (1 << 52) - 1),
    ):
        try_slot(lab, m, step, 1, gpa, pages * PAGE, 0x100000)


@scenario("slot_counts_and_overlaps", area=AREA)
def slot_counts_and_overlaps(lab: Lab) -> None:
    """A slot over another: EEXIST up to 2^31 - 1 pages, though it reaches beyond physical addresses; EINVAL from there.

    So the number of pages is checked before overlaps (rows 12 and 18), and the highest address after them (row 20).
    """
    m, host = _machine(lab)
    m.slot(1, TEST, 4 * PAGE, host)
    for step, gpa, pages in (
        ("2^31-1_over", TEST, (1 << 31) - 1),
        ("2^31_over", TEST, 1 << 31),
        ("2^31-1_apart", TEST + 0x100000, (1 << 31) - 1),
        ("beyond_physical_over", TEST, 1 << 30),
    ):
        lab.step(step, m.slot(2, gpa, pages * PAGE, 0x100000))


@scenario("slot_wraps", area=AREA)
def slot_wraps(lab: Lab) -> None:
    """Guest and host ranges that wrap or end at the top of the address space."""
    m, host = _machine(lab)
    top = (1 << 64) - PAGE
    for step, gpa, size, hva in (
        ("gpa_wraps", top, 2 * PAGE, host.address),
        ("gpa_ends_at_top", top, PAGE, host.address),
        ("hva_wraps", TEST, 2 * PAGE, top),
        ("hva_ends_at_top", TEST, PAGE, top),
        ("hva_into_kernel", TEST, 2 * PAGE, KERNEL_ADDRESS - PAGE),
        ("size_2^63", TEST, 1 << 63, host.address),
        ("size_top", TEST, top, host.address),
    ):
        try_slot(lab, m, step, 1, gpa, size, hva)


@scenario("slot_check_order", area=AREA)
def slot_check_order(lab: Lab) -> None:
    """Two things wrong at once: which is found first."""
    m, host = _machine(lab)
    m.slot(1, TEST, 4 * PAGE, host)
    for step, slot, gpa, size, hva, flags in (
        ("overlap_and_unaligned", 2, TEST + 8, PAGE, host.address, 0),
        ("overlap_and_bad_flag", 2, TEST, PAGE, host.address, 8),
        ("overlap_and_bad_id", 32764, TEST, PAGE, host.address, 0),
        ("overlap_and_beyond_physical", 2, TEST, 1 << 52, host.address, 0),
        ("overlap_and_no_address_space", 0x20002, TEST, PAGE, host.address, 0),
        ("resized_and_moved_onto_itself", 1, TEST + PAGE, 2 * PAGE, host.address, 0),
        ("delete_absent_and_unaligned_gpa", 5, 8, 0, 0, 0),
        ("delete_present_and_wrapping_gpa", 1, 8, 0, 0, 0),
    ):
        lab.step(step, m.slot(slot, gpa, size, hva, flags))


@scenario("slot_changes", area=AREA)
def slot_changes(lab: Lab) -> None:
    """What may change in a slot that exists: its place, its logging, both; not its size, memory, or READONLY."""
    m, host = _machine(lab)
    log, read_only = c.KVM_MEM_LOG_DIRTY_PAGES, c.KVM_MEM_READONLY
    m.slot(1, TEST, 4 * PAGE, host)
    for step, gpa, size, hva, flags in (
        ("same", TEST, 4 * PAGE, host.address, 0),
        ("one_page_more", TEST, 5 * PAGE, host.address, 0),
        ("one_page_less", TEST, 3 * PAGE, host.address, 0),
        ("next_hva", TEST, 4 * PAGE, host.address + PAGE, 0),
        ("read_only", TEST, 4 * PAGE, host.address, read_only),
        ("log", TEST, 4 * PAGE, host.address, log),
        ("log_and_read_only", TEST, 4 * PAGE, host.address, log | read_only),
        ("moved_by_a_page", TEST + PAGE, 4 * PAGE, host.address, log),
        ("moved_and_unlogged", TEST, 4 * PAGE, host.address, 0),
        ("moved_and_resized", TEST + PAGE, 5 * PAGE, host.address, 0),
    ):
        lab.step(step, m.slot(1, gpa, size, hva, flags))


@scenario("slot_address_spaces", area=AREA)
def slot_address_spaces(lab: Lab) -> None:
    """The second address space has its own slots at the same addresses; a vCPU outside SMM does not see them."""
    m, host = _machine(lab)
    lab.step("in_space_1", m.slot(0x10001, TEST, PAGE, host))
    m.at(code.READ8, TEST)
    m.run("device_in_space_0")
    m.answer_mmio(1)
    m.run("done")
    lab.step("in_space_0", m.slot(1, TEST, PAGE, host))
    lab.step("overlap_in_space_1", m.slot(0x10002, TEST, PAGE, host))
    lab.step("delete_in_space_1", m.slot(0x10001, TEST, 0, 0))
    m.at(code.READ8, TEST)
    m.run("memory_in_space_0")


@scenario("slot_same_memory", area=AREA)
def slot_same_memory(lab: Lab) -> None:
    """The same host memory at two guest addresses: what is written at one is read at the other, and executed."""
    m, host = _machine(lab)
    m.slot(1, TEST, 4 * PAGE, host)
    m.slot(2, TEST + 0x100000, 4 * PAGE, host)
    m.slot(3, TEST + 0x200000, 2 * PAGE, host.address + PAGE)
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write")
    for address in (TEST + 0x101000, TEST + 0x200000):
        m.at(code.READ8, address)
        m.run("read")
    host.put(2 * PAGE, code.TARGET)
    m.at(code.JUMP, TEST + 0x201000)
    m.run("execute")


@scenario("slot_moved_under_guest", area=AREA)
def slot_moved_under_guest(lab: Lab) -> None:
    """A slot that the guest has used moves by a page: old addresses are a device, new ones its memory."""
    m, host = _machine(lab)
    host.put64(0, 0xA)
    host.put64(PAGE, 0xB)
    m.slot(1, TEST, 2 * PAGE, host)
    m.at(code.READ8, TEST + PAGE)
    m.run("before")
    lab.step("move", m.slot(1, TEST + PAGE, 2 * PAGE, host))
    for page in range(3):
        m.at(code.READ8, TEST + page * PAGE)
        m.run(f"page_{page}")


@scenario("slot_replaced", area=AREA)
def slot_replaced(lab: Lab) -> None:
    """A slot deleted and made anew with other memory, then read-only, then logged: the guest sees each at once."""
    m, host = _machine(lab)
    other = anonymous(PAGE)
    host.put64(0, 1)
    other.put64(0, 2)
    for step, memory, flags in (
        ("first", host, 0),
        ("other_memory", other, 0),
        ("read_only", host, c.KVM_MEM_READONLY),
        ("logged", other, c.KVM_MEM_LOG_DIRTY_PAGES),
    ):
        m.delete_slot(1)
        lab.step(step, m.slot(1, TEST, PAGE, memory, flags))
        m.at(code.READ_WRITE_READ, TEST)
        m.run(f"{step}_read")
        m.run(f"{step}_write")


@scenario("slot_many", area=AREA)
def slot_many(lab: Lab) -> None:
    """Hundreds of slots of one page with gaps: each is found, each gap is a device; then all are gone."""
    m, host = _machine(lab)
    failed = [m.slot(1 + at, TEST + 2 * at * PAGE, PAGE, host).errno for at in range(300)]
    lab.note("made", errors=sorted(set(failed)))
    for at in (0, 149, 299):
        m.at(code.READ8, TEST + 2 * at * PAGE)
        m.run(f"slot_{at}")
        m.at(code.READ8, TEST + (2 * at + 1) * PAGE)
        m.run(f"gap_{at}")
    gone = [m.delete_slot(1 + at).errno for at in range(300)]
    lab.note("deleted", errors=sorted(set(gone)))
    m.at(code.READ8, TEST + 298 * PAGE)
    m.run("afterwards")


@scenario("slot_large", area=AREA)
def slot_large(lab: Lab) -> None:
    """A slot of 3 GiB that is barely backed: its first and last bytes, and the byte after it."""
    m, host = lab.machine(), anonymous(2 * PAGE)
    size = 3 << 30
    lab.step("make", m.slot(1, TEST, size - TEST, host.address))
    host.put64(0, 0x1F)
    m.at(code.READ8, TEST)
    m.run("first")
    m.slot(1, TEST, 0, 0)
    lab.step("make_ending_there", m.slot(1, TEST, size - TEST, host.address + 2 * PAGE - (size - TEST)))
    host.put64(2 * PAGE - 8, 0x2F)
    m.at(code.READ8, size - 8)
    m.run("last")
    m.at(code.READ8, size)
    m.run("beyond")


@scenario("slot_pointers", area=AREA)
def slot_pointers(lab: Lab) -> None:
    """A structure that ends at the end of a mapping is read; one that goes a byte beyond is EFAULT."""
    m, host = _machine(lab)
    memory = anonymous(2 * PAGE)
    memory.unmap(PAGE, PAGE)
    for name, request, size in (
        ("v1", n.KVM_SET_USER_MEMORY_REGION, 32),
        ("v2", n.KVM_SET_USER_MEMORY_REGION2, 160),
    ):
        for step, at in (("fits", PAGE - size), ("beyond", PAGE - size + 1)):
            fields = (5).to_bytes(8, "little") + b"".join(
                value.to_bytes(8, "little") for value in (TEST, PAGE, host.address)
            )
            memory.put(at, fields[: PAGE - at])
            lab.ioctl(f"{name}_{step}", m.vm, request, memory.address + at)
        m.delete_slot(5)
