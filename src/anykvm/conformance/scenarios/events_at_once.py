"""Several events injected at once: which of them an entry takes, and what becomes of the others.

User space may leave an exception, an NMI and an interrupt injected together, with an NMI waiting behind them:
kvm_check_and_inject_events() enters with one, and the next VM exit, or an entry that is given up, forgets the others.
"""

from __future__ import annotations

import signal
from itertools import combinations
from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_enable_cap, kvm_interrupt, kvm_vcpu_events
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, anonymous, inaccessible
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine, run_vcpu
from anykvm.conformance.modes import catch_error_code
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "interrupts"
_OPEN: Final = 0x202
_RESUME: Final = 0x10000
"""RFLAGS.RF."""
_IRQ: Final = 0x40
_UD: Final = 6
_BP: Final = 3
_GP: Final = 13
_KINDS: Final = ("exception", "nmi", "irq", "waiting")
"""An exception, an NMI and an interrupt that are injected, and an NMI that is pending."""
_SECONDS: Final = 2.0
"""For a KVM_RUN."""
_RUNS: Final = 6
"""At most, till the guest halts in the code that was interrupted."""
_IRETQ: Final = bytes.fromhex("48cf")  # iretq
_POPCNT: Final = bytes.fromhex("f3 48 0f b8 07 e6 10 f4")  # popcnt rax, [rdi]; out 0x10, al; hlt
_DEVICE: Final = 0x20000000
"""No slot is there."""


def _sets(kinds: tuple[str, ...], smallest: int) -> list[tuple[str, ...]]:
    return [chosen for size in range(smallest, len(kinds) + 1) for chosen in combinations(kinds, size)]


def _events(kinds: tuple[str, ...], vector: int = _UD) -> kvm_vcpu_events:
    """Events of these kinds, and NMIs not blocked."""
    events = kvm_vcpu_events(flags=c.KVM_VCPUEVENT_VALID_NMI_PENDING)
    events.exception.nr, events.exception.injected = vector, "exception" in kinds
    events.exception.pending = "queued" in kinds
    events.nmi.injected, events.nmi.pending = "nmi" in kinds, "waiting" in kinds
    events.interrupt.nr, events.interrupt.injected = _IRQ, "irq" in kinds
    return events


def _told(m: Machine) -> dict[str, Any]:
    """Give what KVM_GET_VCPU_EVENTS says, without the numbers of events that are over."""
    events = m.vcpu.get_vcpu_events()
    exception, nmi, irq = events.exception, events.nmi, events.interrupt
    number = exception.nr if exception.injected or exception.pending else 0
    return {
        "exception": [exception.injected, exception.pending, number],
        "nmi": [nmi.injected, nmi.pending, nmi.masked],
        "rf": bool(m.vcpu.get_regs().rflags & _RESUME),
        "irq": [irq.injected, irq.nr if irq.injected else 0],
    }


def _set(lab: Lab, m: Machine, events: kvm_vcpu_events) -> None:
    lab.step("SET_VCPU_EVENTS", attempt(m.vcpu.set_vcpu_events, events), **_told(m))


def _ask(lab: Lab, m: Machine, kinds: tuple[str, ...]) -> None:
    """KVM_INTERRUPT, KVM_NMI."""
    if "interrupt" in kinds:
        lab.ioctl("INTERRUPT", m.vcpu, n.KVM_INTERRUPT, kvm_interrupt(_IRQ + 1))
    if "nmi" in kinds:
        lab.step("NMI", attempt(m.vcpu.nmi))
    lab.note("events", **_told(m))


def _return_from_handlers(m: Machine) -> None:
    """Let the handlers of these events report as ever, and return."""
    for vector in (2, _BP, _UD, _IRQ, _IRQ + 1):
        report = layout.handler_code(vector)[:4]  # mov al, vector; out 0xe0, al
        m.memory.put(layout.HANDLERS + 16 * vector, (report + _IRETQ).ljust(16, b"\0"))


def _run_on(lab: Lab, m: Machine, step: str) -> None:
    """KVM_RUN until the guest halts in what was interrupted, or the call fails; one record tells all of it."""
    ran: list[str] = []

    def keep(step: str, **seen: Any) -> None:
        said = f"{seen['er']} {seen['errname']} if={seen['if']} ready={seen['rdy']}"
        ran.append(f"{said} rip={seen['rip']} rax={seen['rax']} rcx={seen['rcx']} rsp={seen['rsp']}")

    for _ in range(_RUNS):
        outcome = run_vcpu(m.vcpu, lab.signals, keep, step, _SECONDS, True, {})
        if outcome.failed or m.run_page.exit_reason == c.KVM_EXIT_HLT:
            break
    lab.note(step, ran=ran, **_told(m))


