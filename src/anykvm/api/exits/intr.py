"""KVM_RUN that came back without news of the guest: a signal, an exit nobody knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from anykvm.abi import constants as c
from anykvm.abi.names import exit_name
from anykvm.api.exits.base import Exit


@dataclass(slots=True, repr=False)
class Intr(Exit):
    """KVM_RUN returned EINTR: a signal is pending, or ``immediate_exit`` was set.

    ``exit_reason`` is what the page said then. With a signal it is KVM_EXIT_INTR. With ``immediate_exit`` it is the
    reason of an *earlier* exit, which KVM does not clear: never act on it (``memory_fault`` is not valid here either).

    >>> Intr(c.KVM_EXIT_MEMORY_FAULT)
    Intr(exit_reason=KVM_EXIT_MEMORY_FAULT)
    """

    exit_reason: int = c.KVM_EXIT_INTR

    def __repr__(self) -> str:
        """Show the reason by name."""
        return f"Intr(exit_reason={exit_name(self.exit_reason)})"


@dataclass(slots=True, repr=False)
class Unknown(Exit):
    """Any exit without a class here. ``payload`` is a copy of the 256 bytes of kvm_run's exit union.

    A KVM_RUN that succeeded with KVM_EXIT_MEMORY_FAULT in the page is such an exit too: without EFAULT or EHWPOISON
    the annotation is not valid.

    >>> Unknown(1000, b"")
    Unknown(exit reason 1000)
    """

    exit_reason: int = field()  # without the base's default
    payload: bytes

    def __repr__(self) -> str:
        """Show the reason by name, not the payload."""
        return f"Unknown({exit_name(self.exit_reason)})"
