"""Other state that user space sets: which values each ioctl takes, and which it refuses with EINVAL."""

from __future__ import annotations

import ctypes
from typing import Final

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.api.vcpu import Vcpu
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.modes import real_mode
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "vcpu_state"
_USE_FPU: Final = bytes.fromhex("660f76dbd9e8e610f4")  # pcmpeqd xmm3, xmm3; fld1; out 0x10, al; hlt
_FPU: Final = bytes.fromhex("66480f7ed8d93fe610f4")  # movq rax, xmm3; fnstcw [rdi]; out 0x10, al; hlt


@scenario("regs", area=AREA)
def regs(lab: Lab) -> None:
    """Every value is taken; RFLAGS gets its fixed bit, and loses those that do not exist."""
    vcpu = lab.machine().vcpu
    names = [field[0] for field in s.kvm_regs._fields_ if field[0] != "rflags"]
    wanted = s.kvm_regs(**{name: 0x1111111111111111 * (1 + at % 15) for at, name in enumerate(names)}, rflags=2)
    vcpu.set_regs(wanted)
    got = vcpu.get_regs()
    lab.note("round_trip", lost=[name for name in names if getattr(got, name) != getattr(wanted, name)])
    for rflags in (0, 0xFFFFFFFFFFFFFFFF, 1 << 3 | 1 << 5 | 1 << 15 | 1 << 22, 1 << 17, 1 << 18 | 1 << 21):
        outcome = attempt(vcpu.set_regs, s.kvm_regs(rflags=rflags))
        lab.step("rflags", outcome, set=hex(rflags), got=hex(vcpu.get_regs().rflags))


@scenario("mp_states", area=AREA)
def mp_states(lab: Lab) -> None:
    """Without an in-kernel interrupt controller a vCPU is runnable, and nothing else can be set."""
    vcpu = lab.machine().vcpu
    lab.note("initially", mp_state=vcpu.get_mp_state())
    for state in (*range(12), 0xFFFFFFFF):
        lab.step("SET", attempt(vcpu.set_mp_state, state), mp_state=state)
    lab.note("finally", mp_state=vcpu.get_mp_state())


@scenario("mp_states_irqchip", area=AREA, needs=("irqchip",))
def mp_states_irqchip(lab: Lab) -> None:
    """With one each state of x86 can be set; KVM_RUN of each, with immediate_exit (rows 8, 17, 18)."""
    m = lab.irqchip_machine()
    if m is None:
        return
    for state in (*range(12), 0xFFFFFFFF):
        m.vcpu.set_mp_state(0)
        m.at(bytes.fromhex("ebfe"))  # jmp .
        outcome = attempt(m.vcpu.set_mp_state, state)
        lab.step("SET", outcome, mp_state=state, now=m.vcpu.get_mp_state())
        if not outcome.failed:
            m.run_page.immediate_exit = 1
            m.run("run_immediate_exit", mp_state=state)
            m.run_page.immediate_exit = 0


