"""Guest page tables that no slot has, met by a fetch, a delivery, and instructions of several kinds: ABI.md 3.3.

With nested paging KVM learns the address of the table's entry, and emulates the instruction that was about to use it.
"""

from __future__ import annotations

from typing import Final

from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, anonymous, inaccessible
from anykvm.conformance.layout import CODE, HANDLERS, IDT, PAGE_DIRECTORIES, PML4, STACK, TEST, TSS
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import catch_error_code, compatibility_mode
from anykvm.conformance.scenario import Lab, scenario

AREA = "table_walks"
_NO_SLOT: Final = 0x30000000
_VIRTUAL: Final = 1 << 39
"""What the second entry of the PML4 maps."""
_SHORT: Final = 0.5
_IST1: Final = 0x24
_PAGE_FAULT: Final = 14
_FLD: Final = bytes.fromhex("d907e610f4")  # fld dword ptr [rdi]; out 0x10, al; hlt
_STOSQ: Final = bytes.fromhex("48ab e610f4")  # stosq; out 0x10, al; hlt
_PUSH: Final = bytes.fromhex("4889fc 53 e610f4")  # mov rsp, rdi; push rbx; out 0x10, al; hlt
_PUSHA: Final = bytes.fromhex("89fc60e610f4")  # mov esp, edi; pusha; out 0x10, al; hlt


def _machine(lab: Lab) -> Machine:
    """Make a machine whose table for ``_VIRTUAL`` no slot has, and whose page faults report their error code."""
    m = lab.machine()
    catch_error_code(m, _PAGE_FAULT)
    m.memory.put64(PML4 + 8, _NO_SLOT | 7)
    return m


@scenario("walk_fetch", area=AREA)
def walk_fetch(lab: Lab) -> None:
    """A jump to where the table has no slot: KVM tries again until a signal comes; with the table there it goes on."""
    m = _machine(lab)
    m.at(code.JUMP, _VIRTUAL + CODE + 0x300)
    m.run("jump", timeout=_SHORT)
    m.memory.put(CODE + 0x300, code.TARGET)
    table = anonymous(PAGE)
    table.put64(0, PAGE_DIRECTORIES | 7)
    m.slot(1, _NO_SLOT, PAGE, table)
    m.run("table_there")


@scenario("walk_delivery", area=AREA)
def walk_delivery(lab: Lab) -> None:
    """An exception whose gate is mapped by a table that no slot has, and one whose stack is."""
    m = _machine(lab)
    sregs = m.vcpu.get_sregs()
    sregs.idt.base = _VIRTUAL + IDT
    m.vcpu.set_sregs(sregs)
    m.at(code.UD2)
    m.run("gate", timeout=_SHORT)
    m = _machine(lab)
    m.at(code.INT3_ON_STACK, _VIRTUAL + STACK)
    m.run("stack", timeout=_SHORT)


@scenario("walk_operands", area=AREA)
def walk_operands(lab: Lab) -> None:
    """Instructions whose operand's table has no slot: a page fault; or no emulation, for what KVM's emulator has not.

    If operand and entry lie at the same offset of their pages, KVM takes the entry's address for the operand's, unless
    the instruction has two operands in memory or is a repeated string instruction (emulator_can_use_gpa()).
    """
    m = _machine(lab)
    for offset, name in ((0x128, "other"), (0, "same")):
        at = _VIRTUAL + CODE + offset
        for step, guest in (
            ("read", code.READ8),
            ("read_byte", code.READ1),
            ("write", code.WRITE8),
            ("cmpxchg", code.LOCK_CMPXCHG),
            ("fld", _FLD),
            ("stosq", _STOSQ),
        ):
            m.at(guest, at)
            m.run(f"{step}_{name}")
        m.string(code.REP_STOSB, at, 0, 4)
        m.run(f"rep_stosb_{name}")
        m.string(code.MOVSQ, STACK, at, 0)
        m.run(f"movsq_from_{name}")
        m.at(code.PUSH_MEMORY, STACK, rsi=at)
        m.run(f"push_memory_{name}")
    m.at(_PUSH, _VIRTUAL + CODE + 8)
    m.run("push_same")


