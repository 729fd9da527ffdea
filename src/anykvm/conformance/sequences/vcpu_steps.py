"""Steps on the vCPU's state: read it, change it, set it, and see what it is then."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.conformance import layout
from anykvm.conformance.outcome import attempt
from anykvm.conformance.sequences.fields import change, changed, fields
from anykvm.conformance.sequences.world import World, common_cpuid

_KINDS: Final[dict[str, tuple[type[ctypes.Structure], int, int]]] = {
    "regs": (s.kvm_regs, n.KVM_GET_REGS, n.KVM_SET_REGS),
    "sregs": (s.kvm_sregs, n.KVM_GET_SREGS, n.KVM_SET_SREGS),
    "sregs2": (s.kvm_sregs2, n.KVM_GET_SREGS2, n.KVM_SET_SREGS2),
    "fpu": (s.kvm_fpu, n.KVM_GET_FPU, n.KVM_SET_FPU),
    "debugregs": (s.kvm_debugregs, n.KVM_GET_DEBUGREGS, n.KVM_SET_DEBUGREGS),
    "events": (s.kvm_vcpu_events, n.KVM_GET_VCPU_EVENTS, n.KVM_SET_VCPU_EVENTS),
    "mp_state": (s.kvm_mp_state, n.KVM_GET_MP_STATE, n.KVM_SET_MP_STATE),
    "xcrs": (s.kvm_xcrs, n.KVM_GET_XCRS, n.KVM_SET_XCRS),
}


def _state(w: World, kind: str, changes: list[list[Any]], restore: bool = True) -> None:
    """Set a structure as it is read but for some fields; ``restore``: then as it was read."""
    structure, get, set_ = _KINDS[kind]
    before, wanted, after = structure(), structure(), structure()
    w.m.vcpu.ioctl(get, before)
    ctypes.memmove(ctypes.addressof(wanted), ctypes.addressof(before), ctypes.sizeof(before))
    change(wanted, [(path, value) for path, value in changes])
    outcome = attempt(lambda: w.m.vcpu.ioctl(set_, wanted))
    w.m.vcpu.ioctl(get, after)
    w.note(r=outcome.ret, e=outcome.errno, now=changed(fields(before), fields(after)))
    if restore:  # what cannot be set back, as after another CPUID, stays
        attempt(lambda: w.m.vcpu.ioctl(set_, before))


def _show(w: World, kind: str) -> None:
    structure, get, _ = _KINDS[kind]
    seen = structure()
    outcome = attempt(lambda: w.m.vcpu.ioctl(get, seen))
    w.note(r=outcome.ret, e=outcome.errno, is_=changed({}, fields(seen)))


def _msrs(w: World, values: list[list[int]], restore: bool = True) -> None:
    """KVM_SET_MSRS of all of them in one call; then each is read."""
    before = {index: _read_msr(w, index) for index, _ in values}
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_SET_MSRS, _msr_list(values)))
    after = {hex(index): _told(_read_msr(w, index)) for index in before}
    w.note(r=outcome.ret, e=outcome.errno, now=after)
    if restore:
        for index, value in before.items():
            if value is not None:
                _write_msr(w, index, value)


def _read_msr(w: World, index: int) -> int | None:
    data = _msr_list([[index, 0]])
    if attempt(lambda: w.m.vcpu.ioctl(n.KVM_GET_MSRS, data)).ret != 1:
        return None
    return s.kvm_msr_entry.from_buffer(data, ctypes.sizeof(s.kvm_msrs)).data


def _write_msr(w: World, index: int, value: int) -> None:
    w.m.vcpu.ioctl(n.KVM_SET_MSRS, _msr_list([[index, value]]))


def _told(value: int | None) -> str:
    return "none" if value is None else hex(value)


def _msr_list(values: list[list[int]]) -> ctypes.Array[ctypes.c_uint8]:
    header, entry = ctypes.sizeof(s.kvm_msrs), ctypes.sizeof(s.kvm_msr_entry)
    data = (ctypes.c_uint8 * (header + entry * len(values)))()
    s.kvm_msrs.from_buffer(data).nmsrs = len(values)
    for at, (index, value) in enumerate(values):
        made = s.kvm_msr_entry.from_buffer(data, header + entry * at)
        made.index, made.data = index, value
    return data


def _set_cpuid(w: World, count: int, entry: int, field: str, flip: int) -> None:
    """KVM_SET_CPUID2 of the first ``count`` entries of the guest's table (or more, of zeros), with bits flipped."""
    table = common_cpuid()
    setattr(table[entry], field, getattr(table[entry], field) ^ flip)
    data, entries = _cpuid(max(count, len(table)))
    for at, one in enumerate(table):
        entries[at] = one
    s.kvm_cpuid2.from_buffer(data).nent = count
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_SET_CPUID2, data))
    w.note(r=outcome.ret, e=outcome.errno)


