"""guest_memfd: private and shared pages, punched holes, closed descriptors, and what the emulator sees."""

from __future__ import annotations

import os

from anykvm.abi import constants as c
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, anonymous, fallocate
from anykvm.conformance.layout import PML4, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario

AREA = "guest_memfd"
NEEDS = ("guest_memfd", "attributes")
SIZE = 16 * PAGE
PRIVATE = c.KVM_MEMORY_ATTRIBUTE_PRIVATE
KEEP_SIZE = 1
PUNCH = 2 | KEEP_SIZE
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE"""


@scenario("gmem_basic", area=AREA, needs=NEEDS)
def gmem_basic(lab: Lab) -> None:
    """Which memory the guest sees follows the attribute; both keep their data; a punched hole reads zeros."""
    m = lab.protected_machine()
    if m is None:
        return
    made = lab.step("create", m.guest_memfd(SIZE))
    host = anonymous(SIZE)
    host.put64(0, 0x5A5A)
    bound = lab.step("bind", m.slot2(1, TEST, SIZE, host, c.KVM_MEM_GUEST_MEMFD, made.ret))
    if made.failed or bound.failed:
        return
    m.at(code.READ_WRITE_READ, TEST)
    m.run("shared_read_hva")
    m.run("shared_write_hva")
    host.put64(0, 0x5A5A)
    lab.step("attr_private", m.attributes(TEST, SIZE, PRIVATE))
    m.run("private_read_after_conversion_sees_gmem_zero")
    m.at(code.READ_WRITE_READ, TEST)
    for step in ("private_read", "private_write", "private_readback"):
        m.run(step)
    lab.note("hva_not_written", hva=hex(host.get64(0)))
    lab.step("attr_shared", m.attributes(TEST, SIZE, 0))
    m.at(code.READ_WRITE_READ, TEST)
    m.run("shared_again_read_hva")
    m.attributes(TEST, SIZE, PRIVATE)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("private_again_keeps_data")
    lab.step("punch_hole", lambda: fallocate(made.ret, PUNCH, 0, PAGE))
    m.at(code.READ8, TEST)
    m.run("private_read_after_punch")
    m.at(code.JUMP, TEST + PAGE)
    m.run("private_exec_zero_bytes", timeout=0.5)

    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("private_cross_page_write")
    m.attributes(TEST + PAGE, PAGE, 0)
    host.unmap(PAGE, PAGE)
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("cross_private_then_shared_unmapped")
    host.unmap(0, PAGE)
    host.unmap(2 * PAGE, 14 * PAGE)
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("private_read_hva_unmapped_ok")
    m.attributes(TEST, SIZE, 0)
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("shared_read_hva_unmapped")
    m.at(code.WRITE8, TEST + 2 * PAGE)
    m.run("shared_write_hva_unmapped")

    m.attributes(TEST, SIZE, PRIVATE)
    os.close(made.ret)
    for guest, address, step in (
        (code.READ8, TEST + 2 * PAGE, "private_read_gmem_fd_closed"),
        (code.WRITE8, TEST + 2 * PAGE + 0x888, "private_write_gmem_fd_closed"),
        (code.JUMP, TEST + 3 * PAGE, "private_exec_gmem_fd_closed"),
    ):
        m.at(guest, address)
        m.run(step)
    m.attributes(TEST, SIZE, 0)
    host.fix()
    m.at(code.READ8, TEST)
    m.run("shared_ok_after_fd_closed")


@scenario("gmem_private_noslotgmem", area=AREA, needs=("attributes",))
def private_without_guest_memfd(lab: Lab) -> None:
    """Private pages of a slot that has no guest_memfd, of no slot, and of page tables."""
    m = lab.protected_machine()
    if m is None:
        return
    lab.step("plain_slot", m.slot(1, TEST, SIZE, anonymous(SIZE)))
    lab.step("attr_private", m.attributes(TEST, SIZE, PRIVATE))
    for guest, step in (
        (code.READ8, "private_read_slot_without_gmem"),
        (code.WRITE8, "private_write"),
        (code.JUMP, "private_exec"),
    ):
        m.at(guest, TEST + 0x2345)
        m.run(step)
    m.attributes(TEST + 2 * PAGE, PAGE, 0)
    m.at(code.READ8, TEST + 0x2345)
    m.run("made_shared_resume")
    m.at(code.WRITE8, TEST + 3 * PAGE - 4)
    m.run("cross_shared_then_private")
    m.at(code.WRITE8, TEST + 2 * PAGE - 4)
    m.run("cross_private_then_shared")

    outside = TEST + 0x100000
    lab.step("attr_private_no_slot", m.attributes(outside, PAGE, PRIVATE))
    m.at(code.READ8, outside + 8)
    m.run("private_read_no_slot")
    m.at(code.WRITE8, outside + 8)
    m.run("private_write_no_slot")
    m.attributes(outside, PAGE, 0)
    m.run("made_shared_no_slot_mmio")
    m.attributes(TEST, SIZE, 0)
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb_exit")
    m.attributes(TEST, SIZE, PRIVATE)
    m.run("rep_insb_emulator_write_to_private_nogmem")
    m.string(code.REP_OUTSB, 0, TEST, 4)
    m.run("rep_outsb_from_private_nogmem")
    _private_table_and_read_only(m)


def _private_table_and_read_only(m: Machine) -> None:
    table_gpa, table = TEST + 0x200000, anonymous(PAGE)
    m.slot(2, table_gpa, PAGE, table)
    layout.map_small_pages(m.memory, TEST, table_gpa, table)
    m.attributes(TEST, SIZE, 0)
    m.attributes(table_gpa, PAGE, PRIVATE)
    m.at(code.LOAD_CR3, PML4)
    m.run("reload_cr3")
    m.at(code.READ8, TEST)
    m.run("page_table_page_private_nogmem")
    m.attributes(table_gpa, PAGE, 0)
    m.run("pt_made_shared_resume")
    read_only = TEST + 0x400000
    m.slot(3, read_only, PAGE, anonymous(PAGE), c.KVM_MEM_READONLY)
    m.attributes(read_only, PAGE, PRIVATE)
    m.at(code.READ8, read_only)
    m.run("RO_slot_private_read")
    m.at(code.WRITE8, read_only)
    m.run("RO_slot_private_write")


@scenario("gmem_insb", area=AREA, needs=NEEDS)
def gmem_insb(lab: Lab) -> None:
    """The emulator's accesses to a private page go to the shared memory."""
    m = lab.protected_machine()
    if m is None:
        return
    gmem, host = m.guest_memfd(SIZE).ret, anonymous(SIZE)
    host.put(0, b"\x33" * SIZE)
    m.slot2(1, TEST, SIZE, host, c.KVM_MEM_GUEST_MEMFD, gmem)
    m.attributes(TEST, SIZE, PRIVATE)
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb_private")
    m.pio_data(4)[:] = b"\x44" * 4
    m.run("rep_insb_resume")
    lab.note("emulator_wrote_hva?", hva=host.get(0, 1)[0])
    m.at(code.READ8, TEST)
    m.run("guest_view")
    m.string(code.REP_OUTSB, 0, TEST, 4)
    m.run("rep_outsb_private")
    lab.note("outsb_data", b=m.pio_data(1)[0])