@scenario("abandoned_mmio_kept", area=AREA)
def abandoned_mmio_kept(lab: Lab) -> None:
    """PUSHA over a device into pages whose table no slot has: the writes are dropped, but exit_reason stays.

    T14. The processor stores from the lowest address on and so meets the table; KVM's emulator pushes from the highest
    on and so meets the device, then the page fault. Its handler reads memory that the host does not have: EFAULT.
    """
    m, host = _machine(lab), inaccessible(PAGE)
    boundary, unbacked = TEST + 0x200000, TEST + 0x400000
    directory = PAGE_DIRECTORIES + (boundary >> 30) * PAGE
    m.memory.put64(directory + 8 * ((boundary - 1) >> 21 & 511), _NO_SLOT | 7)
    m.slot(1, unbacked, PAGE, host)
    m.memory.put(
        HANDLERS + 16 * _PAGE_FAULT, b"\xa0" + unbacked.to_bytes(8, "little") + code.TARGET
    )  # mov al, [unbacked]
    m.memory.put64(TSS + _IST1, STACK)
    gate = IDT + 16 * _PAGE_FAULT
    m.memory.put64(gate, m.memory.get64(gate) | 1 << 32)
    compatibility_mode(m)
    m.at(_PUSHA, boundary + 16)
    m.run("handler_faults")
    m.run("and_again")
    host.protect(READ_WRITE)
    m.run("handler_done")


def _gdt_elsewhere(m: Machine, gdt: int, ldt: int) -> None:
    sregs = m.vcpu.get_sregs()
    sregs.gdt.base = gdt
    sregs.ldt.base, sregs.ldt.limit, sregs.ldt.selector = ldt, 0xFF, 0x28
    sregs.ldt.present, sregs.ldt.type, sregs.ldt.s, sregs.ldt.unusable = 1, 2, 0, 0
    m.vcpu.set_sregs(sregs)


@scenario("descriptors_no_slot", area=AREA)
def descriptors_no_slot(lab: Lab) -> None:
    """What reads a descriptor from a GDT or LDT that no slot has: tried again until a signal comes, or not emulated.

    An operand in the same place is a device's. Last, an exception's gate, whose segment is there.
    """
    m = lab.machine()
    _gdt_elsewhere(m, TEST, TEST + 0x1000)
    for step, hexadecimal in (
        ("mov_fs_ldt", "b814000000 8ee0"),  # mov eax, 0x14; mov fs, ax
        ("pop_gs", "6a10 0fa9"),  # push 0x10; pop gs
        ("lldt", "b828000000 0f00d0"),
        ("ltr", "b818000000 0f00d8"),
        ("retf", "6a08 6800000300 48cb"),  # push 8; push 0x30000; retfq
        ("far_jump", "ff2f"),  # jmp far [rdi]
        ("far_call", "ff1f"),  # call far [rdi]
        ("lfs", "0fb427"),  # lfs esp, [rdi]
        ("verr", "b810000000 0f00e0"),
        ("lar", "b810000000 0f02c8"),
        ("lsl", "b810000000 0f03c8"),
        ("iretq", "6a10 6800000300 6a02 6a08 6800000100 48cf"),
        ("null", "31c0 8ed8"),  # xor eax, eax; mov ds, ax
    ):
        m.at(bytes.fromhex(hexadecimal) + code.TARGET, STACK)
        m.memory.put64(STACK, 8 << 32 | HANDLERS)
        m.run(step, timeout=_SHORT)
    m.at(code.READ8, TEST + 0x10)
    m.run("operand")
    m = lab.machine()
    _gdt_elsewhere(m, TEST, TEST + 0x1000)
    m.at(code.UD2)
    m.run("gate", timeout=_SHORT)
