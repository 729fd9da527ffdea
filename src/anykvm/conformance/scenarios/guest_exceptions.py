"""Exceptions the guest takes by itself: which vector, which error code, which CR2; and those that end it."""

from __future__ import annotations

from typing import Final

from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import IDT, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import USER_IOPL, catch_error_code, user_mode
from anykvm.conformance.scenario import Lab, scenario

AREA = "guest_exceptions"
_TABLE: Final = 0x20000000
_NO_EXECUTE: Final = 1 << 63
_WRITE_PROTECT: Final = 1 << 16
_DIVIDE: Final = bytes.fromhex("31c9f7f1")  # xor ecx, ecx; div ecx
_OVERFLOW: Final = bytes.fromhex("cd04")  # int 4
_INT_40: Final = bytes.fromhex("cd40")  # int 0x40
_INT_ABOVE: Final = bytes.fromhex("cdff")  # int 0xff
_LOAD_DS: Final = bytes.fromhex("8ed8e610f4")  # mov ds, eax; out 0x10, al; hlt
_LOAD_SS: Final = bytes.fromhex("8ed0e610f4")  # mov ss, eax; out 0x10, al; hlt
_X87: Final = bytes.fromhex("d9e8e610f4")  # fld1; out 0x10, al; hlt
_SSE: Final = bytes.fromhex("0f57c0e610f4")  # xorps xmm0, xmm0; out 0x10, al; hlt
_UNALIGNED: Final = bytes.fromhex("8b07e610f4")  # mov eax, [rdi]; out 0x10, al; hlt
_SSE_UNALIGNED: Final = bytes.fromhex("0f2807e610f4")  # movaps xmm0, [rdi]; out 0x10, al; hlt
_CLI: Final = bytes.fromhex("fae610f4")  # cli; out 0x10, al; hlt
_HLT: Final = bytes.fromhex("f4")  # hlt
_MOV_CR3: Final = bytes.fromhex("0f22d8")  # mov cr3, rax
_LOCK_MOV: Final = bytes.fromhex("f0 8907")  # lock mov [rdi], eax, which is no instruction
_LONG: Final = bytes((0x66,)) * 15 + b"\x90"
_MOV_DR5: Final = bytes.fromhex("0f21e8e610f4")  # mov rax, dr5; out 0x10, al; hlt
_BAD_CR0: Final = bytes.fromhex("b8000000800f22c0e610f4")  # mov eax, 0x80000000; mov cr0, rax; out 0x10, al; hlt
_BAD_CR4: Final = bytes.fromhex(
    "0f20e0480fbae81f0f22e0e610f4"
)  # mov rax, cr4; bts rax, 31; mov cr4, rax; out 0x10, al; hlt
_IRET_BAD: Final = bytes.fromhex("6a33549c6a305748cf")  # push 0x33; push rsp; pushf; push 0x30; push rdi; iretq


def _pages(lab: Lab) -> tuple[Machine, Host]:
    """Make a machine whose TEST has small pages: 0 plain, 1 absent, 2 read-only, 3 supervisor, 4 not executable."""
    m, table, host = lab.machine(), anonymous(PAGE), anonymous(8 * PAGE)
    m.slot(1, _TABLE, PAGE, table)
    m.slot(2, TEST, 8 * PAGE, host)
    layout.map_small_pages(m.memory, TEST, _TABLE, table)
    for page, clear, add in ((1, 1, 0), (2, 2, 0), (3, 4, 0), (4, 0, _NO_EXECUTE), (5, 0, 1 << 50)):
        table.put64(8 * page, table.get64(8 * page) & ~clear | add)
    for page in range(8):
        host.put(page * PAGE, code.TARGET)
    catch_error_code(m, 14)
    return m, table


@scenario("page_fault_codes", area=AREA)
def page_fault_codes(lab: Lab) -> None:
    """The page fault's error code and CR2 in ring 0, for each reason and kind of access."""
    m, _ = _pages(lab)
    for step, guest, page in (
        ("read_absent", code.READ8, 1),
        ("write_absent", code.WRITE8, 1),
        ("fetch_absent", code.JUMP, 1),
        ("write_read_only", code.WRITE8, 2),
        ("fetch_no_execute", code.JUMP, 4),
        ("read_reserved", code.READ8, 5),
        ("read_plain", code.READ8, 0),
    ):
        m.at(guest, TEST + page * PAGE + 0x123)
        m.run(step)
    m.at(code.WRITE8, TEST + 2 * PAGE - 4)
    m.run("write_crossing_two_faults")
    m.at(code.READ8, TEST + PAGE - 4)
    m.run("read_crossing_into_absent")


