"""When the memory_fault member of kvm_run means something: the documented rule, in one place.

Source: api.rst 8.44 (KVM_CAP_MEMORY_FAULT_INFO). errno is part of the ABI and so is exit_reason; only both together
say that ``memory_fault`` describes this failure. Either alone can be stale or unrelated: KVM_EXIT_MEMORY_FAULT stays
in the page through a KVM_RUN that returns EINTR for immediate_exit, and EFAULT has other causes.
"""

from __future__ import annotations

import errno as _errno
from typing import Final

from anykvm.abi.constants import KVM_EXIT_MEMORY_FAULT

EHWPOISON: Final = getattr(_errno, "EHWPOISON", 133)
"""Memory page has hardware error; not in Python's errno module before 3.14."""

MEMORY_FAULT_ERRNOS: Final = frozenset((_errno.EFAULT, EHWPOISON))
"""The errnos of KVM_RUN with which ``memory_fault`` may be valid."""


def memory_fault_valid(errno: int, exit_reason: int) -> bool:
    """Say whether ``kvm_run.memory_fault`` describes the KVM_RUN that just failed with ``errno``.

    ``errno`` is 0 for a KVM_RUN that succeeded.

    >>> memory_fault_valid(14, 39), memory_fault_valid(4, 39), memory_fault_valid(14, 0)
    (True, False, False)
    """
    return exit_reason == KVM_EXIT_MEMORY_FAULT and errno in MEMORY_FAULT_ERRNOS
