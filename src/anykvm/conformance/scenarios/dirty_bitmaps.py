"""Dirty bitmaps: what dirties a page, how they are read and cleared, and which arguments are refused: ABI.md 4.6."""

from __future__ import annotations

import ctypes
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_clear_dirty_log, kvm_dirty_log
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.dirty_log import dirty_log, record_bits

AREA = "dirty_log"
NEEDS: Final = ("dirty_log",)
_LOG: Final = c.KVM_MEM_LOG_DIRTY_PAGES
_MANUAL: Final = c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
_PAGES: Final = 130
_MOVE_CR3: Final = bytes.fromhex("0f22dfe610f4")  # mov cr3, rdi; out 0x10, al; hlt


def _logged(lab: Lab, pages: int = 16) -> tuple[Machine, Host]:
    m, host = lab.machine(), anonymous(pages * PAGE)
    m.slot(1, TEST, pages * PAGE, host, _LOG)
    return m, host


def _clear(m: Machine, first: int, count: int, bits: int, slot: int = 1) -> Outcome:
    bitmap = (ctypes.c_uint64 * 4)(bits, bits, bits, bits)
    request = kvm_clear_dirty_log(slot=slot, num_pages=count, first_page=first)
    request.dirty_bitmap = ctypes.addressof(bitmap)
    return attempt(m.vm.ioctl, n.KVM_CLEAR_DIRTY_LOG, request)


@scenario("dirty_by_guest", area=AREA, needs=NEEDS)
def dirty_by_guest(lab: Lab) -> None:
    """What makes a page dirty: each kind of write; and a read or fetch where user space's page is writable already."""
    m, host = _logged(lab)
    host.put(15 * PAGE, code.TARGET)
    record_bits(lab, m, "user_space_wrote")
    for page, (step, guest) in enumerate(
        (
            ("read", code.READ8),
            ("write", code.WRITE8),
            ("lock_add", code.LOCK_ADD),
            ("cmpxchg_equal", code.LOCK_CMPXCHG),
            ("movdqu", code.MOVDQU),
            ("fxsave", code.FXSAVE),
            ("push", code.PUSH),
        )
    ):
        m.at(guest, TEST + page * PAGE + 0x100)
        m.run(step)
        record_bits(lab, m, f"after_{step}")
    m.at(code.LOCK_CMPXCHG, TEST, rax=1)
    m.run("cmpxchg_unequal")
    record_bits(lab, m, "after_cmpxchg_unequal")
    m.at(code.JUMP, TEST + 15 * PAGE)
    m.run("fetch")
    record_bits(lab, m, "after_fetch")


@scenario("dirty_by_strings", area=AREA, needs=NEEDS)
def dirty_by_strings(lab: Lab) -> None:
    """REP STOS over three pages, REP INS by KVM's emulator, and a write over the edge of a page."""
    m, _ = _logged(lab)
    m.string(code.REP_STOSB, TEST + PAGE - 8, 0, PAGE + 16)
    m.run("rep_stos")
    record_bits(lab, m, "after_rep_stos")
    m.string(code.REP_INSB, TEST + 5 * PAGE, 0, 4)
    m.run("rep_ins")
    record_bits(lab, m, "at_exit")
    m.run("rep_ins_done")
    record_bits(lab, m, "after_rep_ins")
    m.at(code.WRITE8, TEST + 8 * PAGE - 4)
    m.run("crossing")
    record_bits(lab, m, "after_crossing")
    m.string(code.REP_MOVSB, TEST + 10 * PAGE, CODE, 0)
    m.run("rep_movs_of_nothing")
    record_bits(lab, m, "after_nothing")


@scenario("dirty_page_tables", area=AREA, needs=NEEDS)
def dirty_page_tables(lab: Lab) -> None:
    """Accessed and dirty bits that the walk sets make the table's page dirty."""
    m, table = lab.machine(), anonymous(PAGE)
    m.slot(1, 0x20000000, PAGE, table, _LOG)
    m.slot(2, TEST, 4 * PAGE, anonymous(4 * PAGE))
    layout.map_small_pages(m.memory, TEST, 0x20000000, table)
    table.put64(8, table.get64(8) & ~0x60)
    m.at(code.READ8, TEST + PAGE)
    m.run("read")
    record_bits(lab, m, "accessed_set")
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write")
    record_bits(lab, m, "dirty_set")