@scenario("page_fault_codes_user", area=AREA)
def page_fault_codes_user(lab: Lab) -> None:
    """The same in ring 3, where supervisor pages fault too."""
    m, _ = _pages(lab)
    user_mode(m)
    sregs = m.vcpu.get_sregs()
    for step, guest, page in (
        ("read_absent", code.READ8, 1),
        ("write_read_only", code.WRITE8, 2),
        ("read_supervisor", code.READ8, 3),
        ("write_supervisor", code.WRITE8, 3),
        ("fetch_supervisor", code.JUMP, 3),
        ("fetch_no_execute", code.JUMP, 4),
        ("read_plain", code.READ8, 0),
    ):
        m.vcpu.set_sregs(sregs)
        m.at(guest, TEST + page * PAGE, rflags=USER_IOPL)
        m.run(step)


@scenario("write_protect_off", area=AREA)
def write_protect_off(lab: Lab) -> None:
    """With CR0.WP clear ring 0 may write a read-only page; its dirty bit is set."""
    m, table = _pages(lab)
    sregs = m.vcpu.get_sregs()
    sregs.cr0 &= ~_WRITE_PROTECT
    m.vcpu.set_sregs(sregs)
    table.put64(16, table.get64(16) & ~0x60)
    m.at(code.WRITE8, TEST + 2 * PAGE)
    m.run("write")
    lab.note("entry", flags=hex(table.get64(16) & 0xFFF))


@scenario("accessed_and_dirty", area=AREA)
def accessed_and_dirty(lab: Lab) -> None:
    """Reading sets an entry's accessed bit, writing the dirty bit as well; a failed access sets neither."""
    m, table = _pages(lab)
    for page in range(8):
        table.put64(8 * page, table.get64(8 * page) & ~0x60)
    for step, guest, page in (
        ("read", code.READ8, 0),
        ("write", code.WRITE8, 6),
        ("write_read_only", code.WRITE8, 2),
        ("fetch", code.JUMP, 7),
    ):
        m.at(guest, TEST + page * PAGE)
        m.run(step)
        lab.note("entry", flags=hex(table.get64(8 * page) & 0xFFF))


@scenario("exceptions_plain", area=AREA)
def exceptions_plain(lab: Lab) -> None:
    """Exceptions without an error code: divide, overflow, software interrupts, opcodes that do not exist."""
    m = lab.machine()
    for step, guest in (
        ("divide", _DIVIDE),
        ("int_4", _OVERFLOW),
        ("int_40", _INT_40),
        ("int_ff", _INT_ABOVE),
        ("ud2", code.UD2),
        ("lock_mov", _LOCK_MOV),
        ("mov_dr5", _MOV_DR5),
    ):
        m.at(guest, TEST)
        m.run(step)


@scenario("exceptions_general_protection", area=AREA)
def exceptions_general_protection(lab: Lab) -> None:
    """#GP and its kin with their error codes: selectors, addresses that are not canonical, privilege, registers."""
    m = lab.machine()
    for vector in (10, 11, 12, 13):
        catch_error_code(m, vector)
    m.memory.put64(layout.GDT + 0x30, 0x00CF13000000FFFF)  # a data segment that is not present
    sregs = m.vcpu.get_sregs()
    for step, guest, rdi, rax in (
        ("selector_beyond_gdt", _LOAD_DS, 0, 0x48),
        ("selector_not_present", _LOAD_DS, 0, 0x30),
        ("null_selector_ds", _LOAD_DS, 0, 0),
        ("code_as_stack", _LOAD_SS, 0, 8),
        ("not_canonical", code.READ8, 1 << 63, 0),
        ("stack_not_canonical", code.PUSH, 1 << 63, 0),
        ("movaps_unaligned", _SSE_UNALIGNED, layout.CODE + 1, 0),
        ("15_prefixes", _LONG, 0, 0),
        ("cr0_PG_without_PE", _BAD_CR0, 0, 0),
        ("cr4_reserved", _BAD_CR4, 0, 0),
        ("iret_to_bad_selector", _IRET_BAD, 0, 0),
    ):
        m.vcpu.set_sregs(sregs)
        m.at(guest, rdi, rax=rax)
        m.run(step)


