"""Addresses that no slot has, met by something else than a plain load or store: ABI.md 3.3."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, READ_WRITE, anonymous
from anykvm.conformance.layout import GDT, IDT, PML4, TEST, TSS
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import USER_IOPL, catch_error_code, compatibility_mode, user_mode
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE

AREA = "no_slot"
_TABLES: Final = 0x20000000
_NO_SLOT: Final = 0x30000000
_IST1: Final = 0x24
_SHORT: Final = 0.1
_PUSHA: Final = bytes.fromhex("89fc60e610f4")  # mov esp, edi; pusha; out 0x10, al; hlt
_CALL: Final = bytes.fromhex("ffd7e610f4")  # call rdi; out 0x10, al; hlt
_RET: Final = bytes.fromhex("4889fcc3")  # mov rsp, rdi; ret
_IRETQ: Final = bytes.fromhex("4889fc48cf")  # mov rsp, rdi; iretq
_WRMSR_CLOCK: Final = bytes.fromhex("4889c248c1ea200f30e610f4")  # mov rdx, rax; shr rdx, 32; wrmsr; out 0x10, al; hlt
_FLDS: Final = bytes.fromhex("d907e610f4")  # fld dword ptr [rdi]; out 0x10, al; hlt


@scenario("fetch_no_slot_user", area=AREA)
def fetch_no_slot_user(lab: Lab) -> None:
    """A fetch from ring 3 where there is no slot is #UD for the guest, not an exit."""
    m = lab.machine()
    user_mode(m)
    m.at(code.JUMP, TEST, rflags=USER_IOPL)
    m.run("fetch")


@scenario("fetch_no_slot_crossing", area=AREA)
def fetch_no_slot_crossing(lab: Lab) -> None:
    """An instruction that begins in a slot and ends where there is none; and one that just fits before its end."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    host.put(PAGE - 2, bytes.fromhex("e612"))  # out 0x12, al
    m.at(code.JUMP, TEST + PAGE - 2)
    m.run("fits")
    m.run("next_has_no_slot")
    host.put(PAGE - 3, bytes.fromhex("48b801"))  # mov rax, ...
    m.at(code.JUMP, TEST + PAGE - 3)
    m.run("crosses")


@scenario("call_and_return_no_slot", area=AREA)
def call_and_return_no_slot(lab: Lab) -> None:
    """CALL to no slot has pushed its return address; RET and IRET read their stack from a device."""
    m = lab.machine()
    m.at(_CALL, TEST)
    m.run("call")
    m.memory.put(layout.CODE + 0x300, code.TARGET)
    m.at(_RET, TEST)
    m.run("ret")
    m.answer_mmio(layout.CODE + 0x300)
    m.run("ret_done")
    m.at(_IRETQ, TEST)
    m.run("iret")


@scenario("idt_no_slot", area=AREA)
def idt_no_slot(lab: Lab) -> None:
    """An exception whose gate lies where there is no slot: KVM cannot emulate a delivery (suberror 3)."""
    m = lab.machine()
    sregs = m.vcpu.get_sregs()
    sregs.idt.base = TEST
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    outcome = m.run("ud2")
    lab.note("said", ret=outcome.ret, suberror=m.run_page.internal.suberror)
    sregs = m.vcpu.get_sregs()
    sregs.idt.base = IDT
    m.vcpu.set_sregs(sregs)
    m.run("idt_back")


@scenario("idt_read_only", area=AREA)
def idt_read_only(lab: Lab) -> None:
    """An IDT in a read-only slot is read like any other."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put(0, m.memory.get(IDT, PAGE))
    m.slot(1, TEST, PAGE, host, c.KVM_MEM_READONLY)
    sregs = m.vcpu.get_sregs()
    sregs.idt.base = TEST
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    m.run("ud2")


@scenario("exception_stack_no_slot", area=AREA)
def exception_stack_no_slot(lab: Lab) -> None:
    """An exception whose stack has no slot, or a read-only one: the delivery meets a device."""
    m = lab.machine()
    m.at(code.INT3_ON_STACK, TEST + 0x800)
    m.run("int3")
    m.slot(1, TEST + 0x100000, PAGE, anonymous(PAGE), c.KVM_MEM_READONLY)
    m.at(code.UD2, rsp=TEST + 0x100800)
    m.run("ud2_read_only")


@scenario("gdt_no_slot", area=AREA)
def gdt_no_slot(lab: Lab) -> None:
    """A segment register loaded from a GDT that no slot has: KVM's emulator reads no descriptor from a device."""
    m = lab.machine()
    sregs = m.vcpu.get_sregs()
    sregs.gdt.base = TEST
    m.vcpu.set_sregs(sregs)
    m.at(code.LOAD_DS)
    m.run("load", timeout=_SHORT)


