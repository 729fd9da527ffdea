"""Values that the engine's C (``engine.h``) has too. Loading the library compares them (``layout.py``)."""

from __future__ import annotations

from typing import Final

# enum ak_exit_kind
AK_EXIT_NONE: Final = 0
AK_EXIT_KICKED: Final = 1
AK_EXIT_IO: Final = 2
AK_EXIT_MMIO: Final = 3
AK_EXIT_HLT: Final = 4
AK_EXIT_SHUTDOWN: Final = 5
AK_EXIT_FAULT: Final = 6
AK_EXIT_EMULATION: Final = 7
AK_EXIT_SET_TPR: Final = 8
AK_EXIT_DELIVERY: Final = 9
AK_EXIT_IRQ_WINDOW: Final = 10
AK_EXIT_HYPERCALL: Final = 11
AK_EXIT_DIRTY_FULL: Final = 12
AK_EXIT_ENGINE: Final = 13
AK_EXIT_HWPOISON: Final = 14

# enum ak_completion
AK_COMPLETE_NONE: Final = 0
AK_COMPLETE_PIO: Final = 1
AK_COMPLETE_STRING_IN: Final = 2
AK_COMPLETE_MMIO_READ: Final = 3
AK_COMPLETE_MMIO_WRITE: Final = 4
AK_COMPLETE_HYPERCALL: Final = 5

# enum ak_access
AK_READ: Final = 0
AK_WRITE: Final = 1
AK_FETCH: Final = 2

# enum ak_device_answer: what a device mapping's fault handler says
AK_DEVICE_PRESENT: Final = 0
AK_DEVICE_FAILED: Final = 1
AK_DEVICE_READ_ONLY: Final = 2
AK_DEVICE_INTERRUPTED: Final = 3
AK_DEVICE_RAISED: Final = 16

# enum ak_behaviour: what KVMs do differently
AK_INIT_AFTER_SHUTDOWN: Final = 1
AK_EMULATE_IN_DELIVERY: Final = 2
AK_ANY_EFER: Final = 4
AK_SYNC_LOW_HALF: Final = 8
AK_STALE_PRE_FAULT: Final = 16
AK_HYPERCALL_6_12: Final = 32

# enum ak_purge: where KVM_RUN resets exit_reason
AK_PURGE_VCPU_RUN: Final = 0
AK_PURGE_BEFORE_LOCK: Final = 1
AK_PURGE_AFTER_LOCK: Final = 2
AK_PURGE_AFTER_COMPLETION: Final = 3
AK_PURGE_NEVER: Final = 4

# GUEST_MEMFD_FLAG_*
AK_GMEM_MMAP: Final = 1
AK_GMEM_INIT_SHARED: Final = 2

AK_MAXPHYADDR: Final = 40
"""Guest-physical address bits."""
AK_PAGE_SIZE: Final = 4096
AK_DIRTY_RING_RESERVED: Final = 64
"""KVM_DIRTY_RING_RSVD_ENTRIES, beyond the soft limit. A processor that logs pages itself (Intel's PML) needs more."""
