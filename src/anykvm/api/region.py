"""Why a memory region is refused: the checks of KVM_SET_USER_MEMORY_REGION in the kernel's order, as messages.

The kernel answers with an errno alone. These are its checks again (virt/kvm/kvm_main.c, kvm_set_memory_region), asked
only after it has refused, so they can never refuse what it accepts.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Container
from typing import Final

from anykvm.abi import constants as c
from anykvm.host.ranges import PAGE_SIZE

_SLOTS: Final = 32764  # KVM_USER_MEM_SLOTS on x86: SHRT_MAX less three of KVM's own
_TASK_SIZE: Final = (1 << 47) - PAGE_SIZE
_MAX_PAGES: Final = (1 << 31) - 1
_FLAGS: Final = c.KVM_MEM_LOG_DIRTY_PAGES | c.KVM_MEM_READONLY | c.KVM_MEM_GUEST_MEMFD


def why_region_refused(errno: int, region: dict[str, int], slots: Container[int]) -> str | None:
    """Explain ``errno`` for a region's fields, given the slots that exist; None when there is nothing to add.

    >>> why_region_refused(22, {"slot": 0, "guest_phys_addr": 0x123, "memory_size": 4096, "userspace_addr": 0}, ())
    'guest_phys_addr is not page aligned'
    """
    if errno == _errno.EEXIST:
        return "guest_phys_addr overlaps another slot, or the guest_memfd range is bound to one"
    if errno == _errno.EBADF:
        return "guest_memfd is not an open descriptor"
    if errno != _errno.EINVAL:
        return None
    slot, start, size = region["slot"], region["guest_phys_addr"], region["memory_size"]
    address, flags = region["userspace_addr"], region.get("flags", 0)
    checks = (
        (slot & 0xFFFF >= _SLOTS, f"slot is not below {_SLOTS}"),
        (flags & ~_FLAGS, f"flags has unknown bits {flags & ~_FLAGS:#x}"),
        (flags & c.KVM_MEM_GUEST_MEMFD and flags != c.KVM_MEM_GUEST_MEMFD, "flags combines KVM_MEM_GUEST_MEMFD"),
        (size % PAGE_SIZE, "memory_size is not page aligned"),
        (start % PAGE_SIZE, "guest_phys_addr is not page aligned"),
        (address % PAGE_SIZE, "userspace_addr is not page aligned"),
        (address + size > _TASK_SIZE, "userspace_addr + memory_size is beyond the user address space"),
        (region.get("guest_memfd_offset", 0) % PAGE_SIZE, "guest_memfd_offset is not page aligned"),
        (slot >> 16 > 1, "slot names an address space (its upper 16 bits) that does not exist"),
        (start + size > 1 << 64, "guest_phys_addr + memory_size wraps"),
        (size // PAGE_SIZE > _MAX_PAGES, "memory_size is more than 2^31 - 1 pages"),
        (size == 0 and slot not in slots, "memory_size 0 deletes a slot, and this slot does not exist"),
        (slot in slots and flags & c.KVM_MEM_GUEST_MEMFD, "a slot with guest_memfd can only be deleted"),
        (slot in slots, "the slot exists: only guest_phys_addr and KVM_MEM_LOG_DIRTY_PAGES can change"),
        (start + size > 1 << 52, "guest_phys_addr + memory_size is beyond the guest-physical address space"),
        (flags & c.KVM_MEM_GUEST_MEMFD, "guest_memfd is not this VM's, or guest_memfd_offset + memory_size exceeds it"),
    )
    return next((text for broken, text in checks if broken), None)
