"""Accesses that KVM's instruction emulator makes: where it finds no memory, it makes an MMIO exit, not a fault."""

from __future__ import annotations

from anykvm.abi.constants import KVM_MEM_READONLY
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous, file_mapping, memfd
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_NONE

AREA = "emulator"
MMIO = TEST + 0x1000000
READ_ONLY = TEST + 0x100000
FILE = TEST + 0x200000


@scenario("emul", area=AREA)
def emul(lab: Lab) -> None:
    """String I/O, and moves between MMIO and memory, whose memory is protected, read-only, or beyond a file's end."""
    m, host = lab.machine(), anonymous(16 * PAGE)
    m.slot(1, TEST, 16 * PAGE, host)
    host.protect(PROT_NONE, 0, 8 * PAGE)
    _string_io(lab, m, host)
    _moves(m)
    _straddling(m, host)
    _crossing(m, host)
    m.slot(2, READ_ONLY, 4 * PAGE, anonymous(4 * PAGE), KVM_MEM_READONLY)
    _insb(m, READ_ONLY, "rep_insb_RO_slot", "rep_insb_RO_slot_resume", "rep_insb_RO_slot_resume2")
    _insb(m, MMIO, "rep_insb_to_mmio", "rep_insb_to_mmio2", "rep_insb_to_mmio3")
    m.slot(3, FILE, 2 * PAGE, file_mapping(memfd(PAGE), 2 * PAGE))
    _insb(m, FILE + PAGE, "rep_insb_beyond_EOF", "rep_insb_beyond_EOF_resume", "rep_insb_beyond_EOF_resume2")


def _insb(m: Machine, address: int, *steps: str, count: int = 2) -> None:
    m.string(code.REP_INSB, address, 0, count)
    for step in steps:
        m.run(step)


def _string_io(lab: Lab, m: Machine, host: Host) -> None:
    _insb(m, TEST, "rep_insb_to_PROT_NONE", count=8)
    m.pio_data(8)[:] = bytes(range(0x61, 0x69))
    for step in ("rep_insb_resume", "rep_insb_resume2", "rep_insb_resume3"):
        m.run(step)
    host.protect(READ_WRITE, 0, 8 * PAGE)
    m.run("rep_insb_fixed")
    lab.note("bytes", b=host.get(0, 4).hex())
    host.protect(PROT_NONE, 0, 8 * PAGE)
    m.string(code.REP_OUTSB, 0, TEST, 8)
    m.run("rep_outsb_from_PROT_NONE")
    m.run("rep_outsb_resume")
    host.protect(READ_WRITE, 0, 8 * PAGE)
    host.put(0, b"hello123")
    m.run("rep_outsb_fixed")
    host.protect(PROT_NONE, 0, 8 * PAGE)


def _moves(m: Machine) -> None:
    m.string(code.MOVSQ, TEST, MMIO, 0)
    m.run("movsq_mmio_to_PROT_NONE")
    m.answer_mmio(0x4141)
    m.run("movsq_mmio_to_PROT_NONE_data_given")
    m.run("next")
    m.string(code.MOVSQ, MMIO, TEST, 0)
    m.run("movsq_PROT_NONE_to_mmio")
    m.run("next2")
    m.string(code.PUSH_MEMORY, TEST + 0x800, MMIO, 0)
    m.run("push_mmio_stack_PROT_NONE")
    m.answer_mmio(0x4141)
    m.run("push_mmio_stack_PROT_NONE_data_given")


def _straddling(m: Machine, host: Host) -> None:
    host.protect(READ_WRITE, 8 * PAGE, PAGE)
    host.put(9 * PAGE - 2, bytes.fromhex("48 8b 06 e6 10 f4"))  # mov rax, [rsi]; out 0x10, al; hlt
    host.protect(PROT_NONE, 9 * PAGE, PAGE)
    m.at(code.JUMP, TEST + 9 * PAGE - 2)
    m.change(rsi=MMIO)
    m.run("mmio_insn_straddles_PROT_NONE")


def _crossing(m: Machine, host: Host) -> None:
    _insb(
        m,
        TEST + 8 * PAGE - 4,
        "rep_insb_crossing_from_PROT_NONE_to_backed",
        "rep_insb_crossing_resume",
        "rep_insb_crossing_resume2",
        count=8,
    )
    host.protect(PROT_NONE, 9 * PAGE, PAGE)
    steps = ("rep_insb_crossing_backed_to_PROT_NONE", "resume", "resume2", "resume3")
    _insb(m, TEST + 9 * PAGE - 4, *steps, count=8)


@scenario("kernel_writes", area=AREA, needs=("irqchip", "paravirtual"))
def kernel_writes(lab: Lab) -> None:
    """KVM's own writes to guest memory, for its paravirtual MSRs, fail silently."""
    m, host = lab.irqchip_machine(), anonymous(4 * PAGE)
    if m is None:
        return
    m.slot(1, TEST, 4 * PAGE, host)
    host.protect(PROT_NONE)
    for name, msr, value in (
        ("SYSTEM_TIME_NEW", 0x4B564D01, TEST | 1),
        ("WALL_CLOCK_NEW", 0x4B564D00, TEST + PAGE),
        ("STEAL_TIME", 0x4B564D03, TEST + 2 * PAGE | 1),
        ("PV_EOI", 0x4B564D04, TEST + 3 * PAGE | 1),
        ("ASYNC_PF_EN", 0x4B564D02, TEST + 3 * PAGE | 1),
    ):
        m.memory.put(CODE, code.WRMSR)
        m.registers(rdi=value, rcx=msr)
        m.run("wrmsr_area_PROT_NONE", timeout=0.5, msr=name)
