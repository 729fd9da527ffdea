"""Limits of x86's KVM that its user headers do not tell. Source: arch/x86/include/asm/kvm_host.h, linux/kvm_host.h."""

from __future__ import annotations

from typing import Final

KVM_MIN_ALLOC_MMU_PAGES: Final = 64
"""KVM_SET_NR_MMU_PAGES takes no fewer."""
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1
"""Pages of a memslot."""
