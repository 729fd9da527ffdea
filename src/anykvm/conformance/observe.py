"""What is recorded of a KVM_RUN: its result, the kvm_run page and the registers."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi.names import EXIT_NAMES
from anykvm.abi.reading import field
from anykvm.abi.structures import kvm_run
from anykvm.api.vcpu import Vcpu
from anykvm.conformance.outcome import Outcome

POISON_REASON: Final = 0xDEADBEEF
"""What exit_reason is set to before a KVM_RUN."""
POISON_FLAGS: Final = 0x5555
POISON_BYTE: Final = 0xAA
UNION, POISON_LENGTH = field(kvm_run, "padding")
"""Where kvm_run's exit union begins, and its length."""
UNION_SHOWN: Final = field(kvm_run, "memory_fault")[1]
"""How much of it is recorded: memory_fault's length."""


def poison(vcpu: Vcpu, *, keep_union: bool = False) -> None:
    """Overwrite what a KVM_RUN may write, so that what it did not write is recognised."""
    run, page = vcpu.kvm_run, vcpu.io_page
    if not keep_union:
        page[UNION : UNION + POISON_LENGTH] = bytes((POISON_BYTE,)) * POISON_LENGTH
    run.exit_reason = POISON_REASON
    run.flags = POISON_FLAGS


def exit_name(reason: int) -> str:
    """Name an exit reason as the records do.

    >>> exit_name(2), exit_name(0xDEADBEEF)
    ('IO', '<untouched>')
    """
    if reason == POISON_REASON:
        return "<untouched>"
    return EXIT_NAMES.get(reason, "KVM_EXIT_?").removeprefix("KVM_EXIT_")


def _memory_fault(vcpu: Vcpu) -> dict[str, Any]:
    fault = vcpu.kvm_run.memory_fault
    return {"memory_fault": {"flags": fault.flags, "gpa": hex(fault.gpa), "size": fault.size}}


def _mmio(vcpu: Vcpu) -> dict[str, Any]:
    mmio = vcpu.kvm_run.mmio
    data = bytes(mmio.data).hex()
    return {"mmio": {"phys": hex(mmio.phys_addr), "len": mmio.len, "w": mmio.is_write, "data": data}}


def _io(vcpu: Vcpu) -> dict[str, Any]:
    io = vcpu.kvm_run.io
    return {"io": {"dir": io.direction, "size": io.size, "port": hex(io.port), "count": io.count}}


def _internal(vcpu: Vcpu) -> dict[str, Any]:
    internal = vcpu.kvm_run.internal
    data = [hex(word) for word in internal.data[: min(internal.ndata, len(internal.data))]]
    return {"internal": {"suberror": internal.suberror, "ndata": internal.ndata, "data": data}}


def _system_event(vcpu: Vcpu) -> dict[str, Any]:
    return {"sysev": vcpu.kvm_run.system_event.type}


def _fail_entry(vcpu: Vcpu) -> dict[str, Any]:
    return {"fail": hex(vcpu.kvm_run.fail_entry.hardware_entry_failure_reason)}


_PAYLOADS: Final = {
    c.KVM_EXIT_MEMORY_FAULT: _memory_fault,
    c.KVM_EXIT_MMIO: _mmio,
    c.KVM_EXIT_IO: _io,
    c.KVM_EXIT_INTERNAL_ERROR: _internal,
    c.KVM_EXIT_SYSTEM_EVENT: _system_event,
    c.KVM_EXIT_FAIL_ENTRY: _fail_entry,
}


def observe(vcpu: Vcpu, outcome: Outcome) -> dict[str, Any]:
    """Give the fields of a record of a KVM_RUN that has just returned ``outcome``."""
    run = vcpu.kvm_run
    reason = run.exit_reason
    seen: dict[str, Any] = {**outcome.fields(), "exit_reason": reason, "er": exit_name(reason)}
    seen["union24"] = bytes(vcpu.io_page[UNION : UNION + UNION_SHOWN]).hex()
    if payload := _PAYLOADS.get(reason):
        seen.update(payload(vcpu))
    seen.update({"run_flags": run.flags, "if": run.if_flag, "rdy": run.ready_for_interrupt_injection})
    with contextlib.suppress(OSError):  # a vCPU another thread runs cannot be asked; the record is then without them
        registers = vcpu.get_regs()
        for name in ("rip", "rax", "rcx", "rdi", "rsi", "rsp"):
            seen[name] = hex(getattr(registers, name))
    return seen
