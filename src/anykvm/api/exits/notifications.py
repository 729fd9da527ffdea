"""Events that user space asked to be told of: a full dirty ring, bus locks, no event window."""

from __future__ import annotations

from dataclasses import dataclass

from anykvm.abi import constants as c
from anykvm.api.exits.base import Exit


@dataclass(slots=True, repr=False)
class DirtyRingFull(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the ring and ``Vm.reset_dirty_rings()``, or every run ends so.

    >>> DirtyRingFull()
    DirtyRingFull()
    """

    exit_reason = c.KVM_EXIT_DIRTY_RING_FULL


@dataclass(slots=True, repr=False)
class X86BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT).

    >>> X86BusLock()
    X86BusLock()
    """

    exit_reason = c.KVM_EXIT_X86_BUS_LOCK


@dataclass(slots=True, repr=False)
class Notify(Exit):
    """KVM_EXIT_NOTIFY: no event window for too long (KVM_CAP_X86_NOTIFY_VMEXIT).

    >>> Notify(1)
    Notify(flags=1)
    """

    exit_reason = c.KVM_EXIT_NOTIFY
    flags: int
