"""VMM rules: what user space makes of a KVM_RUN that has ended. Source: ABI.md 8 and 7.1, unless said otherwise.

A rule sees what a VMM sees: the errno, exit_reason and the union; nothing of the ghosts. The same functions decide in
the search and in the replay on a real guest.
"""

from __future__ import annotations

import errno as e
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Final, NamedTuple

from anykvm.abi.validity import EHWPOISON
from anykvm.explorer.policy import Policy, Valid
from anykvm.explorer.state import Page, Reason, Union


class Seen(NamedTuple):
    """What the VMM looks at."""

    errno: int
    reason: Reason
    union: Union
    deferred: bool = False
    """It has put off a device write; it looks for that now."""


class Act(Enum):
    """What a VMM does."""

    RESOLVE = "resolves page"
    """Make the page that memory_fault names usable, or convert it to what the access was."""
    SERVE = "performs the device access"
    DEFER = "puts the device write off until it is completed"
    AGAIN = "goes on"
    STOP = "stops the VM"


class Decision(NamedTuple):
    """An act, and for RESOLVE the page."""

    act: Act
    page: Page | None = None


class Habit(Enum):
    """What a VMM does besides KVM_RUN and its answer."""

    IMMEDIATE_EXIT = auto()
    """It kicks by immediate_exit."""
    SIGNAL = auto()
    """It kicks by a signal."""
    PRIVATE = auto()
    """Its guests have private memory, and it converts pages."""
    PRE_FAULT = auto()
    """It calls KVM_PRE_FAULT_MEMORY whenever it likes."""
    RESET = auto()
    """It makes vCPUs uninitialised again."""
    BAD_SYNC = auto()
    """It has a bug: an unknown bit in kvm_dirty_regs."""
    TWO_THREADS = auto()
    """Another thread of it calls KVM_RUN on the same vCPU, with a wrong argument."""
    SEV_ES = auto()
    """Its guests may be SEV-ES."""


_RESOLVABLE: Final = frozenset(Page)
_KICKED: Final = (e.EINTR, e.EAGAIN)


@dataclass(frozen=True)
class Rule:
    """One VMM."""

    name: str
    title: str
    source: str
    decide: Callable[[Seen, Policy], Decision]
    habits: frozenset[Habit]
    resolves: frozenset[Page] = _RESOLVABLE
    """The pages its RESOLVE really helps; the others fail again."""


def _exit(seen: Seen) -> Decision:
    """A KVM_RUN that ended with 0, in every VMM: perform a device access; what is not known is ignored."""
    return Decision(Act.SERVE if seen.reason is Reason.MMIO else Act.AGAIN)


def _failed(seen: Seen, *, fault: bool) -> Decision:
    if fault and seen.union.page is not None:
        return Decision(Act.RESOLVE, seen.union.page)
    return Decision(Act.AGAIN if seen.errno in _KICKED else Act.STOP)


def documented(seen: Seen, policy: Policy) -> Decision:
    """errno first, then exit_reason, both by the policy's documents (api.rst 8.44)."""
    if seen.errno == 0:
        return _exit(seen)
    valid = {
        Valid.NEVER: False,
        Valid.EFAULT_EHWPOISON: seen.errno in (e.EFAULT, EHWPOISON),
        Valid.ANY: True,
    }[policy.valid]
    return _failed(seen, fault=valid and seen.reason is Reason.MEMORY_FAULT)


def any_errno(seen: Seen, policy: Policy) -> Decision:
    """P2's rule, whatever the kernel's documents say."""
    return _exit(seen) if seen.errno == 0 else _failed(seen, fault=seen.reason is Reason.MEMORY_FAULT)


def deferring(seen: Seen, policy: Policy) -> Decision:
    """T9's VMM: a device write is completed first, by immediate_exit, and then read from the page and performed."""
    if seen.deferred:
        return Decision(Act.SERVE if seen.reason is Reason.MMIO and seen.union.write else Act.AGAIN)
    if seen.errno == 0 and seen.reason is Reason.MMIO and seen.union.write:
        return Decision(Act.DEFER)
    return documented(seen, policy)