@scenario("dirty_read_only", area=AREA, needs=NEEDS)
def dirty_read_only(lab: Lab) -> None:
    """A read-only slot that is logged never has a dirty page."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host, _LOG | c.KVM_MEM_READONLY)
    m.at(code.WRITE8, TEST)
    m.run("write")
    m.run("done")
    record_bits(lab, m, "bits")


@scenario("dirty_log_arguments", area=AREA, needs=NEEDS)
def dirty_log_arguments(lab: Lab) -> None:
    """KVM_GET_DIRTY_LOG: slots that cannot be, are not, or are not logged; a bitmap that cannot be written."""
    m, host = _logged(lab)
    m.slot(2, TEST + 0x100000, PAGE, host)
    for step, slot in (
        ("ok", 1),
        ("not_logged", 2),
        ("absent", 3),
        ("last_id", 32763),
        ("id_too_large", 32764),
        ("other_address_space", 0x10001),
        ("no_such_address_space", 0x20001),
    ):
        lab.step(step, dirty_log(m, slot)[0])
    m.at(code.WRITE8, TEST)
    m.run("write")
    request = kvm_dirty_log(slot=1)
    request.dirty_bitmap = 8
    lab.ioctl("bad_bitmap", m.vm, n.KVM_GET_DIRTY_LOG, request)


@scenario("dirty_log_last_word", area=AREA, needs=NEEDS)
def dirty_log_last_word(lab: Lab) -> None:
    """A bitmap has whole words: 130 pages have three, and nothing behind them is written."""
    m, _ = _logged(lab, _PAGES)
    for page in (0, 63, 64, 129):
        m.at(code.WRITE8, TEST + page * PAGE)
        m.run("write")
    bitmap = (ctypes.c_uint64 * 4)(*(0xAAAAAAAAAAAAAAAA,) * 4)
    request = kvm_dirty_log(slot=1)
    request.dirty_bitmap = ctypes.addressof(bitmap)
    lab.ioctl("GET", m.vm, n.KVM_GET_DIRTY_LOG, request, words=[hex(word) for word in bitmap])
    lab.note("words", words=[hex(word) for word in bitmap])


@scenario("dirty_log_switched", area=AREA, needs=NEEDS)
def dirty_log_switched(lab: Lab) -> None:
    """Switching logging off forgets the bits; moving the slot, or the same flag again, keeps them."""
    m, host = _logged(lab, 4)
    for step, gpa, flags in (
        ("same", TEST, _LOG),
        ("moved", TEST + 0x100000, _LOG),
        ("off", TEST + 0x100000, 0),
        ("on", TEST + 0x100000, _LOG),
    ):
        m.at(code.WRITE8, (TEST if step == "same" else TEST + 0x100000) + PAGE)
        if step != "moved":
            m.run("write")
        lab.step(step, m.slot(1, gpa, 4 * PAGE, host, flags))
        if step == "moved":
            m.run("write_moved")
        if flags:
            record_bits(lab, m, f"bits_{step}")


@scenario("clear_dirty_log_arguments", area=AREA, needs=NEEDS)
def clear_dirty_log_arguments(lab: Lab) -> None:
    """KVM_CLEAR_DIRTY_LOG: ranges begin at a word, and end at one or with the slot; it needs no capability enabled."""
    m, host = _logged(lab, _PAGES)
    m.slot(2, TEST + 0x100000, PAGE, host)
    for step, slot, first, count in (
        ("whole", 1, 0, _PAGES),
        ("a_word", 1, 0, 64),
        ("part_of_a_word", 1, 0, 63),
        ("last_part", 1, 128, 2),
        ("not_to_the_end", 1, 128, 1),
        ("first_unaligned", 1, 1, 64),
        ("first_63", 1, 63, 64),
        ("count_0", 1, 0, 0),
        ("first_at_end", 1, 192, 0),
        ("beyond", 1, 128, 3),
        ("first_beyond", 1, 256, 64),
        ("not_logged", 2, 0, 1),
        ("absent", 3, 0, 64),
        ("no_such_address_space", 0x20001, 0, 64),
    ):
        lab.step(step, _clear(m, first, count, 0, slot))


@scenario("manual_protect_arguments", area=AREA, needs=NEEDS)
def manual_protect_arguments(lab: Lab) -> None:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: values 0, 1 and 3, no flags, at any time."""
    m = lab.machine()
    lab.note("cap", value=m.vm.check_extension(_MANUAL))
    for value in (1, 2, 3, 4, 7, 1 << 63, 0):
        lab.step("enable", attempt(m.vm.enable_cap, _MANUAL, value), value=hex(value))
    lab.step("flags", attempt(m.vm.enable_cap, _MANUAL, 1, flags=1))
    lab.step("on_vcpu", attempt(m.vcpu.enable_cap, _MANUAL, 1))


@scenario("manual_protect", area=AREA, needs=NEEDS)
def manual_protect(lab: Lab) -> None:
    """With it reading keeps the bits; clearing takes those that are named, and the page is logged again."""
    m, _ = _logged(lab)
    lab.step("enable", attempt(m.vm.enable_cap, _MANUAL, 1))
    for page in (1, 3):
        m.at(code.WRITE8, TEST + page * PAGE)
        m.run("write")
    record_bits(lab, m, "first")
    record_bits(lab, m, "second")
    lab.step("clear_page_1", _clear(m, 0, 16, 0b10))
    record_bits(lab, m, "page_1_cleared")
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_again")
    record_bits(lab, m, "dirty_again")
    lab.step("clear_what_is_clean", _clear(m, 0, 16, 0b100))
    record_bits(lab, m, "unchanged")


@scenario("initially_set", area=AREA, needs=NEEDS)
def initially_set(lab: Lab) -> None:
    """KVM_DIRTY_LOG_INITIALLY_SET: a slot that is logged from now on begins with every bit set."""
    m, host = lab.machine(), anonymous(70 * PAGE)
    lab.step("enable", attempt(m.vm.enable_cap, _MANUAL, 3))
    m.slot(1, TEST, 70 * PAGE, host, _LOG)
    bitmap = (ctypes.c_uint64 * 2)()
    request = kvm_dirty_log(slot=1)
    request.dirty_bitmap = ctypes.addressof(bitmap)
    lab.ioctl("GET", m.vm, n.KVM_GET_DIRTY_LOG, request)
    lab.note("words", words=[hex(word) for word in bitmap])
    lab.step("clear", _clear(m, 0, 64, (1 << 64) - 1))
    m.at(code.WRITE8, TEST + 5 * PAGE)
    m.run("write")
    lab.ioctl("GET_after", m.vm, n.KVM_GET_DIRTY_LOG, request)
    lab.note("words_after", words=[hex(word) for word in bitmap])
