"""What the rules of the contract look at: a KVM_RUN that ended, another ioctl, and what went before on that vCPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from anykvm.abi.constants import KVM_EXIT_MEMORY_FAULT
from anykvm.abi.names import errno_name, exit_name
from anykvm.abi.validity import memory_fault_valid


class End(NamedTuple):
    """How a KVM_RUN ended."""

    errno: int
    """0: it succeeded."""
    reason: int
    """``kvm_run.exit_reason`` then."""
    fault: tuple[int, int, int]
    """Flags, gpa and size of ``kvm_run.memory_fault`` then, whatever they mean."""
    thread: int = 0
    """Of the caller."""
    stale: bool = False
    """exit_reason is KVM_EXIT_MEMORY_FAULT, and this KVM_RUN did not write it."""

    @property
    def valid(self) -> bool:
        """Whether memory_fault is valid (api.rst 8.44)."""
        return memory_fault_valid(self.errno, self.reason)

    @property
    def annotated(self) -> bool:
        """Whether exit_reason says KVM_EXIT_MEMORY_FAULT."""
        return self.reason == KVM_EXIT_MEMORY_FAULT

    def __str__(self) -> str:
        """Errno, reason and, if it says so, the fault."""
        flags, gpa, size = self.fault
        fault = f", memory_fault gpa {gpa:#x} size {size:#x} flags {flags:#x}" if self.annotated else ""
        return f"{errno_name(self.errno) if self.errno else 'success'}, {exit_name(self.reason)}{fault}"


@dataclass
class History:
    """What is known of a vCPU that did something worth remembering. A success forgets all but ``succeeded``."""

    last: End | None = None
    """The last KVM_RUN, if it failed."""
    repeats: int = 0
    """How often in a row KVM_RUN has ended like ``last``, with the guest where it was."""
    succeeded: bool = False
    """Whether a KVM_RUN has succeeded since the vCPU was made."""
    registers: bytes = field(default=b"", repr=False)
    """Those of the guest at ``last``."""


@dataclass(frozen=True)
class Ran:
    """A KVM_RUN that ended; only those that failed, that look wrong, or that came after such a one."""

    end: End
    before: History
    """What was known before it."""
    immediate_exit: bool
    """``kvm_run.immediate_exit`` after it."""
    limit: int
    """How often the same failure may come in a row."""
    repeats: int
    """How often it has, this one included."""
    completes: Callable[[], bool]
    """Run again with immediate_exit; whether that changed the guest's registers, as only a completion does."""


class Called(NamedTuple):
    """An ioctl other than KVM_RUN, before it is done and after it."""

    request: int
    argument: bytes
    """The structure, as it is then; empty if it cannot be read, or is not one."""
    vcpu: History
    """Of the vCPU that it is on, or whose last KVM_RUN failed on this thread."""
    pending: int
    """The exit reason that waits for its completion on that vCPU; -1: none."""
    thread: int


class Returned(NamedTuple):
    """An ioctl other than KVM_RUN that returned."""

    request: int
    errno: int
    """0: it succeeded."""
    before: bytes
    """The structure before the call; empty as for ``Called``."""
    after: bytes
    """The structure after the call."""
