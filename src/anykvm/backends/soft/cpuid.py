"""The CPU the guest sees: KVM_GET_SUPPORTED_CPUID. Exactly what the engine executes, as an AMD Zen 2 would say it.

Not offered, because the engine cannot execute it: AVX and everything on it, F16C, FMA, XSAVEC, XSAVES, INVPCID, PCID,
SVM, LA57, PKU, MONITOR.
"""

from __future__ import annotations

import struct
from typing import Final

from anykvm.abi.constants import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from anykvm.abi.structures import kvm_cpuid_entry2
from anykvm.backends.soft.engine.values import AK_MAXPHYADDR

KVM_MAX_CPUID_ENTRIES: Final = 256
MAXPHYADDR: Final = AK_MAXPHYADDR
"""Guest-physical address bits."""
XSAVE_SIZE: Final = 576
"""Bytes of an XSAVE area with x87 and SSE state."""

_SIGNATURE: Final = 0x830F10  # family 17h, model 31h, stepping 0: also EDX at reset
_VENDOR: Final = struct.unpack("<3I", b"AuthenticAMD")
_KVM: Final = struct.unpack("<3I", b"KVMKVMKVM\0\0\0")
_BRAND: Final = struct.unpack("<12I", b"anykvm soft CPU".ljust(48, b"\0"))


def _bits(*positions: int) -> int:
    return sum(1 << position for position in positions)


# fmt: off
_BOTH_EDX: Final = _bits(  # the same bits in leaf 1 and, by AMD's tradition, in leaf 0x80000001
    0, 2, 3, 4, 5, 6, 7, 8, 9,  # FPU DE PSE TSC MSR PAE MCE CX8 APIC
    12, 13, 14, 15, 16, 17,  # MTRR PGE MCA CMOV PAT PSE36
    23, 24,  # MMX FXSR
)
_LEAF_1_EDX: Final = _BOTH_EDX | _bits(11, 19, 25, 26)  # SEP CLFSH SSE SSE2
_LEAF_1_ECX: Final = _bits(
    0, 1, 9, 13,  # SSE3 PCLMULQDQ SSSE3 CX16
    19, 20, 22, 23,  # SSE4.1 SSE4.2 MOVBE POPCNT
    25, 26, 30, 31,  # AES XSAVE RDRAND HYPERVISOR
)
_LEAF_7_EBX: Final = _bits(
    0, 1, 3, 7, 8,  # FSGSBASE TSC_ADJUST BMI1 SMEP BMI2
    18, 19, 20, 23, 24,  # RDSEED ADX SMAP CLFLUSHOPT CLWB
)
_EXTENDED_ECX: Final = _bits(0, 5, 8)  # LAHF_LM ABM 3DNOWPREFETCH
_EXTENDED_EDX: Final = _BOTH_EDX | _bits(11, 20, 22, 26, 27, 29)  # SYSCALL NX MMXEXT PDPE1GB RDTSCP LM
# fmt: on

_INDEXED: Final = KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_SUPPORTED: Final[tuple[tuple[int, int, int, int, int, int, int], ...]] = (
    # function, index, flags, eax, ebx, ecx, edx
    (0, 0, 0, 0xD, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    (1, 0, 0, _SIGNATURE, 8 << 8, _LEAF_1_ECX, _LEAF_1_EDX),  # CLFLUSH line: 8 quadwords
    (7, 0, _INDEXED, 0, _LEAF_7_EBX, 0, 0),
    (0xD, 0, _INDEXED, 3, XSAVE_SIZE, XSAVE_SIZE, 0),  # XCR0: x87 and SSE
    (0xD, 1, _INDEXED, 1, 0, 0, 0),  # XSAVEOPT
    (0x40000000, 0, 0, 0x40000001, *_KVM),
    (0x40000001, 0, 0, 0, 0, 0, 0),  # no paravirtual features
    (0x80000000, 0, 0, 0x80000008, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    (0x80000001, 0, 0, _SIGNATURE, 0, _EXTENDED_ECX, _EXTENDED_EDX),
    (0x80000002, 0, 0, *_BRAND[0:4]),
    (0x80000003, 0, 0, *_BRAND[4:8]),
    (0x80000004, 0, 0, *_BRAND[8:12]),
    (0x80000005, 0, 0, 0, 0, 0x20080140, 0x20080140),  # L1: 32 KiB, 8 ways, 64-byte lines; data, instructions
    (0x80000006, 0, 0, 0, 0, 0x02006140, 0),  # L2: 512 KiB, 8 ways, 64-byte lines
    (0x80000007, 0, 0, 0, 0, 0, 1 << 8),  # the TSC is invariant
    (0x80000008, 0, 0, MAXPHYADDR | 48 << 8, 0, 0, 0),  # 48-bit linear addresses
)
_EMULATED: Final[tuple[tuple[int, int, int, int, int, int, int], ...]] = (
    (0, 0, 0, 1, 0, 0, 0),
    (1, 0, 0, 0, 0, 1 << 22, 0),  # MOVBE
)


def supported_cpuid() -> list[kvm_cpuid_entry2]:
    """Make the entries of KVM_GET_SUPPORTED_CPUID."""
    return [kvm_cpuid_entry2(*entry) for entry in _SUPPORTED]


def emulated_cpuid() -> list[kvm_cpuid_entry2]:
    """Make the entries of KVM_GET_EMULATED_CPUID: instructions that work whatever the host CPU has."""
    return [kvm_cpuid_entry2(*entry) for entry in _EMULATED]
