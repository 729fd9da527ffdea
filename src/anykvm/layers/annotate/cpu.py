"""The vCPU as it stands: registers, mode, segments, and what is being delivered to it."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from anykvm.abi.ioctls import KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_VCPU_EVENTS
from anykvm.abi.structures import kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events
from anykvm.backends.base import Backend
from anykvm.layers.annotate.extended import Extended

CR0_PE: Final = 1 << 0
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11
RFLAGS_AC: Final = 1 << 18
RFLAGS_NT: Final = 1 << 14
RFLAGS_VM: Final = 1 << 17
RFLAGS_OF: Final = 1 << 11

_GPR: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp")
_NAMES: dict[str, tuple[str, int, int]] = {}  # name -> (field, shift, bits)
for _name in _GPR:
    _low = _name[1:]
    _NAMES |= {_name: (_name, 0, 64), f"e{_low}": (_name, 0, 32), _low: (_name, 0, 16)}
    _byte = f"{_low[0]}l" if _low.endswith("x") else f"{_low}l"
    _NAMES[_byte] = (_name, 0, 8)
    if _low.endswith("x"):
        _NAMES[f"{_low[0]}h"] = (_name, 8, 8)
for _number in range(8, 16):
    _name = f"r{_number}"
    _NAMES |= {f"{_name}{suffix}": (_name, 0, bits) for suffix, bits in (("", 64), ("d", 32), ("w", 16), ("b", 8))}
REGISTERS: Final = (*_GPR, *(f"r{number}" for number in range(8, 16)), "rip", "rflags")
"""General registers, as struct kvm_regs names them."""
CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "efer")
SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_NAMES |= {"rip": ("rip", 0, 64), "eip": ("rip", 0, 32), "ip": ("rip", 0, 16)}


class Cpu:
    """Registers read once, by ioctl."""

    def __init__(self, backend: Backend, fd: int) -> None:
        """Read them. Raises OSError as the ioctls do."""
        self.regs = kvm_regs()
        self.sregs = kvm_sregs()
        self.events = kvm_vcpu_events()
        backend.ioctl(fd, KVM_GET_REGS, ctypes.addressof(self.regs))
        backend.ioctl(fd, KVM_GET_SREGS, ctypes.addressof(self.sregs))
        backend.ioctl(fd, KVM_GET_VCPU_EVENTS, ctypes.addressof(self.events))
        self.extended = Extended(backend, fd)
        sregs = self.sregs
        self.protected = bool(sregs.cr0 & CR0_PE)
        self.v86 = self.protected and bool(self.regs.rflags & RFLAGS_VM)
        self.long = bool(sregs.efer & EFER_LMA)
        self.bits = 64 if self.long and sregs.cs.l else 32 if sregs.cs.db and self.protected and not self.v86 else 16
        """Of the code: 64, 32 or 16."""
        if not self.protected and sregs.cs.db:
            self.bits = 32
        self.cpl = 3 if self.v86 else sregs.ss.dpl if self.protected else 0
        self.stack_bits = 64 if self.bits == 64 else 32 if sregs.ss.db else 16

    @property
    def paging_levels(self) -> int:
        """Levels of the guest's page tables; 0 without paging."""
        sregs = self.sregs
        if not sregs.cr0 & CR0_PG:
            return 0
        if self.long:
            return 5 if sregs.cr4 & CR4_LA57 else 4
        return 3 if sregs.cr4 & CR4_PAE else 2

    def mode(self) -> str:
        """Name the mode in words: ``64-bit code in long mode, ring 0, 4 levels of page tables``."""
        if not self.protected:
            kind = "real mode"
        elif self.v86:
            kind = "virtual-8086 mode"
        else:
            kind = "long mode" if self.long else "protected mode"
        levels = self.paging_levels
        paging = f"{levels} levels of page tables" if levels else "no paging"
        return f"{self.bits}-bit code in {kind}, ring {self.cpl}, {paging}"

    def plain(self) -> dict[str, Any]:
        """As values for JSON: the general registers, control registers, segments and tables."""
        sregs = self.sregs
        found: dict[str, Any] = {"mode": self.mode()}
        found |= {name: getattr(self.regs, name) for name in REGISTERS}
        found |= {name: getattr(sregs, name) for name in CONTROL}
        for name in (*SEGMENTS, "tr", "ldt"):
            found[name] = {
                key: getattr(self.segment(name), key) for key in ("selector", "base", "limit", "type", "dpl")
            }
        for name in ("gdt", "idt"):
            table = getattr(sregs, name)
            found[name] = {"base": table.base, "limit": table.limit}
        return found

    def get(self, name: str) -> int:
        """Give a register's value by its assembler name; 0 for one that is not a general register."""
        found = _NAMES.get(name)
        if found is None:
            return 0
        field, shift, bits = found
        value: int = getattr(self.regs, field)
        return value >> shift & (1 << bits) - 1

    def width(self, name: str) -> int:
        """Bits of a register by its assembler name."""
        return _NAMES[name][2]

    def segment(self, name: str) -> kvm_segment:
        """Give a segment register by name."""
        segment: kvm_segment = getattr(self.sregs, name)
        return segment

    def linear(self, segment: str, offset: int, bits: int | None = None) -> int:
        """Make the linear address of ``segment:offset``; ``bits`` the address size, the code's own if not given."""
        offset &= (1 << (bits or self.bits)) - 1
        if self.bits == 64:
            base = self.segment(segment).base if segment in ("fs", "gs") else 0
            return (base + offset) & (1 << 64) - 1
        return (self.segment(segment).base + offset) & 0xFFFFFFFF

    def stack(self, offset: int) -> int:
        """Make the linear address of ``ss:[sp + offset]``."""
        return self.linear("ss", self.regs.rsp + offset, self.stack_bits)

    def system(self, base: int, offset: int) -> int:
        """Make a linear address within a system table."""
        return (base + offset) & ((1 << 64) - 1 if self.long else 0xFFFFFFFF)
