"""The rules: what the ABI promises of KVM_RUN and memory_fault, and what it asks of a VMM. One class each.

A rule looks at what it is given and says what is wrong, or nothing. ``ABI.md`` is docs/ABI.md; api.rst is the kernel's
Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar, Final, Literal

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.names import cap_name, errno_name, exit_name, ioctl_name
from anykvm.abi.structures import (
    kvm_enable_cap,
    kvm_memory_attributes,
    kvm_pre_fault_memory,
    kvm_userspace_memory_region,
)
from anykvm.abi.validity import EHWPOISON, MEMORY_FAULT_ERRNOS
from anykvm.layers.contract.events import Called, Ran, Returned
from anykvm.layers.inject.sites import legal

_PAGE: Final = 4096
_FLAGS: Final = c.KVM_MEMORY_EXIT_FLAG_PRIVATE


class ContractRule:
    """Base of the rules. A subclass overrides what it looks at."""

    name: ClassVar[str]
    whose: ClassVar[Literal["kernel", "VMM"]]
    """Whose mistake a violation is."""
    document: ClassVar[str]
    """Where it is written."""
    text: ClassVar[str]
    """The rule, as one sentence."""

    def ran(self, run: Ran) -> str:
        """Say what is wrong with a KVM_RUN that ended, or with running again at all; empty: nothing."""
        return ""

    def called(self, call: Called) -> str:
        """Say what is wrong with an ioctl that is about to be done; empty: nothing."""
        return ""

    def returned(self, call: Returned) -> str:
        """Say what is wrong with how an ioctl ended; empty: nothing."""
        return ""


# -- the kernel's ------------------------------------------------------------------------------------------------------


class SuccessWithMemoryFault(ContractRule):
    """KVM_RUN gives 0, and exit_reason says that it failed."""

    name = "success-with-memory-fault"
    whose = "kernel"
    document = "api.rst 8.44; ABI.md 2.5"
    text = "A KVM_RUN that succeeds never has exit_reason KVM_EXIT_MEMORY_FAULT."

    def ran(self, run: Ran) -> str:
        """Look at successes."""
        return "" if run.end.errno or not run.end.annotated else f"KVM_RUN gave {run.end}"


class SuccessWithIntr(ContractRule):
    """KVM_RUN gives 0, and exit_reason says that a signal came."""

    name = "success-with-intr"
    whose = "kernel"
    document = "api.rst 5, KVM_EXIT_INTR; ABI.md 1 row 31"
    text = "A KVM_RUN that a signal ends fails with EINTR."

    def ran(self, run: Ran) -> str:
        """Look at successes."""
        return "" if run.end.errno or run.end.reason != c.KVM_EXIT_INTR else f"KVM_RUN gave {run.end}"


class ErrnoOfMemoryFault(ContractRule):
    """memory_fault is filled, and the errno says that it is not valid."""

    name = "errno-of-memory-fault"
    whose = "kernel"
    document = "api.rst 8.44; ABI.md 7.4 T8"
    text = "A KVM_RUN that fills memory_fault fails with EFAULT or EHWPOISON."

    def ran(self, run: Ran) -> str:
        """Look at failures that wrote the annotation themselves."""
        end = run.end
        wrong = end.errno and end.annotated and not end.stale and end.errno not in MEMORY_FAULT_ERRNOS
        return f"KVM_RUN gave {end}: no VMM may use that annotation" if wrong else ""


class StaleMemoryFault(ContractRule):
    """An EFAULT that is valid by errno and reason, with the annotation of an earlier KVM_RUN."""

    name = "stale-memory-fault"
    whose = "kernel"
    document = "api.rst 8.44; ABI.md 7.1, soundness; 7.3, P1"
    text = "A memory_fault that is valid was filled by the KVM_RUN that failed."

    def ran(self, run: Ran) -> str:
        """Look at valid annotations that were there before."""
        return f"KVM_RUN gave {run.end}, and wrote none of it" if run.end.valid and run.end.stale else ""


class FormOfMemoryFault(ContractRule):
    """A valid annotation that is not whole pages."""

    name = "form-of-memory-fault"
    whose = "kernel"
    document = "ABI.md 2.1"
    text = "On x86 memory_fault is of whole pages: gpa and size are multiples of 4096, and size is not 0."

    def ran(self, run: Ran) -> str:
        """Look at valid annotations."""
        if not run.end.valid or run.end.stale:
            return ""
        _, gpa, size = run.end.fault
        return f"KVM_RUN gave {run.end}" if gpa % _PAGE or size % _PAGE or not size else ""


class CompletionFirst(ContractRule):
    """immediate_exit ended KVM_RUN before the last exit's instruction was completed."""

    name = "completion-before-immediate-exit"
    whose = "kernel"
    document = "api.rst 5, the note under KVM_EXIT_MMIO; ABI.md 7.2 S4, S5"
    text = "KVM_RUN completes the last exit's instruction before it looks at immediate_exit."

    def ran(self, run: Ran) -> str:
        """Look at EINTR with immediate_exit, after a success: only then something may wait for its completion."""
        if run.end.errno != _errno.EINTR or not run.immediate_exit or run.before.last or not run.before.succeeded:
            return ""
        return "KVM_RUN gave EINTR for immediate_exit, and the last exit still waited" if run.completes() else ""