@scenario("exceptions_user", area=AREA)
def exceptions_user(lab: Lab) -> None:
    """What ring 3 must not do: privileged instructions, gates of ring 0; and unaligned accesses with AC set."""
    m = lab.machine()
    user_mode(m)
    sregs = m.vcpu.get_sregs()
    sregs.cr0 |= 1 << 18
    for vector in (13, 17):
        catch_error_code(m, vector)
    for step, guest, rdi, rflags in (
        ("hlt", _HLT, 0, USER_IOPL),
        ("mov_cr3", _MOV_CR3, 0, USER_IOPL),
        ("cli_iopl_0", _CLI, 0, 2),
        ("int_40_gate_of_ring_0", _INT_40, 0, USER_IOPL),
        ("unaligned", _UNALIGNED, layout.CODE + 1, USER_IOPL | 1 << 18),
        ("aligned", _UNALIGNED, layout.CODE + 4, USER_IOPL | 1 << 18),
        ("ud2", code.UD2, 0, USER_IOPL),
    ):
        m.vcpu.set_sregs(sregs)
        m.at(guest, rdi, rflags=rflags)
        m.run(step)


@scenario("exceptions_fpu", area=AREA)
def exceptions_fpu(lab: Lab) -> None:
    """#NM with TS or EM, #UD for SSE with EM, or without OSFXSR."""
    m = lab.machine()
    original = m.vcpu.get_sregs()
    for step, guest, cr0, cr4_clear in (
        ("x87_ts", _X87, 8, 0),
        ("sse_ts", _SSE, 8, 0),
        ("x87_em", _X87, 4, 0),
        ("sse_em", _SSE, 4, 0),
        ("sse_no_osfxsr", _SSE, 0, 1 << 9),
    ):
        sregs = m.vcpu.get_sregs()
        sregs.cr0, sregs.cr4 = original.cr0 | cr0, original.cr4 & ~cr4_clear
        m.vcpu.set_sregs(sregs)
        m.at(guest)
        m.run(step)


@scenario("double_fault", area=AREA)
def double_fault(lab: Lab) -> None:
    """A page fault whose gate is not present is a double fault; without its gate too, the end."""
    m, _ = _pages(lab)
    catch_error_code(m, 8)
    m.memory.put64(IDT + 14 * 16, 0)
    m.at(code.READ8, TEST + PAGE)
    m.run("double")
    m.memory.put64(IDT + 8 * 16, 0)
    m.at(code.READ8, TEST + PAGE)
    m.run("triple")


@scenario("shutdown_then_run", area=AREA)
def shutdown_then_run(lab: Lab) -> None:
    """After a triple fault on SVM the vCPU has been reset: where it stands, and that it can be set up anew."""
    m = lab.machine()
    sregs = m.vcpu.get_sregs()
    good = m.vcpu.get_sregs()
    sregs.idt.limit = 0
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    m.run("shutdown")
    got = m.vcpu.get_sregs()
    lab.note("reset", cr0=hex(got.cr0), cs=hex(got.cs.base), efer=hex(got.efer), rip=hex(m.vcpu.get_regs().rip))
    m.vcpu.set_sregs(good)
    m.at(code.OUT_OUT)
    m.run("set_up_anew")


@scenario("delivery_crosses_pages", area=AREA)
def delivery_crosses_pages(lab: Lab) -> None:
    """An exception frame over two pages of which the lower is not there: nothing of it is kept, and it comes again."""
    m, host = lab.machine(), anonymous(2 * PAGE)
    m.slot(1, TEST, 2 * PAGE, host)
    host.unmap(0, PAGE)
    m.at(code.UD2, rsp=TEST + PAGE + 16)
    m.run("delivery")
    lab.note("events", injected=m.vcpu.get_vcpu_events().exception.injected)
    host.fix(0, PAGE)
    m.run("delivered")
    lab.note("frame", rip=hex(host.get64(PAGE - 24)))
