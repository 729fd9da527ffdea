"""The vCPU's extended state, asked for when an instruction needs it: vector and mask registers, XSAVE's layout."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Final, NamedTuple

from anykvm.abi import ioctls as n
from anykvm.abi.structures import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_fpu,
    kvm_msr_entry,
    kvm_msrs,
    kvm_xcrs,
)
from anykvm.backends.base import Backend

X87, SSE, AVX, OPMASK, ZMM_HIGH, ZMM_16 = 0, 1, 2, 5, 6, 7
"""Components of the XSAVE area, by their bit of XCR0."""
LEGACY, HEADER = 512, 64
"""Bytes of the area's two first parts."""
_ROOM: Final = 1 << 16  # more than any XSAVE area
_ENTRIES: Final = 256  # KVM_MAX_CPUID_ENTRIES
_LEAF: Final = 0xD
_XSS: Final = 0xDA0
_REGISTER: Final = re.compile(r"(mm|xmm|ymm|zmm|k)(\d+)")
_ST, _XMM = 32, 160  # in the legacy part
_XSTATE_BV: Final = 512


class Component(NamedTuple):
    """A component of the XSAVE area, of CPUID leaf 0xD."""

    size: int
    offset: int
    """In the area's standard format."""
    aligned: bool
    """In its compacted format it begins at a multiple of 64."""


class Extended:
    """Reads each thing once, at its first use, which must be before the vCPU runs again. None: it cannot be had."""

    def __init__(self, backend: Backend, fd: int) -> None:
        """Of the vCPU whose descriptor is ``fd``."""
        self._backend = backend
        self._fd = fd

    def _ioctl(self, request: int, structure: ctypes.Structure | ctypes.Array[ctypes.c_uint8]) -> bool:
        try:
            self._backend.ioctl(self._fd, request, ctypes.addressof(structure))
        except OSError:
            return False
        return True

    @functools.cached_property
    def components(self) -> dict[int, Component]:
        """The components behind the legacy part that the vCPU's CPUID has, by number; KVM uses the same layout."""
        buffer = (ctypes.c_uint8 * (ctypes.sizeof(kvm_cpuid2) + _ENTRIES * ctypes.sizeof(kvm_cpuid_entry2)))()
        header = kvm_cpuid2.from_buffer(buffer)
        header.nent = _ENTRIES
        if not self._ioctl(n.KVM_GET_CPUID2, buffer):
            return {}
        entries = (kvm_cpuid_entry2 * header.nent).from_buffer(buffer, ctypes.sizeof(kvm_cpuid2))
        return {
            entry.index: Component(entry.eax, entry.ebx, bool(entry.ecx & 2))
            for entry in entries
            if entry.function == _LEAF and entry.index >= AVX and entry.eax
        }

    @functools.cached_property
    def xcr0(self) -> int | None:
        """XCR0."""
        xcrs = kvm_xcrs()
        if not self._ioctl(n.KVM_GET_XCRS, xcrs):
            return None
        return next((xcr.value for xcr in xcrs.xcrs[: xcrs.nr_xcrs] if xcr.xcr == 0), None)

    @functools.cached_property
    def xss(self) -> int:
        """IA32_XSS; 0 where there is none."""
        buffer = (ctypes.c_uint8 * (ctypes.sizeof(kvm_msrs) + ctypes.sizeof(kvm_msr_entry)))()
        kvm_msrs.from_buffer(buffer).nmsrs = 1
        entry = kvm_msr_entry.from_buffer(buffer, ctypes.sizeof(kvm_msrs))
        entry.index = _XSS
        return int(entry.data) if self._ioctl(n.KVM_GET_MSRS, buffer) else 0

    @functools.cached_property
    def _area(self) -> bytes | None:
        """The state as an XSAVE area in standard format, as far as KVM gives it."""
        buffer = (ctypes.c_uint8 * _ROOM)()
        if self._ioctl(n.KVM_GET_XSAVE2, buffer) or self._ioctl(n.KVM_GET_XSAVE, buffer):
            return bytes(buffer)
        fpu = kvm_fpu()
        if not self._ioctl(n.KVM_GET_FPU, fpu):
            return None
        head = int(fpu.fcw).to_bytes(2, "little") + int(fpu.fsw).to_bytes(2, "little")
        legacy = head.ljust(_ST, b"\0") + bytes(fpu.fpr) + bytes(fpu.xmm)
        present = 1 << X87 | 1 << SSE
        return legacy.ljust(_XSTATE_BV, b"\0") + present.to_bytes(8, "little") + bytes(HEADER - 8)

    def register(self, name: str) -> bytes | None:
        """A vector or mask register's bytes by its assembler name; None if it cannot be had."""
        found = _REGISTER.fullmatch(name)
        if found is None:
            return None
        kind, number = found[1], int(found[2])
        if kind == "mm":
            return self._mmx(number)
        if kind == "k":
            return self._part(OPMASK, 8 * number, 8)
        if number >= 16:
            return self._part(ZMM_16, 64 * (number - 16), {"xmm": 16, "ymm": 32, "zmm": 64}[kind])
        parts = [self._part(SSE, _XMM + 16 * number, 16)]
        if kind != "xmm":
            parts.append(self._part(AVX, 16 * number, 16))
        if kind == "zmm":
            parts.append(self._part(ZMM_HIGH, 32 * number, 32))
        return None if None in parts else b"".join(part for part in parts if part is not None)

    def _mmx(self, number: int) -> bytes | None:
        """The area has the x87's registers from the top of stack on; MMX counts them from 0."""
        state = self._part(X87, 0, 4)
        if state is None:
            return None
        top = state[3] >> 3 & 7
        return self._part(X87, _ST + 16 * (number - top & 7), 8)

    def _part(self, component: int, offset: int, size: int) -> bytes | None:
        area = self._area
        if area is None:
            return None
        if component >= AVX:
            layout = self.components.get(component)
            if layout is None:
                return None
            offset += layout.offset
        if not area[_XSTATE_BV + component // 8] >> component % 8 & 1:
            return bytes(size)  # in its initial state, whatever the bytes are
        found = area[offset : offset + size]
        return found if len(found) == size else None