def _block_signal(m: Machine) -> None:
    """Block SIGUSR1 for the thread and open it for KVM_RUN."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    m.vcpu.set_signal_mask(())


def _run_with_signal(lab: Lab, m: Machine, step: str) -> None:
    """KVM_RUN with SIGUSR1 pending: the entry is given up once its event is chosen."""
    signal.raise_signal(signal.SIGUSR1)
    m.run(step)
    signal.sigtimedwait({signal.SIGUSR1}, 0)
    lab.note("events", **_told(m))


@scenario("events_at_once", area=AREA)
def events_at_once(lab: Lab) -> None:
    """Each pair and more of them, with IF clear; the handlers halt."""
    m = lab.machine()
    for kinds in _sets(_KINDS, 2):
        m.at(code.OUT_OUT)
        _set(lab, m, _events(kinds))
        _run_on(lab, m, "+".join(kinds))


@scenario("events_at_once_returning", area=AREA)
def events_at_once_returning(lab: Lab) -> None:
    """The same with IF set and handlers that return: what was left out does not come later."""
    m = lab.machine()
    _return_from_handlers(m)
    for kinds in _sets(_KINDS, 2):
        m.at(code.OUT_OUT, rflags=_OPEN)
        _set(lab, m, _events(kinds))
        _run_on(lab, m, "+".join(kinds))


@scenario("events_at_once_by_ioctl", area=AREA)
def events_at_once_by_ioctl(lab: Lab) -> None:
    """KVM_INTERRUPT and KVM_NMI where something is injected already."""
    m = lab.machine()
    _return_from_handlers(m)
    for first in ("exception", "nmi", "irq"):
        for then in _sets(("interrupt", "nmi"), 1):
            m.at(code.OUT_OUT, rflags=_OPEN)
            _set(lab, m, _events((first,)))
            _ask(lab, m, then)
            _run_on(lab, m, f"{first}_then_{'+'.join(then)}")


@scenario("events_at_once_given_up", area=AREA)
def events_at_once_given_up(lab: Lab) -> None:
    """A signal ends the KVM_RUN before the guest runs: what was chosen stays injected, the others are forgotten."""
    m = lab.machine()
    _return_from_handlers(m)
    _block_signal(m)
    for kinds in _sets(_KINDS, 1):
        m.at(code.OUT_OUT, rflags=_OPEN)
        _set(lab, m, _events(kinds))
        _run_with_signal(lab, m, "given_up")
        _run_on(lab, m, "+".join(kinds))


@scenario("events_at_once_not_entered", area=AREA)
def events_at_once_not_entered(lab: Lab) -> None:
    """A KVM_RUN that ends before the guest is thought of, by immediate_exit or by an error, forgets nothing."""
    m = lab.machine()
    _return_from_handlers(m)
    for step, immediate_exit, valid in (("immediate_exit", 1, 0), ("bad_sync", 0, 1 << 8)):
        m.at(code.OUT_OUT, rflags=_OPEN)
        _set(lab, m, _events(_KINDS))
        m.run_page.immediate_exit, m.run_page.kvm_valid_regs = immediate_exit, valid
        m.run(step)
        m.run_page.immediate_exit = m.run_page.kvm_valid_regs = 0
        lab.note("events", **_told(m))
        _run_on(lab, m, f"after_{step}")


@scenario("events_at_once_window", area=AREA)
def events_at_once_window(lab: Lab) -> None:
    """The window for interrupts is shut while an event is injected, and open when it is lost."""
    m = lab.machine()
    _return_from_handlers(m)
    _block_signal(m)
    for kinds in _sets(_KINDS, 0):
        m.at(code.OUT_OUT, rflags=_OPEN)
        _set(lab, m, _events(kinds, _BP))
        m.run_page.request_interrupt_window = 1
        _run_with_signal(lab, m, "+".join(kinds) or "none")
        m.run_page.request_interrupt_window = 0
        _run_on(lab, m, "after")


@scenario("events_at_once_breakpoint", area=AREA)
def events_at_once_breakpoint(lab: Lab) -> None:
    """#BP is of an INT3; where there is none nothing is entered with, and the others are forgotten all the same."""
    m = lab.machine()
    _return_from_handlers(m)
    for guest, where in ((code.OUT_OUT, "no_int3"), (code.INT3, "int3")):
        for other in _KINDS[1:]:
            m.at(guest, rflags=_OPEN)
            _set(lab, m, _events(("exception", other), _BP))
            _run_on(lab, m, f"{where}_{other}")