@scenario("gmem_offset", area=AREA, needs=NEEDS)
def gmem_offset(lab: Lab) -> None:
    """A slot bound at an offset sees the same pages as one bound at 0; a bound slot can only be deleted."""
    m = lab.protected_machine()
    if m is None:
        return
    flag = c.KVM_MEM_GUEST_MEMFD
    gmem, host = m.guest_memfd(4 * PAGE).ret, anonymous(4 * PAGE)
    lab.step("bind_off_2p", m.slot2(1, TEST, 2 * PAGE, host, flag, gmem, 2 * PAGE))
    m.attributes(TEST, 4 * PAGE, PRIVATE)
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_page1_of_slot")
    lab.step("delete", m.slot2(1, TEST, 0, host, 0, gmem))
    lab.step("bind_off_0", m.slot2(1, TEST, 4 * PAGE, host, flag, gmem))
    m.at(code.READ8, TEST + 3 * PAGE)
    m.run("read_page3_same_data")
    lab.step("bind_past_end", m.slot2(2, TEST + 0x100000, 2 * PAGE, host, flag, gmem, 3 * PAGE))
    lab.step("flags_change_gmem_slot", m.slot2(1, TEST, 4 * PAGE, host, 0, gmem))
    lab.step("same_args_again", m.slot2(1, TEST, 4 * PAGE, host, flag, gmem))
    lab.step("move_gmem_slot", m.slot2(1, TEST + 0x800000, 4 * PAGE, host, flag, gmem))
