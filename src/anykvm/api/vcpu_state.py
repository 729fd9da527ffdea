"""The register state of a vCPU."""

from __future__ import annotations

import ctypes
import errno as _errno
from collections.abc import Iterable, Mapping
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.api.flexible import flexible, read_msrs, tail, write_msrs
from anykvm.api.handle import Handle

_XSAVE: Final = 4096
_MAX_REGS: Final = 1 << 16
_REGISTER_SIZES: Final = tuple(1 << power for power in range(9))  # KVM_REG_SIZE_U8 to KVM_REG_SIZE_U2048


class VcpuState(Handle):
    """The ioctls of ``Vcpu`` that read and write registers."""

    def get_regs(self) -> s.kvm_regs:
        """KVM_GET_REGS: general registers, RIP, RFLAGS."""
        return self._get(n.KVM_GET_REGS, s.kvm_regs)

    def set_regs(self, regs: s.kvm_regs) -> None:
        """KVM_SET_REGS. Any value is taken; a wrong one is the guest's problem when it runs."""
        self._call(n.KVM_SET_REGS, regs)

    def get_sregs(self) -> s.kvm_sregs:
        """KVM_GET_SREGS: segments, control registers, EFER, APIC base."""
        return self._get(n.KVM_GET_SREGS, s.kvm_sregs)

    def set_sregs(self, sregs: s.kvm_sregs) -> None:
        """KVM_SET_SREGS. Raises OSError: EINVAL for an impossible combination of CR0, CR4, EFER, CS."""
        self._call(n.KVM_SET_SREGS, sregs, why=_why_sregs)

    def get_sregs2(self) -> s.kvm_sregs2:
        """KVM_GET_SREGS2: as ``get_sregs``, with PAE's PDPTRs instead of the pending interrupt."""
        return self._get(n.KVM_GET_SREGS2, s.kvm_sregs2)

    def set_sregs2(self, sregs: s.kvm_sregs2) -> None:
        """KVM_SET_SREGS2. Raises OSError: EINVAL as ``set_sregs``, or for unknown flags."""
        self._call(n.KVM_SET_SREGS2, sregs, why=_why_sregs)

    def set_real_mode(self, rip: int, selector: int = 0) -> None:
        """Start in real mode at ``selector:rip``: a convenience over ``set_sregs`` and ``set_regs``.

        Other registers become 0; a new vCPU would start at the reset vector instead.
        """
        sregs = self.get_sregs()
        sregs.cs.selector, sregs.cs.base = selector, selector << 4
        self.set_sregs(sregs)
        self.set_regs(s.kvm_regs(rip=rip, rflags=2))

    def get_fpu(self) -> s.kvm_fpu:
        """KVM_GET_FPU: x87 and SSE state."""
        return self._get(n.KVM_GET_FPU, s.kvm_fpu)

    def set_fpu(self, fpu: s.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._call(n.KVM_SET_FPU, fpu)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: index -> value.

        KVM stops at the first MSR it cannot read; the result then holds those before it.
        """
        return read_msrs(self, indices)

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS, in order: returns how many were set before the first that KVM refused."""
        return write_msrs(self, values)

    def get_debugregs(self) -> s.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        return self._get(n.KVM_GET_DEBUGREGS, s.kvm_debugregs)

    def set_debugregs(self, debugregs: s.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS. Raises OSError: EINVAL for flags or upper bits of DR6, DR7."""
        self._call(n.KVM_SET_DEBUGREGS, debugregs)

    def get_xcrs(self) -> s.kvm_xcrs:
        """KVM_GET_XCRS: XCR0. Raises OSError: EINVAL without XSAVE."""
        return self._get(n.KVM_GET_XCRS, s.kvm_xcrs)

    def set_xcrs(self, xcrs: s.kvm_xcrs) -> None:
        """KVM_SET_XCRS. Raises OSError: EINVAL for a value the vCPU's CPUID does not allow."""
        self._call(n.KVM_SET_XCRS, xcrs)

    def get_xsave(self) -> s.kvm_xsave:
        """KVM_GET_XSAVE: the first 4096 bytes of XSAVE state. EINVAL if there are more in use."""
        return self._get(n.KVM_GET_XSAVE, s.kvm_xsave)

    def get_xsave2(self) -> bytes:
        """KVM_GET_XSAVE2: all XSAVE state, of the size KVM_CAP_XSAVE2 tells."""
        buffer = (ctypes.c_uint8 * self._xsave_size())()
        self._call(n.KVM_GET_XSAVE2, buffer)
        return bytes(buffer)

    def set_xsave(self, xsave: s.kvm_xsave | bytes) -> None:
        """KVM_SET_XSAVE of either form. Raises OSError: EINVAL for state CPUID or XCR0 exclude."""
        # The kernel reads as many bytes as the VM's largest state has, however short the caller's structure is.
        size = self._xsave_size()
        self._call(n.KVM_SET_XSAVE, (ctypes.c_uint8 * size).from_buffer_copy(bytes(xsave).ljust(size, b"\0")))

    def _xsave_size(self) -> int:
        vm = self._parent
        return max(_XSAVE, vm._call(n.KVM_CHECK_EXTENSION, c.KVM_CAP_XSAVE2)) if vm else _XSAVE

    def get_nested_state(self) -> bytes:
        """KVM_GET_NESTED_STATE: struct kvm_nested_state and its data.

        Raises OSError: EINVAL without KVM_CAP_NESTED_STATE.
        """
        vm = self._parent
        offered = vm._call(n.KVM_CHECK_EXTENSION, c.KVM_CAP_NESTED_STATE) if vm else 0
        size = max(ctypes.sizeof(s.kvm_nested_state), offered)
        buffer = (ctypes.c_uint8 * size)()
        s.kvm_nested_state.from_buffer(buffer).size = size
        self._call(n.KVM_GET_NESTED_STATE, buffer)
        return bytes(buffer[: s.kvm_nested_state.from_buffer(buffer).size])

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE. Raises OSError: EINVAL, EFAULT."""
        self._call(n.KVM_SET_NESTED_STATE, (ctypes.c_uint8 * len(state)).from_buffer_copy(state))

    def get_one_reg(self, id: int, size: int = 8) -> int:
        """KVM_GET_ONE_REG: a register by its KVM_REG_* id, of ``size`` bytes.

        Raises OSError: ENOENT, EINVAL; ValueError for a size that no register has.
        """
        value = (ctypes.c_uint8 * _register_size(size))()
        self._call(n.KVM_GET_ONE_REG, s.kvm_one_reg(id=id, addr=ctypes.addressof(value)), {"id": id})
        return int.from_bytes(bytes(value), "little")

    def set_one_reg(self, id: int, value: int, size: int = 8) -> None:
        """KVM_SET_ONE_REG of a register of ``size`` bytes.

        Raises OSError: ENOENT, EINVAL; ValueError for a size that no register has, or a value that it cannot have.
        """
        if not 0 <= value < 1 << 8 * _register_size(size):
            raise ValueError(f"value {value:#x} is not a number of {size} bytes")
        data = (ctypes.c_uint8 * size).from_buffer_copy(value.to_bytes(size, "little"))
        self._call(n.KVM_SET_ONE_REG, s.kvm_one_reg(id=id, addr=ctypes.addressof(data)), {"id": id})

    def get_reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST: the ids ``get_one_reg`` knows."""
        count = 0
        while True:
            buffer, header = flexible(s.kvm_reg_list, ctypes.c_uint64, count)
            header.n = count
            try:
                self._call(n.KVM_GET_REG_LIST, buffer)
                return list(tail(buffer, header, ctypes.c_uint64, header.n))
            except OSError as error:
                if error.errno != _errno.E2BIG or not count < header.n <= _MAX_REGS:
                    raise
                count = header.n


def _register_size(size: int) -> int:
    """KVM_REG_SIZE_MASK: from 1 to 256 bytes."""
    if size not in _REGISTER_SIZES:
        raise ValueError(f"size {size} is none of {', '.join(map(str, _REGISTER_SIZES))}")
    return size


def _why_sregs(errno: int) -> str | None:
    return "CR0, CR4, EFER and CS do not fit together, or have reserved bits" if errno == _errno.EINVAL else None
