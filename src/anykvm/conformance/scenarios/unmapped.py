"""Guest accesses to a memslot whose host address range has no mapping."""

from __future__ import annotations

from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario

AREA = "unmapped"
SIZE = 16 * PAGE


def unbacked(lab: Lab) -> tuple[Machine, Host]:
    """Make a machine with a slot at TEST whose host mapping is gone."""
    machine, host = backed(lab)
    host.unmap()
    return machine, host


def backed(lab: Lab, size: int = SIZE) -> tuple[Machine, Host]:
    """Make a machine with a slot of fresh memory at TEST."""
    machine, host = lab.machine(), anonymous(size)
    machine.slot(1, TEST, size, host)
    return machine, host


@scenario("unmapped_read", area=AREA)
def unmapped_read(lab: Lab) -> None:
    """A read faults, faults again, and is done once memory is there."""
    m, host = unbacked(lab)
    m.at(code.READ8, TEST + 0x2018)
    m.run("read8")
    m.run("again")
    host.fix()
    host.put64(0x2018, 0xC0FFEE)
    m.run("remapped_resume")


@scenario("unmapped_write", area=AREA)
def unmapped_write(lab: Lab) -> None:
    """A write faults and is done once memory is there."""
    m, host = unbacked(lab)
    m.at(code.WRITE8, TEST + 0x2018)
    m.run("write8")
    host.fix()
    m.run("remapped_resume")
    lab.note("memory_after", mem=hex(host.get64(0x2018)))


@scenario("unmapped_exec", area=AREA)
def unmapped_exec(lab: Lab) -> None:
    """A jump faults at its target."""
    m, host = unbacked(lab)
    m.at(code.JUMP, TEST + 0x1010)
    m.run("exec")
    host.fix()
    host.put(0x1010, code.TARGET)
    m.run("remapped_resume")


@scenario("unmapped_exec_cross", area=AREA)
def unmapped_exec_cross(lab: Lab) -> None:
    """An instruction whose first three bytes are there and the rest is not faults at its start."""
    m, host = backed(lab)
    straddling = bytes.fromhex("48 b8 01 02 03 04 05 06 07 08") + code.TARGET  # mov rax, 0x807060504030201
    host.put(PAGE - 3, straddling[:3])
    host.unmap(PAGE, PAGE)
    m.at(code.JUMP, TEST + PAGE - 3)
    m.run("exec_insn_straddles")
    host.fix(PAGE, PAGE)
    host.put(PAGE, straddling[3:])
    m.run("remapped_resume")


@scenario("unmapped_cross", area=AREA)
def unmapped_cross(lab: Lab) -> None:
    """Accesses across two pages of which one or both are missing: nothing is done by halves."""
    m, host = backed(lab)
    host.unmap(PAGE, PAGE)
    host.put64(PAGE - 8, 0x5555555555555555)
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("write_second_page_unmapped")
    lab.note("partial_write?", first_page_last4=hex(host.get32(PAGE - 4)))
    host.fix(PAGE, PAGE)
    m.run("remapped_resume")
    lab.note("memory_after", lo=hex(host.get32(PAGE - 4)), hi=hex(host.get32(PAGE)))
    host.unmap(0, PAGE)
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("write_first_page_unmapped")
    host.fix(0, PAGE)
    m.run("remapped_resume")
    host.unmap(PAGE, PAGE)
    m.at(code.READ8, TEST + PAGE - 4)
    m.run("read_second_page_unmapped")
    host.unmap(0, PAGE)
    m.run("read_both_unmapped")
    host.fix(0, PAGE)
    m.run("first_remapped")
    host.fix(PAGE, PAGE)
    m.run("both_remapped")


@scenario("unmapped_slot_to_noslot_cross", area=AREA)
def unmapped_slot_to_noslot_cross(lab: Lab) -> None:
    """Accesses across the edge of a slot: the part outside is MMIO."""
    m, host = backed(lab, PAGE)
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("write_last4_then_mmio")
    lab.note("backed_part", lo=hex(host.get32(PAGE - 4)))
    m.run("resume")
    host.unmap()
    m.at(code.WRITE8, TEST + PAGE - 4)
    m.run("unmapped_then_mmio")
    m.at(code.READ8, TEST + PAGE - 4)
    m.run("read_unmapped_then_mmio")
    m.at(code.WRITE8, TEST - 4)
    m.run("mmio_then_unmapped")
    m.run("mmio_then_unmapped_resume")


@scenario("never_mapped", area=AREA)
def never_mapped(lab: Lab) -> None:
    """A slot needs no mapping when it is made: only the access fails."""
    m = lab.machine()
    lab.step("set_memory_region_hva_0x7000_0000_0000", m.slot(1, TEST, 4 * PAGE, 0x700000000000))
    m.at(code.READ8, TEST)
    m.run("read")
    m.at(code.WRITE8, TEST + 0x1FF8)
    m.run("write")
    m.at(code.JUMP, TEST)
    m.run("exec")
    lab.step("set_memory_region_hva_0", m.slot(2, TEST + 0x100000, 4 * PAGE, 0))
    m.at(code.READ8, TEST + 0x100000)
    m.run("read_hva0")


@scenario("unmapped_insns", area=AREA)
def unmapped_insns(lab: Lab) -> None:
    """Instructions of many kinds, each of which meets a page that is not there."""
    m, _ = unbacked(lab)
    for step, guest, address in (
        ("lock_cmpxchg", code.LOCK_CMPXCHG, TEST),
        ("lock_add", code.LOCK_ADD, TEST),
        ("movdqu_store", code.MOVDQU, TEST),
        ("fxsave_cross", code.FXSAVE, TEST + PAGE - 256),
        ("clflush", code.CLFLUSH, TEST),
        ("push_stack_unmapped", code.PUSH, TEST + 0x800),
        ("lgdt_operand", code.LGDT, TEST),
        ("invlpg_then_read", code.INVLPG_READ, TEST),
        ("read1_last_byte", code.READ1, TEST + 0xFFF),
    ):
        m.at(guest, address)
        m.run(step)
    m.string(code.REP_MOVSB, TEST + 16, CODE, 8)
    m.run("rep_movsb_dst_unmapped")
    m.string(code.REP_MOVSB, CODE + 0x100, TEST + 16, 8)
    m.run("rep_movsb_src_unmapped")
    m.string(code.REP_STOSB, TEST, 0, 64)
    m.run("rep_stosb")


@scenario("rep_progress", area=AREA)
def rep_progress(lab: Lab) -> None:
    """A string instruction that reaches a missing page has done what comes before it, and says so in RCX."""
    m, host = backed(lab, 4 * PAGE)
    host.unmap(PAGE, PAGE)
    m.string(code.REP_STOSB, TEST + PAGE - 16, 0, 64)
    m.run("rep_stosb_reaches_unmapped")
    lab.note("byte_before_boundary", last=host.get(PAGE - 1, 1)[0])
    host.fix(PAGE, PAGE)
    m.run("remapped_resume")
    host.unmap(PAGE, PAGE)
    m.string(code.REP_MOVSB, CODE + 0x200, TEST + PAGE - 16, 64)
    m.run("rep_movsb_src_reaches_unmapped")
    host.fix(PAGE, PAGE)
    m.run("remapped_resume")
