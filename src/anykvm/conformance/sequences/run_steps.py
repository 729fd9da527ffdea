"""Steps that put code into the guest and run it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.reading import span
from anykvm.abi.structures import kvm_run
from anykvm.conformance import layout
from anykvm.conformance.machine import run_vcpu
from anykvm.conformance.outcome import attempt
from anykvm.conformance.sequences.fields import change, changed, fields
from anykvm.conformance.sequences.guest_programs import MODES, code
from anykvm.conformance.sequences.vcpu_steps import set_mode
from anykvm.conformance.sequences.world import FREE, World

_PAGE_FAULT: Final = 14
_SECONDS: Final = 2.0
"""A run that takes so long is ended by a signal; the generator makes no guest that runs for ever."""
_MMIO_DATA: Final = span(kvm_run, "mmio.data")
_ANSWER: Final = 0x9E3779B97F4A7C15
_UPPER: Final = 0x00007FFF00000000
_LOWER: Final = 0x3FFF
"""The bits of an answer, with ``FREE``: a guest that jumps to it, or to its lower half, finds nothing, or stops."""


def _guest(
    w: World, group: str, asm: str, rdi: int, rsi: int, rcx: int, rax: int, rflags: int = 2, flush: bool = False
) -> None:
    """Put a program at ``layout.CODE`` and the registers it works on; what was pending is finished first."""
    mode = MODES.get(group, "long")
    w.m.drain()
    set_mode(w, mode, rdi & ~0xFFF, rsi & ~0xFFF)
    w.m.memory.put(layout.CODE, code(group, asm, flush=flush))
    if mode == "real":
        w.m.registers(0, rdi=rdi & 0xFFF, rsi=rsi & 0xFFF, rcx=rcx, rax=rax, rdx=0x20, rsp=0x800, rflags=rflags)
    else:
        w.m.registers(rdi=rdi, rsi=rsi, rcx=rcx, rax=rax, rdx=0x20, rflags=rflags)


def _run(
    w: World,
    count: int = 1,
    answer: int = 0,
    immediate: bool = False,
    window: bool = False,
    valid: int = 0,
    dirty: int = 0,
    changes: list[list[Any]] | None = None,
    cr8: int | None = None,
    argument: int = 0,
    signalled: bool = False,
) -> None:
    """KVM_RUN ``count`` times, answering reads of devices and ports by ``answer``.

    ``immediate``, ``window``, ``valid``, ``dirty``, ``cr8``: fields of kvm_run; ``changes``: in ``kvm_run.s``, which is
    filled from the vCPU first; ``signalled``: SIGUSR1 is pending, blocked but for KVM_SET_SIGNAL_MASK.
    """
    run = w.m.run_page
    run.immediate_exit, run.request_interrupt_window = int(immediate), int(window)
    run.kvm_valid_regs, run.kvm_dirty_regs = valid, dirty
    if cr8 is not None:
        run.cr8 = cr8
    if dirty:
        _finish_read(w)
        _fill(w, changes or [])
    if signalled:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
    for number in range(count):
        _answer(w, answer + number)
        if argument:
            outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_RUN, argument))
            w.note(e=outcome.errno)
        else:
            seen = {"cr8": hex(run.cr8)} if cr8 is not None else {}
            run_vcpu(w.m.vcpu, w.lab.signals, _keep(w, valid), str(number), _SECONDS, True, seen)
        run.kvm_dirty_regs = 0
    if signalled:
        taken = signal.sigtimedwait({signal.SIGUSR1}, 0)
        w.note(pending=taken is not None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    run.immediate_exit = run.request_interrupt_window = run.kvm_valid_regs = 0
    if cr8 is not None:
        run.cr8 = w.m.vcpu.get_sregs().cr8


def _keep(w: World, valid: int) -> Callable[..., None]:
    def keep(step: str, **seen: Any) -> None:
        vcpu, run = w.m.vcpu, w.m.run_page
        if _reports_page_fault(w) and _is_fault_address(cr2 := vcpu.get_sregs().cr2):
            seen["cr2"] = hex(cr2)
        if valid & c.KVM_SYNC_X86_REGS:
            seen["synced"] = [hex(run.s.regs.regs.rip), hex(run.s.regs.regs.rax)]
        w.lab.record(f"{w.at}.{step}", **seen)

    return keep


def _is_fault_address(cr2: int) -> bool:
    """Not where user space injected the exception: CR2 is then of an earlier one, or of nothing."""
    return 0 < cr2 < 1 << 47


def _reports_page_fault(w: World) -> bool:
    """Only then: the oracle's emulated processor changes CR2 for other exceptions too."""
    run = w.m.run_page
    handled = run.exit_reason == c.KVM_EXIT_IO and run.io.port == layout.EXCEPTION_PORT
    return handled and w.m.pio_data(1)[0] == _PAGE_FAULT


def _fill(w: World, changes: list[list[Any]]) -> None:
    shared = w.m.run_page.s.regs
    shared.regs, shared.sregs = w.m.vcpu.get_regs(), w.m.vcpu.get_sregs()
    shared.events = w.m.vcpu.get_vcpu_events()
    real = not shared.sregs.cr0 & 1  # EFER.LME there: the oracle's emulated processor does not come back from the guest
    change(shared, [(path, value) for path, value in changes if not (real and path == "sregs.efer")])


def _answer(w: World, number: int) -> None:
    run = w.m.run_page
    random = number * _ANSWER
    value = (random & _UPPER | FREE | random & _LOWER).to_bytes(8, "little")
    if run.exit_reason == c.KVM_EXIT_MMIO and not run.mmio.is_write:
        w.m.vcpu.io_page[_MMIO_DATA] = value
    elif run.exit_reason == c.KVM_EXIT_IO and run.io.direction == c.KVM_EXIT_IO_IN:
        length = run.io.size * run.io.count
        w.m.pio_data(length)[:] = (value * (length // 8 + 1))[:length]


def _finish_read(w: World) -> None:
    """Finish a device read: 7.3 loses what it read if registers are set before (invalid register cache)."""
    run = w.m.run_page
    if run.exit_reason == c.KVM_EXIT_MMIO and not run.mmio.is_write:
        _answer(w, 0)
        w.m.drain()


def _registers(w: World, changes: list[list[Any]]) -> None:
    """Change registers between two runs, with the completion of the last exit still pending."""
    _finish_read(w)
    registers = w.m.vcpu.get_regs()
    before = fields(registers)
    change(registers, [(path, value) for path, value in changes])
    w.m.vcpu.set_regs(registers)
    w.note(now=changed(before, fields(w.m.vcpu.get_regs())))


OPS: Final[dict[str, Callable[..., Any]]] = {
    "guest": _guest,
    "run": _run,
    "registers": _registers,
}
"""Step -> what does it."""
