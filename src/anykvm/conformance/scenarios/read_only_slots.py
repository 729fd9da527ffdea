"""KVM_MEM_READONLY slots: reads are memory, writes are MMIO, whatever the host mapping allows."""

from __future__ import annotations

from anykvm.abi.constants import KVM_MEM_READONLY
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE, PROT_READ

AREA = "read_only_slots"


@scenario("ro_slot", area=AREA)
def ro_slot(lab: Lab) -> None:
    """Reads, fetches and every kind of write; then the same with the host mapping protected and gone."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    host.put64(0, 0x2A)
    host.put(PAGE, code.TARGET)
    lab.step("create_RO", m.slot(1, TEST, 4 * PAGE, host, KVM_MEM_READONLY))
    m.at(code.READ_WRITE_READ, TEST)
    for step in ("read", "write_mmio", "after_mmio_write", "readback"):
        m.run(step)
    lab.note("unchanged", mem=hex(host.get64(0)))
    for guest, address, steps in (
        (code.JUMP, TEST + PAGE, ("exec",)),
        (code.LOCK_CMPXCHG, TEST, ("lock_cmpxchg", "lock_cmpxchg_resume")),
        (code.LOCK_ADD, TEST, ("lock_add", "lock_add_resume")),
        (code.PUSH, TEST + 0x800, ("push",)),
        (code.WRITE8, TEST + PAGE - 4, ("write_cross_two_RO_pages", "cross_resume", "cross_resume2")),
    ):
        m.at(guest, address)
        for step in steps:
            m.run(step)
    m.string(code.REP_MOVSB, TEST + 8, CODE, 4)
    m.run("rep_movsb_dst")
    m.run("rep_movsb_dst2")
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb_dst")
    m.run("rep_insb_dst2")
    host.protect(PROT_READ)
    m.at(code.WRITE8, TEST + 8)
    m.run("write_hva_PROT_READ")
    host.protect(PROT_NONE)
    for guest, step in (
        (code.READ8, "read_hva_PROT_NONE"),
        (code.WRITE8, "write_hva_PROT_NONE"),
        (code.LOCK_CMPXCHG, "cmpxchg_hva_PROT_NONE"),
    ):
        m.at(guest, TEST + 8)
        m.run(step)
    host.unmap()
    m.at(code.READ8, TEST + 8)
    m.run("read_hva_unmapped")
    m.at(code.WRITE8, TEST + 8)
    m.run("write_hva_unmapped")
    m.at(code.JUMP, TEST + PAGE)
    m.run("exec_hva_unmapped")


@scenario("ro_slot_fresh_write", area=AREA)
def ro_slot_fresh_write(lab: Lab) -> None:
    """A write is MMIO also when nothing was ever read, and when there is nothing to read."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host, KVM_MEM_READONLY)
    m.at(code.WRITE8, TEST)
    m.run("write_first_touch")
    m.run("resume")
    host.unmap()
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_never_touched_unmapped")