def errno_blind(seen: Seen, policy: Policy) -> Decision:
    """exit_reason alone."""
    if seen.reason is Reason.MEMORY_FAULT and seen.union.page is not None:
        return Decision(Act.RESOLVE, seen.union.page)
    return _exit(seen)


def qemu(seen: Seen, policy: Policy) -> Decision:
    """kvm_cpu_exec(): EINTR and EAGAIN leave at once; MEMORY_FAULT counts with EFAULT alone."""
    if seen.errno == 0:
        return _exit(seen)
    return _failed(seen, fault=seen.errno == e.EFAULT and seen.reason is Reason.MEMORY_FAULT)


def kvm_ioctls(seen: Seen, policy: Policy) -> Decision:
    """VcpuFd::run(): EFAULT or EHWPOISON with MEMORY_FAULT is Ok(MemoryFault), and the errno is gone."""
    if seen.errno == 0:
        return _exit(seen)
    valid = seen.errno in (e.EFAULT, EHWPOISON) and seen.reason is Reason.MEMORY_FAULT
    return _failed(seen, fault=valid)


def kvmtool(seen: Seen, policy: Policy) -> Decision:
    """kvm_cpu__run() dies of other errnos than EINTR and EAGAIN; after those it looks at exit_reason as after 0."""
    return _exit(seen) if seen.errno == 0 or seen.errno in _KICKED else Decision(Act.STOP)


_KICKS: Final = frozenset({Habit.IMMEDIATE_EXIT, Habit.SIGNAL})
_CONFIDENTIAL: Final = _KICKS | {Habit.PRIVATE, Habit.SEV_ES}
_EVERYTHING_ALLOWED: Final = _CONFIDENTIAL | {Habit.PRE_FAULT, Habit.RESET, Habit.BAD_SYNC}
_ALL: Final = (
    Rule(
        "documented",
        "reads errno and exit_reason as the policy's documents say; does whatever they do not forbid",
        "ABI.md 7.1, rule A; 7.3",
        documented,
        _EVERYTHING_ALLOWED,
    ),
    Rule(
        "any-errno", "exit_reason MEMORY_FAULT counts with any errno", "ABI.md 7.3, P2", any_errno, _EVERYTHING_ALLOWED
    ),
    Rule(
        "deferring",
        "documented; performs a device write after its completion, from the page",
        "ABI.md 7.4, T9; 1.1",
        deferring,
        _KICKS,
    ),
    Rule(
        "two-threads",
        "documented; a second thread calls KVM_RUN on the vCPU, and is refused",
        "ABI.md 7.4, T11",
        documented,
        _CONFIDENTIAL | {Habit.TWO_THREADS},
    ),
    Rule("errno-blind", "reads exit_reason alone", "ABI.md 7.4, T12 and T14", errno_blind, _KICKS),
    Rule("qemu", "QEMU with confidential guests", "ABI.md 8, first row", qemu, _CONFIDENTIAL, frozenset({Page.G})),
    Rule(
        "kvm-ioctls",
        "a VMM on rust-vmm's kvm-ioctls, which cannot tell EHWPOISON from EFAULT",
        "ABI.md 8, third row",
        kvm_ioctls,
        _CONFIDENTIAL,
        _RESOLVABLE - {Page.P},
    ),
    Rule(
        "cloud-hypervisor",
        "cloud-hypervisor with sev_snp: kvm-ioctls, and MemoryFault converts",
        "ABI.md 8, fourth row; immediate_exit is assumed",
        kvm_ioctls,
        _CONFIDENTIAL,
        frozenset({Page.G}),
    ),
    Rule("kvmtool", "kvmtool: signals alone, no private memory", "ABI.md 8", kvmtool, frozenset({Habit.SIGNAL})),
    Rule("kvmtool+ie", "what if: kvmtool kicked by immediate_exit", "ABI.md 7.4, T12", kvmtool, _KICKS),
)

RULES: Final[Mapping[str, Rule]] = MappingProxyType({rule.name: rule for rule in _ALL})
"""Every rule by name, in the order of the table."""
