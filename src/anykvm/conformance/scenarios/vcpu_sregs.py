"""KVM_SET_SREGS: which combinations of control registers, EFER, APIC base and segments it takes."""

from __future__ import annotations

from typing import Final

from anykvm.abi import structures as s
from anykvm.api.vcpu import Vcpu
from anykvm.conformance import layout
from anykvm.conformance.modes import real_mode
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "vcpu_state"
_PAE: Final = 1 << 5


def _sregs(lab: Lab, vcpu: Vcpu, step: str, **values: int) -> None:
    """KVM_SET_SREGS with some values changed, and undone if it was taken."""
    original, changed = vcpu.get_sregs(), vcpu.get_sregs()
    for name, value in values.items():
        setattr(changed, name, value)
    outcome = attempt(lambda: vcpu.set_sregs(changed))
    lab.step(step, outcome)
    if not outcome.failed:
        vcpu.set_sregs(original)


@scenario("sregs_cr0", area=AREA)
def sregs_cr0(lab: Lab) -> None:
    """CR0: paging needs protection, NW needs CD, nothing above 32 bits; reserved bits below are dropped."""
    vcpu = lab.machine().vcpu
    base = vcpu.get_sregs().cr0
    for step, value in (
        ("PG_without_PE", base & ~1),
        ("NW_without_CD", base | 1 << 29),
        ("CD", base | 1 << 30),
        ("CD_NW", base | 3 << 29),
        ("bit_32", base | 1 << 32),
        ("bit_63", base | 1 << 63),
        ("reserved_bit_6", base | 1 << 6),
        ("reserved_bit_28", base | 1 << 28),
        ("ET_clear", base & ~0x10),
    ):
        _sregs(lab, vcpu, step, cr0=value)


@scenario("sregs_cr4", area=AREA)
def sregs_cr4(lab: Lab) -> None:
    """CR4: PAE is not to be cleared in long mode; bits whose feature CPUID does not have are refused."""
    m = lab.machine()
    vcpu = m.vcpu
    _only_long_mode(vcpu)
    _sregs(lab, vcpu, "PAE_clear", cr4=0)
    for bit in (*range(0, 33), 63):
        _sregs(lab, vcpu, f"bit_{bit}", cr4=_PAE | 1 << bit)


def _only_long_mode(vcpu: Vcpu) -> None:
    """KVM_SET_CPUID2 of a processor with PAE, NX and long mode, and nothing else that can be left out."""
    vcpu.set_cpuid2(
        [
            s.kvm_cpuid_entry2(function=0, eax=7),
            s.kvm_cpuid_entry2(function=1, edx=1 << 6),
            s.kvm_cpuid_entry2(function=7, flags=1),
            s.kvm_cpuid_entry2(function=0x80000000, eax=0x80000001),
            s.kvm_cpuid_entry2(function=0x80000001, edx=1 << 20 | 1 << 29),
        ]
    )


@scenario("sregs_efer", area=AREA)
def sregs_efer(lab: Lab) -> None:
    """EFER and the mode: LMA goes with LME and paging, CS.L with LMA."""
    vcpu = lab.machine().vcpu
    base = vcpu.get_sregs().efer
    for step, value in (
        ("LMA_without_LME", base & ~0x100),
        ("LME_without_LMA", base & ~0x400),
        ("neither", base & ~0x500),
        ("SCE", base | 1),
        ("NXE_clear", base & ~0x800),
        ("bit_1", base | 2),
        ("bit_9", base | 1 << 9),
        ("bit_20", base | 1 << 20),
        ("bit_63", base | 1 << 63),
    ):
        _sregs(lab, vcpu, step, efer=value)
    _sregs(lab, vcpu, "paging_off_with_LMA", cr0=0x11)
    _sregs(lab, vcpu, "cr3_beyond_physical", cr3=1 << 52)
    _sregs(lab, vcpu, "cr3_low_bits", cr3=layout.PML4 | 0xFFF)
    _sregs(lab, vcpu, "cr8_15", cr8=15)
    _sregs(lab, vcpu, "cr8_16", cr8=16)


@scenario("sregs_real_mode", area=AREA)
def sregs_real_mode(lab: Lab) -> None:
    """Real mode and back; CS.L or LMA without long mode is refused."""
    m = lab.machine()
    original = m.vcpu.get_sregs()
    for step, name, value in (("plain", "cr2", 0x123), ("LMA", "efer", 0x400), ("LME", "efer", 0x100)):
        sregs = real_mode(m.vcpu.get_sregs())
        setattr(sregs, name, value)
        lab.step(step, attempt(m.vcpu.set_sregs, sregs))
    sregs = real_mode(m.vcpu.get_sregs())
    sregs.cs.l = 1
    lab.step("CS_L", attempt(lambda: m.vcpu.set_sregs(sregs)))
    lab.step("back", attempt(lambda: m.vcpu.set_sregs(original)))
    got = m.vcpu.get_sregs()
    lab.note("after", cr0=hex(got.cr0), cr3=hex(got.cr3), efer=hex(got.efer), cs=got.cs.l, limit=hex(got.cs.limit))


@scenario("sregs_apic_base", area=AREA)
def sregs_apic_base(lab: Lab) -> None:
    """The APIC base: an address within the physical ones, no reserved bits, x2APIC only if it is enabled."""
    vcpu = lab.machine().vcpu
    for step, value in (
        ("default", 0xFEE00900),
        ("disabled", 0xFEE00000),
        ("elsewhere", 0x1000900),
        ("x2apic_without_enable", 0xFEE00400),
        ("bit_0", 0xFEE00901),
        ("bit_9", 0xFEE00B00),
        ("bit_52", 1 << 52 | 0xFEE00900),
    ):
        _sregs(lab, vcpu, step, apic_base=value)


@scenario("sregs_interrupt_bitmap", area=AREA)
def sregs_interrupt_bitmap(lab: Lab) -> None:
    """An interrupt in the bitmap is injected; with several the last is."""
    m = lab.machine()
    for step, vectors in (("one", (0x40,)), ("two", (0x40, 0x80)), ("last", (255,))):
        m.at(bytes.fromhex("e610f4"))  # out 0x10, al; hlt
        sregs = m.vcpu.get_sregs()
        for vector in vectors:
            sregs.interrupt_bitmap[vector // 64] |= 1 << vector % 64
        lab.step(step, attempt(m.vcpu.set_sregs, sregs))
        lab.note("read_back", bitmap=[hex(word) for word in m.vcpu.get_sregs().interrupt_bitmap])
        m.run(f"{step}_run")


@scenario("sregs2", area=AREA)
def sregs2(lab: Lab) -> None:
    """KVM_SET_SREGS2: flags, and PDPTRs that only PAE paging has."""
    vcpu = lab.machine().vcpu
    got = vcpu.get_sregs2()
    lab.note("long_mode", flags=got.flags, cr3=hex(got.cr3))
    for flags in (0, 1, 2, 3, 1 << 63):
        got = vcpu.get_sregs2()
        got.flags = flags
        lab.step("SET_SREGS2", attempt(vcpu.set_sregs2, got), flags=hex(flags))