def _get_cpuid(w: World, count: int) -> None:
    data, entries = _cpuid(count)
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_GET_CPUID2, data))
    told = s.kvm_cpuid2.from_buffer(data).nent
    first = [hex(value) for e in entries[:2] for value in (e.eax, e.ebx, e.ecx, e.edx)]
    w.note(r=outcome.ret, e=outcome.errno, nent=told, first=first)


def _cpuid(count: int) -> tuple[ctypes.Array[ctypes.c_uint8], Any]:
    header = ctypes.sizeof(s.kvm_cpuid2)
    data = (ctypes.c_uint8 * (header + ctypes.sizeof(s.kvm_cpuid_entry2) * count))()
    s.kvm_cpuid2.from_buffer(data).nent = count
    return data, (s.kvm_cpuid_entry2 * count).from_buffer(data, header)


def _translate(w: World, address: int) -> None:
    request = s.kvm_translation(linear_address=address)
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_TRANSLATE, request))
    w.note(r=outcome.ret, e=outcome.errno, is_=changed({}, fields(request)))


def _interrupt(w: World, irq: int) -> None:
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_INTERRUPT, s.kvm_interrupt(irq=irq)))
    w.note(r=outcome.ret, e=outcome.errno)


def _nmi(w: World) -> None:
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_NMI))
    w.note(r=outcome.ret, e=outcome.errno)


def _signal_mask(w: World, length: int, mask: int) -> None:
    """KVM_SET_SIGNAL_MASK; length 0: a null pointer."""
    data = (ctypes.c_uint8 * 12).from_buffer_copy(length.to_bytes(4, "little") + mask.to_bytes(8, "little"))
    argument = ctypes.addressof(data) if length else 0
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_SET_SIGNAL_MASK, argument))
    w.note(r=outcome.ret, e=outcome.errno)


def set_mode(w: World, mode: str, data: int, extra: int) -> None:
    """Put the vCPU in 64-bit mode, flat 32-bit protected mode without paging, or real mode.

    In real mode DS and ES begin at ``data`` and ``extra``, SS at the stack, CS at the code.
    """
    sregs = w.m.vcpu.get_sregs()
    if mode == "long" and sregs.cr3 == layout.PML4 and sregs.cs.l:
        return  # not after real mode, nor after a triple fault
    layout.long_mode(sregs)
    if mode != "long":
        real = mode == "real"
        sregs.cr0, sregs.cr4, sregs.efer = (0x10 if real else 0x11), 0, 0
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.l, segment.db = 0, int(not real)
            if real:
                segment.limit, segment.g = 0xFFFF, 0
                segment.selector, segment.base = 0, 0
        if real:
            sregs.cs.base, sregs.cs.selector = layout.CODE, layout.CODE >> 4
            sregs.ss.base, sregs.ss.selector = layout.STACK, layout.STACK >> 4
            sregs.ds.base, sregs.es.base = data, extra
            sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    w.m.vcpu.set_sregs(sregs)


OPS: Final[dict[str, Callable[..., Any]]] = {
    "state": _state,
    "show": _show,
    "msrs": _msrs,
    "set_cpuid": _set_cpuid,
    "get_cpuid": _get_cpuid,
    "translate": _translate,
    "interrupt": _interrupt,
    "nmi": _nmi,
    "signal_mask": _signal_mask,
}
"""Step -> what does it."""