@scenario("gdt_read_only", area=AREA)
def gdt_read_only(lab: Lab) -> None:
    """A descriptor in a read-only slot can be loaded if its accessed bit is set; KVM's emulator cannot set it there."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put(0, m.memory.get(GDT, 0x40))
    m.slot(1, TEST, PAGE, host, c.KVM_MEM_READONLY)
    sregs = m.vcpu.get_sregs()
    sregs.gdt.base = TEST
    m.vcpu.set_sregs(sregs)
    m.at(code.LOAD_DS)
    m.run("accessed")
    host.put64(layout.DATA_SELECTOR, 0x00CF92000000FFFF)
    m.at(code.LOAD_DS)
    m.run("not_accessed", timeout=_SHORT)
    lab.note("descriptor", value=hex(host.get64(layout.DATA_SELECTOR)))


@scenario("tss_no_slot", area=AREA)
def tss_no_slot(lab: Lab) -> None:
    """A TSS that no slot has is missed when ring 3 takes an exception: its stack pointer cannot be read."""
    m = lab.machine()
    user_mode(m)
    sregs = m.vcpu.get_sregs()
    sregs.tr.base = TEST
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2, rflags=USER_IOPL)
    m.run("ud2")


@scenario("kvmclock_no_slot", area=AREA, needs=("paravirtual",))
def kvmclock_no_slot(lab: Lab) -> None:
    """KVM's own clock in memory that no slot has: the WRMSR is taken or #GP, never a failed KVM_RUN."""
    m = lab.machine()
    for name, msr, value in (
        ("SYSTEM_TIME_NEW", 0x4B564D01, TEST | 1),
        ("SYSTEM_TIME_off", 0x4B564D01, 0),
        ("WALL_CLOCK_NEW", 0x4B564D00, TEST),
        ("STEAL_TIME", 0x4B564D03, TEST | 1),
        ("STEAL_TIME_reserved", 0x4B564D03, TEST | 2),
    ):
        m.at(_WRMSR_CLOCK, rcx=msr, rax=value)
        m.run(name)


@scenario("emulation_failure_user", area=AREA)
def emulation_failure_user(lab: Lab) -> None:
    """In ring 3 an instruction that KVM does not emulate is #UD for the guest."""
    m = lab.machine()
    user_mode(m)
    m.at(_FLDS, TEST, rflags=USER_IOPL)
    m.run("without_cap")


@scenario("exit_on_emulation_failure", area=AREA, needs=("quirks",))
def exit_on_emulation_failure(lab: Lab) -> None:
    """With KVM_CAP_EXIT_ON_EMULATION_FAILURE ring 3 makes an exit as well."""
    m = lab.machine()
    enabled = lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1))
    lab.step("enable_2", attempt(m.vm.enable_cap, c.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2))
    if enabled.failed:
        return
    user_mode(m)
    m.at(_FLDS, TEST, rflags=USER_IOPL)
    m.run("fld")


@scenario("page_walk_levels", area=AREA)
def page_walk_levels(lab: Lab) -> None:
    """Tables of the upper levels: in host memory that is not there EFAULT, without a slot a page fault of the guest.

    Linux 7.3 takes the table's address for the operand's, if both lie at the same offset of their pages.
    """
    m, tables = lab.machine(), anonymous(2 * PAGE)
    catch_error_code(m, 14)
    m.slot(1, _TABLES, 2 * PAGE, tables)
    tables.put64(0, _TABLES + PAGE | 7)  # PDPT, then directory: the 2 MiB at 1 << 39 are the first of memory
    tables.put64(PAGE, 0xE7)
    m.memory.put64(PML4 + 8, _TABLES | 7)
    virtual = (1 << 39) + layout.CODE + 0x128
    for name, page, entry, host in (("pdpt", 0, PML4 + 8, m.memory), ("directory", PAGE, 0, tables)):
        original = host.get64(entry)
        _flush(m)
        m.at(code.READ8, virtual)
        m.run(f"{name}_there")
        tables.protect(PROT_NONE, page, PAGE)
        _flush(m)
        m.at(code.READ8, virtual)
        m.run(f"{name}_not_there")
        tables.protect(READ_WRITE, page, PAGE)
        m.run(f"{name}_back")
        host.put64(entry, _NO_SLOT | 7)
        _flush(m)
        m.at(code.READ8, virtual)
        m.run(f"{name}_no_slot")
        m.at(code.READ8, virtual & ~0xFFF)
        m.run(f"{name}_no_slot_same_offset")
        host.put64(entry, original)


def _flush(m: Machine) -> None:
    m.at(code.LOAD_CR3, PML4)
    m.run("flush")


@scenario("gpa_beyond_physical", area=AREA)
def gpa_beyond_physical(lab: Lab) -> None:
    """A page table entry with an address beyond the processor's: reserved bits, so a page fault that says so."""
    m, table = lab.machine(), anonymous(PAGE)
    catch_error_code(m, 14)
    m.slot(1, _TABLES, PAGE, table)
    layout.map_small_pages(m.memory, TEST, _TABLES, table)
    table.put64(8, 1 << 51 | 0x67)
    table.put64(16, (1 << 39) | 0x67)
    m.at(code.READ8, TEST + PAGE)
    m.run("beyond")
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("highest_bit_is_a_device")


@scenario("abandoned_mmio_then_fault", area=AREA)
def abandoned_mmio_then_fault(lab: Lab) -> None:
    """PUSHA that reaches from a device into a page the guest has not mapped: its device writes are dropped (T14).

    The page fault's stack then is memory the host does not have: EFAULT, with what exit_reason has become so far.
    """
    m, table, host = lab.machine(), anonymous(PAGE), anonymous(PAGE)
    catch_error_code(m, 14)
    m.slot(1, _TABLES, PAGE, table)
    m.slot(2, TEST + 0x200000, PAGE, host)
    layout.map_small_pages(m.memory, TEST, _TABLES, table)
    table.put64(0, 0)
    m.memory.put64(TSS + _IST1, TEST + 0x200000 + 0x800)
    m.memory.put64(IDT + 14 * 16, m.memory.get64(IDT + 14 * 16) | 1 << 32)
    compatibility_mode(m)
    m.at(_PUSHA, TEST + PAGE + 16)
    m.run("page_fault")
    host.protect(PROT_NONE)
    compatibility_mode(m)
    m.at(_PUSHA, TEST + PAGE + 16)
    m.run("page_fault_stack_not_there")
    host.protect(READ_WRITE)
    m.run("stack_there")