class ReasonOfSignal(ContractRule):
    """A signal ended KVM_RUN, and exit_reason says something else."""

    name = "reason-of-signal"
    whose = "kernel"
    document = "api.rst 5, KVM_EXIT_INTR; ABI.md 7.2, invariant ii"
    text = "A KVM_RUN that fails with EINTR, and not for immediate_exit, has exit_reason KVM_EXIT_INTR."

    def ran(self, run: Ran) -> str:
        """Look at EINTR without immediate_exit."""
        wrong = run.end.errno == _errno.EINTR and not run.immediate_exit and run.end.reason != c.KVM_EXIT_INTR
        return f"KVM_RUN gave {run.end}" if wrong else ""


class ReasonKept(ContractRule):
    """immediate_exit ended KVM_RUN, and the exit that the VMM may have put off is lost."""

    name = "reason-kept-by-immediate-exit"
    whose = "kernel"
    document = "ABI.md 1.1; 7.4 T9"
    text = "A KVM_RUN that immediate_exit ends leaves exit_reason as it was."

    def ran(self, run: Ran) -> str:
        """Look at EINTR with immediate_exit, after a success: its reason was not KVM_EXIT_UNKNOWN."""
        wrong = run.end.errno == _errno.EINTR and run.immediate_exit and run.end.reason == c.KVM_EXIT_UNKNOWN
        return f"KVM_RUN gave {run.end}" if wrong and run.before.succeeded and not run.before.last else ""


class PreFaultProgress(ContractRule):
    """KVM_PRE_FAULT_MEMORY's result and the range that it leaves do not fit."""

    name = "pre-fault-progress"
    whose = "kernel"
    document = "api.rst 4.143; ABI.md 4.5"
    text = "KVM_PRE_FAULT_MEMORY moves gpa and size past what it did, and fails only if it did nothing."

    def returned(self, call: Returned) -> str:
        """Compare the range before and after."""
        if call.request != n.KVM_PRE_FAULT_MEMORY or not call.before or not call.after:
            return ""
        before, after = map(kvm_pre_fault_memory.from_buffer_copy, (call.before, call.after))
        moved = after.gpa - before.gpa
        told = f"from {before.gpa:#x}, {before.size:#x} to {after.gpa:#x}, {after.size:#x}"
        if moved != before.size - after.size or not 0 <= moved <= before.size:
            return f"the range went {told}"
        if bool(moved) == bool(call.errno):
            return f"it {'failed with ' + errno_name(call.errno) if call.errno else 'succeeded'}; the range went {told}"
        return ""


class CapabilityEnabled(ContractRule):
    """KVM_ENABLE_CAP of KVM_CAP_MEMORY_FAULT_INFO works."""

    name = "informational-capability"
    whose = "kernel"
    document = "api.rst 8.44; ABI.md 2.5"
    text = "KVM_ENABLE_CAP(KVM_CAP_MEMORY_FAULT_INFO) fails with EINVAL: the capability is always on."

    def returned(self, call: Returned) -> str:
        """Look at the capability."""
        if call.request != n.KVM_ENABLE_CAP or not call.before:
            return ""
        cap = kvm_enable_cap.from_buffer_copy(call.before).cap
        wrong = cap == c.KVM_CAP_MEMORY_FAULT_INFO and not call.errno
        return "it succeeded" if wrong else ""


class LawfulErrno(ContractRule):
    """An ioctl fails with an errno that it does not have."""

    name = "errno"
    whose = "kernel"
    document = "the table of anykvm.layers.inject.errnos; ABI.md 1, 4"
    text = "An ioctl fails only with the errnos that are documented or in its code."
    always: ClassVar[frozenset[int]] = frozenset((_errno.EBADF, _errno.ENOTTY, _errno.EINVAL))
    """Of any descriptor and any number: what the caller gets for the wrong file."""

    def ran(self, run: Ran) -> str:
        """Look at KVM_RUN's."""
        return self._say(n.KVM_RUN, run.end.errno)

    def returned(self, call: Returned) -> str:
        """Look at another ioctl's."""
        return self._say(call.request, call.errno)

    def _say(self, request: int, errno: int) -> str:
        known = legal(request)
        wrong = errno and known and errno not in known and errno not in self.always
        return f"{ioctl_name(request)} gave {errno_name(errno)}" if wrong else ""


# -- the VMM's ---------------------------------------------------------------------------------------------------------


