"""Guest page tables in memory that is not there, may not be written, or has no slot."""

from __future__ import annotations

from anykvm.abi.constants import KVM_MEM_READONLY
from anykvm.abi.ioctls import KVM_TRANSLATE
from anykvm.abi.structures import kvm_translation
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous
from anykvm.conformance.layout import CODE, PML4, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE, PROT_READ

AREA = "page_tables"
TABLE = 0x20000000
NO_SLOT = 0x30000000
_ACCESSED_DIRTY = 0x60


@scenario("pt_unbacked", area=AREA)
def pt_unbacked(lab: Lab) -> None:
    """The table that maps TEST is protected, unmapped, without a slot, and in a read-only slot."""
    m, host, table = lab.machine(), anonymous(4 * PAGE), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host)
    m.slot(2, TABLE, 4 * PAGE, table)
    layout.map_small_pages(m.memory, TEST, TABLE, table)
    saved = table.get(0, PAGE)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("backed_read")
    table.protect(PROT_NONE)
    m.registers()
    _flush(m)
    for guest, address, step in (
        (code.READ8, TEST + 0x128, "PT_page_PROT_NONE_read"),
        (code.WRITE8, TEST + 0x128, "PT_page_PROT_NONE_write"),
        (code.JUMP, TEST, "PT_page_PROT_NONE_exec"),
    ):
        m.at(guest, address)
        m.run(step)
    table.protect(PROT_READ)
    m.at(code.READ8, TEST + 0x128)
    m.run("PT_page_PROT_READ_read")
    m.at(code.WRITE8, TEST + PAGE + 0x128)
    m.run("PT_page_PROT_READ_write")
    table.protect(READ_WRITE)
    m.run("fixed_resume")
    lab.note("pte", pte1=hex(table.get64(8)))
    _unmapped(lab, m, table, saved)
    _no_slot(m)
    _read_only(m, table)


def _unmapped(lab: Lab, m: Machine, table: Host, saved: bytes) -> None:
    _clear_accessed(table, 3)
    table.protect(PROT_READ)
    _flush(m)
    m.at(code.READ8, TEST + 3 * PAGE)
    m.run("A_bit_clear_PT_PROT_READ_read")
    table.unmap(0, PAGE)
    m.at(code.READ8, TEST + 0x128)
    m.run("cached_or_fault")
    _flush(m)
    m.at(code.READ8, TEST + 0x128)
    m.run("PT_page_unmapped_read")
    translation = kvm_translation(linear_address=TEST)
    outcome = attempt(lambda: m.vcpu.ioctl(KVM_TRANSLATE, translation))
    physical = hex(translation.physical_address)
    lab.step("KVM_TRANSLATE_unbacked_PT", outcome, valid=translation.valid, pa=physical)
    table.fix(0, PAGE)
    table.put(0, saved)
    m.run("PT_remapped_resume")


def _no_slot(m: Machine) -> None:
    m.delete_slot(2)
    _flush(m)
    m.at(code.READ8, TEST + 0x128)
    m.run("PT_page_no_slot_read")
    m.run("PT_page_no_slot_resume")


def _read_only(m: Machine, table: Host) -> None:
    m.slot(2, TABLE, 4 * PAGE, table, KVM_MEM_READONLY)
    _flush(m, "flush2")
    m.at(code.READ8, TEST + 0x128)
    m.run("PT_in_RO_slot_A_set_read")
    _clear_accessed(table, 2)
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("PT_in_RO_slot_A_clear_read")
    m.run("PT_in_RO_slot_A_clear_resume")


def _flush(m: Machine, step: str = "flush") -> None:
    """Let the guest load CR3, which forgets its translations."""
    m.at(code.LOAD_CR3, PML4)
    m.run(step)


def _clear_accessed(table: Host, entry: int) -> None:
    table.put64(8 * entry, table.get64(8 * entry) & ~_ACCESSED_DIRTY)


@scenario("cr3_unbacked", area=AREA)
def cr3_unbacked(lab: Lab) -> None:
    """CR3 names a page that is not there; then the page of the code itself is gone, then all memory."""
    m, top = lab.machine(), anonymous(PAGE)
    top.put(0, m.memory.get(PML4, PAGE))
    m.slot(2, TABLE, PAGE, top)
    top.protect(PROT_NONE)
    m.at(code.LOAD_CR3, TABLE)
    m.run("mov_cr3_to_unbacked_PML4")
    top.protect(READ_WRITE)
    m.run("fixed_resume")
    m.at(code.LOAD_CR3, NO_SLOT)
    m.run("mov_cr3_to_no_slot")
    m.run("again")
    sregs = m.vcpu.get_sregs()
    sregs.cr3 = NO_SLOT
    lab.step("SET_SREGS_cr3_no_slot", lambda: m.vcpu.set_sregs(sregs))

    m = lab.machine()
    m.at(code.OUT_OUT)
    m.memory.unmap(CODE, PAGE)
    m.registers()
    m.run("code_page_unmapped")
    m.memory.fix(CODE, PAGE)
    m.memory.put(CODE, code.OUT_OUT)
    m.run("code_remapped")
    m.drain()
    m.memory.protect(PROT_NONE)
    m.registers()
    m.run("everything_PROT_NONE")
    m.memory.protect(READ_WRITE)
    m.run("everything_back")