@scenario("fpu", area=AREA)
def fpu(lab: Lab) -> None:
    """KVM_SET_FPU reaches a guest that has used its FPU; a fresh one has nothing in its XSAVE header."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    state = m.vcpu.get_fpu()
    lab.note("initially", fcw=hex(state.fcw), mxcsr=hex(state.mxcsr))
    state.xmm[3][:8] = list((0x1122334455667788).to_bytes(8, "little"))
    state.fcw, state.mxcsr = 0x27F, 0x1FC0
    lab.step("SET_FPU", attempt(m.vcpu.set_fpu, state))
    m.at(_FPU, TEST)
    m.run("fresh_guest_sees")
    m.at(_USE_FPU, TEST)
    m.run("uses_it")
    lab.step("SET_FPU_again", attempt(m.vcpu.set_fpu, state))
    m.at(_FPU, TEST)
    m.run("guest_sees")
    got = m.vcpu.get_fpu()
    lab.note("afterwards", fcw_in_memory=hex(host.get32(0)), fcw=hex(got.fcw), mxcsr=hex(got.mxcsr))


@scenario("xsave_refused", area=AREA)
def xsave_refused(lab: Lab) -> None:
    """KVM_SET_XSAVE: features the vCPU has not, compaction, reserved bytes of the header, bits of MXCSR."""
    vcpu = lab.machine().vcpu
    original = bytes(vcpu.get_xsave())
    for step, at, value in (
        ("same", 512, 3),
        ("nothing", 512, 0),
        ("xstate_bv_bit_62", 519, 0x40),
        ("xcomp_bv", 520, 1),
        ("reserved", 528, 1),
        ("mxcsr_bit_31", 27, 0x80),
    ):
        changed = bytearray(original)
        changed[512] = 3
        changed[at] = value
        lab.step(step, attempt(vcpu.set_xsave, bytes(changed)))
    changed[512] = 0
    lab.step("mxcsr_bit_31_without_SSE", attempt(vcpu.set_xsave, bytes(changed)))


@scenario("xcrs_refused", area=AREA)
def xcrs_refused(lab: Lab) -> None:
    """KVM_SET_XCRS: x87 is always there, AVX needs SSE; too many registers, flags."""
    vcpu = lab.machine().vcpu
    for step, count, flags, xcr, value in (
        ("x87", 1, 0, 0, 1),
        ("x87_SSE", 1, 0, 0, 3),
        ("SSE_alone", 1, 0, 0, 2),
        ("zero", 1, 0, 0, 0),
        ("AVX_without_SSE", 1, 0, 0, 5),
        ("bit_63", 1, 0, 0, 1 << 63 | 3),
        ("other_xcr_ignored", 1, 0, 1, 0),
        ("none", 0, 0, 0, 0),
        ("count_17", 17, 0, 0, 1),
        ("flags", 1, 1, 0, 1),
    ):
        xcrs = s.kvm_xcrs(nr_xcrs=count, flags=flags)
        xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = xcr, value
        lab.step(step, attempt(vcpu.set_xcrs, xcrs))
    lab.note("finally", xcr0=hex(vcpu.get_xcrs().xcrs[0].value))


@scenario("debugregs_refused", area=AREA)
def debugregs_refused(lab: Lab) -> None:
    """KVM_SET_DEBUGREGS: DR6 and DR7 have 32 bits; flags; what is read back."""
    vcpu = lab.machine().vcpu
    for step, fields in (
        ("breakpoints", {"dr7": 0x400}),
        ("dr6_bit_32", {"dr6": 1 << 32}),
        ("dr7_bit_32", {"dr7": 1 << 32}),
        ("flags", {"flags": 1}),
        ("dr6", {"dr6": 0xFFFF0FF1, "dr7": 0x401}),
    ):
        state = s.kvm_debugregs(**fields)
        state.db[2] = 0x1234
        outcome = attempt(vcpu.set_debugregs, state)
        got = vcpu.get_debugregs()
        lab.step(step, outcome, db2=hex(got.db[2]), dr6=hex(got.dr6), dr7=hex(got.dr7))


@scenario("events_refused", area=AREA)
def events_refused(lab: Lab) -> None:
    """KVM_SET_VCPU_EVENTS: flags that do not exist or are not enabled, and exceptions that cannot be."""
    m = lab.machine()
    for bit in range(8):
        lab.step("flag", _events(m.vcpu, flags=1 << bit), bit=bit)
    lab.step("flag_31", _events(m.vcpu, flags=1 << 31))
    for number in (2, 14, 31, 32, 255):
        outcome = _events(m.vcpu, injected=1, nr=number)
        lab.step("exception", outcome, nr=number)
        m.registers()  # drops it
    lab.step("injected_and_pending", _events(m.vcpu, injected=1, pending=1, nr=6))
    m.registers()
    lab.step("smm_pending_without_cap", _events(m.vcpu, flags=8))


def _events(vcpu: Vcpu, flags: int = 0, injected: int = 0, pending: int = 0, nr: int = 0) -> Outcome:
    events = vcpu.get_vcpu_events()
    ctypes.memset(ctypes.addressof(events), 0, ctypes.sizeof(events))
    events.flags = flags
    events.exception.injected, events.exception.pending, events.exception.nr = injected, pending, nr
    return attempt(lambda: vcpu.set_vcpu_events(events))


@scenario("translate", area=AREA)
def translate(lab: Lab) -> None:
    """KVM_TRANSLATE: large and small pages, no page, no such address, no paging; slots do not matter."""
    m, table = lab.machine(), anonymous(PAGE)
    m.slot(1, 0x20000000, PAGE, table)
    layout.map_small_pages(m.memory, TEST, 0x20000000, table)
    table.put64(8 * 5, 0)
    table.put64(8 * 6, 0x3FFFF067)
    for step, address in (
        ("large_page", 0x12345),
        ("small_page", TEST + 0x3123),
        ("not_present", TEST + 5 * PAGE),
        ("no_slot", TEST + 6 * PAGE + 5),
        ("above_4G", 1 << 32),
        ("not_canonical", 1 << 47),
    ):
        _translate(lab, m.vcpu, step, address)
    m.vcpu.set_sregs(real_mode(m.vcpu.get_sregs()))
    _translate(lab, m.vcpu, "paging_off", 0x12345)


def _translate(lab: Lab, vcpu: Vcpu, step: str, address: int) -> None:
    request = s.kvm_translation(linear_address=address)
    outcome = attempt(lambda: vcpu.ioctl(n.KVM_TRANSLATE, request))
    lab.step(step, outcome, valid=request.valid, pa=hex(request.physical_address), w=request.writeable)
