"""MSR lists: what KVM_GET_MSR_INDEX_LIST and its feature twin say. The values are the engine's (``msr.c``)."""

from __future__ import annotations

from typing import Final

MSR_IA32_UCODE_REV: Final = 0x8B
MICROCODE_REVISION: Final = 0x1000065
"""What MSR_IA32_UCODE_REV reads in a new vCPU; a number real hardware of this model has, so guests see no quirks."""

MSRS_TO_SAVE: Final = (
    0x10,  # MSR_IA32_TSC
    0x3B,  # MSR_IA32_TSC_ADJUST
    MSR_IA32_UCODE_REV,
    0xCE,  # MSR_PLATFORM_INFO
    *(0x174, 0x175, 0x176),  # MSR_IA32_SYSENTER_CS, _ESP, _EIP
    0x17A,  # MSR_IA32_MCG_STATUS
    0x1A0,  # MSR_IA32_MISC_ENABLE
    *range(0x200, 0x210),  # MSR_MTRRphysBase0 .. MSR_MTRRphysMask7
    *(0x250, 0x258, 0x259),  # MSR_MTRRfix64K_00000, fix16K
    *range(0x268, 0x270),  # MSR_MTRRfix4K_C0000 .. F8000
    0x277,  # MSR_IA32_CR_PAT
    0x2FF,  # MSR_MTRRdefType
    *range(0xC0000081, 0xC0000085),  # MSR_STAR, LSTAR, CSTAR, SYSCALL_MASK
    0xC0000102,  # MSR_KERNEL_GS_BASE
    0xC0000103,  # MSR_TSC_AUX
    0xC0010015,  # MSR_K7_HWCR
)
"""State that GET/SET_REGS, SREGS and the other structures do not hold; each can be read and written back."""

FEATURE_MSRS: Final = {MSR_IA32_UCODE_REV: MICROCODE_REVISION}
"""MSRs that describe the CPU, readable on /dev/kvm, with their values."""