@scenario("events_at_once_stack", area=AREA)
def events_at_once_stack(lab: Lab) -> None:
    """The event's delivery meets a fault that nobody resolves: it alone is still injected."""
    m = lab.machine()
    _return_from_handlers(m)
    cases = [(code.OUT_OUT, kinds, _UD) for kinds in _sets(_KINDS, 2)]
    for guest, kinds, vector in (*cases, (code.INT3, ("exception", "irq"), _BP)):
        m.slot(1, TEST, PAGE, inaccessible(PAGE)).check("slot 1")
        m.at(guest, rsp=TEST + PAGE, rflags=_OPEN)
        _set(lab, m, _events(kinds, vector))
        m.run("fault")
        lab.note("events", **_told(m))
        m.delete_slot(1).check("slot 1")
        m.slot(1, TEST, PAGE, anonymous(PAGE)).check("slot 1")
        _run_on(lab, m, "+".join(kinds))
        m.delete_slot(1).check("slot 1")


@scenario("events_after_queued_exception", area=AREA)
def events_after_queued_exception(lab: Lab) -> None:
    """KVM queues #UD where its emulator gives up; it goes before what user space injects then."""
    m = lab.machine()
    _block_signal(m)
    for given_up in (False, True):
        for then in _sets(("interrupt", "nmi"), 1):
            m.at(_POPCNT, _DEVICE, rflags=_OPEN)
            _set(lab, m, _events(()))
            m.run("not_emulated")
            _ask(lab, m, then)
            if given_up:
                _run_with_signal(lab, m, "given_up")
            _run_on(lab, m, "+".join(then))


@scenario("events_at_once_payload", area=AREA)
def events_at_once_payload(lab: Lab) -> None:
    """With KVM_CAP_EXCEPTION_PAYLOAD an exception may be pending, as one that no entry has tried."""
    m = lab.machine()
    enable = kvm_enable_cap(cap=c.KVM_CAP_EXCEPTION_PAYLOAD)
    enable.args[0] = 1
    if lab.ioctl("ENABLE_CAP", m.vm, n.KVM_ENABLE_CAP, enable).failed:
        return
    _return_from_handlers(m)
    for others in ((), *((kind,) for kind in _KINDS), _KINDS):
        kinds = ("queued", *others)
        m.at(code.OUT_OUT, rflags=_OPEN)
        events = _events(kinds)
        events.flags |= c.KVM_VCPUEVENT_VALID_PAYLOAD
        _set(lab, m, events)
        _run_on(lab, m, "+".join(kinds))


@scenario("events_at_once_gate", area=AREA)
def events_at_once_gate(lab: Lab) -> None:
    """Without its gate an event is an exception of the guest's; the event is over, and does not come again."""
    m = lab.machine()
    catch_error_code(m, _GP)
    for kinds, vector in ((("nmi",), 2), (("irq",), _IRQ), (("irq", "waiting"), _IRQ)):
        gate = m.memory.get(layout.IDT + 16 * vector, 16)
        m.memory.put(layout.IDT + 16 * vector, bytes(16))
        m.at(code.OUT_OUT, rflags=_OPEN)
        _set(lab, m, _events(kinds))
        _run_on(lab, m, "+".join(kinds))
        m.memory.put(layout.IDT + 16 * vector, gate)


@scenario("nmis_waiting", area=AREA)
def nmis_waiting(lab: Lab) -> None:
    """Two NMIs wait at most; one while one is injected or NMIs are blocked (process_nmi())."""
    m = lab.machine()
    _return_from_handlers(m)
    for step, injected, masked in (("free", 0, 0), ("injected", 1, 0), ("masked", 0, 1)):
        events = _events(("waiting",))
        events.nmi.pending, events.nmi.injected, events.nmi.masked = 255, injected, masked
        m.at(code.OUT_OUT)
        _set(lab, m, events)
        lab.step("NMI", attempt(m.vcpu.nmi))
        lab.note("events", **_told(m))
        _run_on(lab, m, step)