class EnablesInformational(ContractRule):
    """The VMM believes that it has to ask for memory_fault."""

    name = "enables-informational-capability"
    whose = "VMM"
    document = "api.rst 8.44; ABI.md 2.5"
    text = "KVM_CAP_MEMORY_FAULT_INFO is informational: it is asked about, and not enabled."

    def called(self, call: Called) -> str:
        """Look at the capability."""
        if call.request != n.KVM_ENABLE_CAP or not call.argument:
            return ""
        cap = kvm_enable_cap.from_buffer_copy(call.argument).cap
        return f"it enables {cap_name(cap)}" if cap == c.KVM_CAP_MEMORY_FAULT_INFO else ""


class PreFaultWhilePending(ContractRule):
    """KVM_PRE_FAULT_MEMORY may overwrite the answer that the guest waits for."""

    name = "pre-fault-with-pending-completion"
    whose = "VMM"
    document = "ABI.md 1.4; 7.4 T13"
    text = "KVM_PRE_FAULT_MEMORY is not called while an exit waits whose answer lies where memory_fault is."

    def called(self, call: Called) -> str:
        """Look at what waits on that vCPU."""
        wrong = call.request == n.KVM_PRE_FAULT_MEMORY and call.pending >= 0
        return f"{exit_name(call.pending)} waits for its answer, which memory_fault would overwrite" if wrong else ""


class ActsOnStale(ContractRule):
    """The VMM takes exit_reason alone for a memory fault."""

    name = "acts-on-stale-memory-fault"
    whose = "VMM"
    document = "api.rst 8.44; ABI.md 7.4 T1 to T5"
    text = "memory_fault is used only if KVM_RUN failed with EFAULT or EHWPOISON."

    def called(self, call: Called) -> str:
        """Look for a change of just the pages that an annotation names which is not valid."""
        last = call.vcpu.last
        if last is None or last.valid or not last.annotated or last.thread != call.thread or not call.argument:
            return ""
        _, gpa, size = last.fault
        start, length = _changes(call)
        wrong = start <= gpa and gpa + size <= start + length
        return f"it changes {start:#x}, {length:#x} bytes; KVM_RUN had given {last}" if wrong else ""


def _changes(call: Called) -> tuple[int, int]:
    if call.request == n.KVM_SET_MEMORY_ATTRIBUTES:
        attributes = kvm_memory_attributes.from_buffer_copy(call.argument)
        return attributes.address, attributes.size
    if call.request in (n.KVM_SET_USER_MEMORY_REGION, n.KVM_SET_USER_MEMORY_REGION2):
        region = kvm_userspace_memory_region.from_buffer_copy(call.argument)
        return region.guest_phys_addr, region.memory_size
    if call.request == n.KVM_PRE_FAULT_MEMORY:
        pages = kvm_pre_fault_memory.from_buffer_copy(call.argument)
        return pages.gpa, pages.size
    return 0, 0


class SameFailureAgain(ContractRule):
    """The VMM runs a vCPU again and again that does not get on."""

    name = "unbounded-retry"
    whose = "VMM"
    document = "api.rst 8.44; ABI.md 2.5"
    text = "A VMM that runs a vCPU again after a failure guards against the same failure repeating."

    def ran(self, run: Ran) -> str:
        """Look at the count."""
        again = run.end.errno and run.repeats == run.limit
        return f"{run.repeats} times in a row KVM_RUN gave {run.end}, with the guest where it was" if again else ""


class IgnoresPoison(ContractRule):
    """The VMM takes a poisoned page for one that only needs to be mapped."""

    name = "ignores-ehwpoison"
    whose = "VMM"
    document = "api.rst 8.44; ABI.md 7.4 T8b"
    text = "After EHWPOISON the page is replaced, or the guest is told, before the vCPU runs again."

    def ran(self, run: Ran) -> str:
        """Look at the second EHWPOISON of one page."""
        last = run.before.last
        again = last is not None and last.errno == run.end.errno == EHWPOISON and last.fault == run.end.fault
        return f"KVM_RUN gave {run.end} again" if again and run.repeats == 2 else ""


class IgnoresFlags(ContractRule):
    """The VMM goes on after an annotation that says what it cannot know."""

    name = "ignores-unknown-flags"
    whose = "VMM"
    document = "api.rst 5, KVM_EXIT_MEMORY_FAULT; ABI.md 8"
    text = "A VMM that meets a flag of memory_fault that it does not know does not go on."

    def ran(self, run: Ran) -> str:
        """Look at the KVM_RUN after one with such flags."""
        last = run.before.last
        if last is None or not last.valid or not last.fault[0] & ~_FLAGS:
            return ""
        return f"it ran the vCPU again after {last}"


RULES: Final[tuple[type[ContractRule], ...]] = (
    SuccessWithMemoryFault,
    SuccessWithIntr,
    ErrnoOfMemoryFault,
    StaleMemoryFault,
    FormOfMemoryFault,
    CompletionFirst,
    ReasonOfSignal,
    ReasonKept,
    PreFaultProgress,
    CapabilityEnabled,
    LawfulErrno,
    EnablesInformational,
    PreFaultWhilePending,
    ActsOnStale,
    SameFailureAgain,
    IgnoresPoison,
    IgnoresFlags,
)
"""All of them."""
