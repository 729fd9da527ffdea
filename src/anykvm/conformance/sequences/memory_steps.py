"""Steps on the VM: memslots, dirty logs and rings, guest_memfd, and what else its descriptor takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from anykvm.abi import ioctls as n
from anykvm.abi.structures import (
    kvm_clear_dirty_log,
    kvm_create_guest_memfd,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_pre_fault_memory,
)
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.sequences.world import World

BAD_POINTER: Final = 8
_BITMAP_BYTES: Final = 512
"""Room for the bitmap of any slot that a sequence logs."""
_UNTOUCHED: Final = 0xA5


def _slot(w: World, slot: int, gpa: int, size: int, buffer: int, page: int, flags: int = 0) -> None:
    _result(w, w.m.slot(slot, gpa, size, w.address(buffer, page), flags))


def _slot2(
    w: World, slot: int, gpa: int, size: int, buffer: int, page: int, flags: int = 0, gmem: int = 0, offset: int = 0
) -> None:
    _result(w, w.m.slot2(slot, gpa, size, w.address(buffer, page), flags, w.gmem(gmem), offset))


def _dirty_get(w: World, slot: int, bad: bool = False) -> None:
    bitmap = (ctypes.c_uint8 * _BITMAP_BYTES)(*[_UNTOUCHED] * _BITMAP_BYTES)
    request = kvm_dirty_log(slot=slot, dirty_bitmap=BAD_POINTER if bad else ctypes.addressof(bitmap))
    outcome = attempt(lambda: w.m.vm.ioctl(n.KVM_GET_DIRTY_LOG, request))
    _result(w, outcome, bits=bytes(bitmap).rstrip(bytes((_UNTOUCHED,))).hex())


def _dirty_clear(w: World, slot: int, first: int, count: int, bits: int, bad: bool = False) -> None:
    bitmap = (ctypes.c_uint8 * _BITMAP_BYTES).from_buffer_copy(bits.to_bytes(_BITMAP_BYTES, "little"))
    pointer = BAD_POINTER if bad else ctypes.addressof(bitmap)
    request = kvm_clear_dirty_log(slot=slot, first_page=first, num_pages=count, dirty_bitmap=pointer)
    _result(w, attempt(lambda: w.m.vm.ioctl(n.KVM_CLEAR_DIRTY_LOG, request)))


def _ring_harvest(w: World, limit: int) -> None:
    if w.ring is not None:
        w.note(pages=[list(page) for page in w.ring.harvest(limit)])


def _ring_reset(w: World) -> None:
    _result(w, attempt(lambda: w.m.vm.ioctl(n.KVM_RESET_DIRTY_RINGS)))


def _cap(w: World, cap: int, flags: int, arg: int, vcpu: bool = False) -> None:
    request = kvm_enable_cap(cap=cap, flags=flags)
    request.args[0] = arg
    _result(w, attempt(lambda: (w.m.vcpu if vcpu else w.m.vm).ioctl(n.KVM_ENABLE_CAP, request)))


def _gmem_create(w: World, size: int, flags: int) -> None:
    request = kvm_create_guest_memfd(size, flags)
    outcome = attempt(lambda: w.m.vm.ioctl(n.KVM_CREATE_GUEST_MEMFD, request))
    if not outcome.failed:
        w.gmems.append(outcome.ret)
    w.note(e=outcome.errno)


def _pre_fault(w: World, gpa: int, size: int, flags: int = 0) -> None:
    request = kvm_pre_fault_memory(gpa=gpa, size=size, flags=flags)
    outcome = attempt(lambda: w.m.vcpu.ioctl(n.KVM_PRE_FAULT_MEMORY, request))
    _result(w, outcome, gpa=hex(request.gpa), left=hex(request.size))


def _number(w: World, request: int, value: int, vcpu: bool = False) -> None:
    """An ioctl that takes a number."""
    _result(w, attempt(lambda: (w.m.vcpu if vcpu else w.m.vm).ioctl(request, value)))


def _pointer(w: World, request: int, value: int, vcpu: bool = False) -> None:
    """An ioctl that takes a pointer to a number."""
    data = (ctypes.c_uint8 * 4096).from_buffer_copy(value.to_bytes(8, "little").ljust(4096, b"\0"))
    _result(w, attempt(lambda: (w.m.vcpu if vcpu else w.m.vm).ioctl(request, ctypes.addressof(data))))


def _create_vcpu(w: World, id: int) -> None:
    def create() -> None:
        w.m.vm.create_vcpu(id)

    w.note(e=attempt(create).errno)


def _result(w: World, outcome: Outcome, **seen: Any) -> None:
    w.note(r=outcome.ret, e=outcome.errno, **seen)


OPS: Final[dict[str, Callable[..., Any]]] = {
    "slot": _slot,
    "slot2": _slot2,
    "dirty_get": _dirty_get,
    "dirty_clear": _dirty_clear,
    "ring_harvest": _ring_harvest,
    "ring_reset": _ring_reset,
    "cap": _cap,
    "gmem_create": _gmem_create,
    "pre_fault": _pre_fault,
    "number": _number,
    "pointer": _pointer,
    "create_vcpu": _create_vcpu,
}
"""Step -> what does it."""
