"""Other modes of the guest than ring 0 of 64-bit mode, and handlers that say more than that there was an exception."""

from __future__ import annotations

from typing import Final

from anykvm.abi.structures import kvm_sregs
from anykvm.conformance import layout
from anykvm.conformance.machine import Machine

USER_IOPL: Final = 0x3002
"""RFLAGS of ring 3 with the right to use ports."""
USER_CODE: Final = 0x20 | 3
USER_DATA: Final = 0x28 | 3
_TSS_RSP0: Final = 4
_USER: Final = 3
# pop rcx; mov rdi, cr2; mov al, VECTOR; out 0xe0, al; hlt
_REPORT_ERROR_CODE: Final = bytes.fromhex("59 0f20d7 b0"), bytes.fromhex("e6e0 f4")


def user_mode(m: Machine) -> None:
    """Let the vCPU be in ring 3; exceptions go to ring 0 on ``layout.STACK``. RFLAGS is to be ``USER_IOPL``."""
    m.memory.put64(layout.GDT + (USER_CODE & ~3), 0x00AFFB000000FFFF)
    m.memory.put64(layout.GDT + (USER_DATA & ~3), 0x00CFF3000000FFFF)
    m.memory.put64(layout.TSS + _TSS_RSP0, layout.STACK)
    sregs = m.vcpu.get_sregs()
    sregs.cs.selector, sregs.cs.dpl = USER_CODE, _USER
    for name in ("ds", "es", "ss"):
        segment = getattr(sregs, name)
        segment.selector, segment.dpl = USER_DATA, _USER
    m.vcpu.set_sregs(sregs)


def compatibility_mode(m: Machine) -> None:
    """Let the vCPU run 32-bit code in ring 0, with the same page tables; its exceptions come in 64-bit mode."""
    sregs = m.vcpu.get_sregs()
    sregs.cs.l, sregs.cs.db = 0, 1
    sregs.ss.db = 1
    m.vcpu.set_sregs(sregs)


def real_mode(sregs: kvm_sregs, base: int = 0) -> kvm_sregs:
    """Change system registers to real mode with CS at ``base``."""
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x10, 0, 0, 0
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base = segment.selector = 0
        segment.limit, segment.type, segment.g, segment.db, segment.l = 0xFFFF, 3, 0, 0, 0
    sregs.cs.base, sregs.cs.selector = base, base >> 4
    return sregs


def catch_error_code(m: Machine, vector: int) -> None:
    """Make the handler of an exception that has an error code report it in RCX, and CR2 in RDI."""
    before, after = _REPORT_ERROR_CODE
    m.memory.put(layout.HANDLERS + 16 * vector, (before + bytes((vector,)) + after).ljust(16, b"\0"))
