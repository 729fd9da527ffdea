"""The traces by their names: T1 to T15 of ABI.md 7.4, and those the search adds.

``classify`` gives each violation its name by what is violated and how, never by the policy or the rule it was found
under: the same mistake has the same name everywhere. ``ENTRIES`` says where each name is shown.
"""

from __future__ import annotations

import errno as e
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

from anykvm.explorer.arch import ARCHITECTURES
from anykvm.explorer.moves import Game
from anykvm.explorer.policy import POLICIES
from anykvm.explorer.properties import Property, Subject, Violation
from anykvm.explorer.rules import RULES
from anykvm.explorer.search import Found, Trace, search
from anykvm.explorer.state import Origin, Page


@dataclass(frozen=True)
class Entry:
    """One named trace."""

    name: str
    title: str
    policy: str
    rule: str
    source: str
    arch: str = "x86"

    @property
    def game(self) -> Game:
        """Under which it is shown."""
        return Game(POLICIES[self.policy], RULES[self.rule], ARCHITECTURES[self.arch])


_ALL: Final = (
    Entry("T1", "immediate_exit: EINTR beside a fault that is settled", "P2", "documented", "ABI.md 7.4, T1"),
    Entry("T2", "refused registers: EINVAL beside a fault that is settled", "P2", "documented", "ABI.md 7.4, T2"),
    Entry("T3", "dead VM: EIO beside a fault that is settled", "P2", "documented", "ABI.md 7.4, T3"),
    Entry("T4", "reset vCPU: EAGAIN beside a fault that is settled", "P2", "documented", "ABI.md 7.4, T4"),
    Entry("T5", "KVM_PRE_FAULT_MEMORY's annotation taken for KVM_RUN's", "P2", "documented", "ABI.md 7.4, T5"),
    Entry("T6", "a bare EFAULT beside what a ready asynchronous fault left", "P1", "documented", "ABI.md 7.4, T6"),
    Entry("T7", "a page without a host mapping: EFAULT, and no address", "P1", "documented", "ABI.md 7.4, T7"),
    Entry("T7n", "a bare EFAULT, taken for a fault that is settled", "never", "qemu", "ABI.md 7.4, T15"),
    Entry("T7s", "an unreadable GHCB scratch area: EFAULT, and no address", "P1d", "documented", "ABI.md 2.3"),
    Entry("T8", "guest_memfd without memory: an annotation beside ENOMEM", "P1", "documented", "ABI.md 7.4, T8"),
    Entry("T8n", "an ENOMEM of the first KVM_RUN beside an old annotation", "P2", "documented", "ABI.md 7.4, T8"),
    Entry("T8b", "a poisoned page of a guest_memfd: EHWPOISON", "P1", "qemu", "ABI.md 7.4, T8b"),
    Entry("T9", "a put-off device write is gone when it is to be done", "P3b", "deferring", "ABI.md 7.4, T9"),
    Entry("T9f", "a put-off device write is overwritten by its own second half", "P1", "deferring", "ABI.md 1, row 15"),
    Entry("T10", "a completion is not found, and the access done again", "P3b", "qemu", "ABI.md 7.4, T10", "arm64"),
    Entry("T11", "another thread's KVM_RUN erases an exit", "P3a", "two-threads", "ABI.md 7.4, T11"),
    Entry("T12", "an exit is performed again beside EINTR", "P1", "kvmtool+ie", "ABI.md 7.4, T12"),
    Entry("T13", "KVM_PRE_FAULT_MEMORY overwrites the answer to a device read", "P1", "documented", "ABI.md 7.4, T13"),
    Entry("T14", "EFAULT beside a device exit that was given up", "P1", "errno-blind", "ABI.md 7.4, T14"),
    Entry("T15", "SGX: no EPC left for a page of VM_PFNMAP memory", "P1", "documented", "ABI.md 7.4, T15"),
    Entry("T15n", "SGX: its bare EFAULT, taken for a fault that is settled", "never", "qemu", "ABI.md 7.4, T15"),
    Entry("early", "an EFAULT before the reset, taken for a settled fault", "early-EFAULT", "qemu", "ABI.md 7.3"),
    Entry("guard", "a page is resolved in vain, again and again", "P1d", "qemu", "ABI.md 8, implication 2"),
)  # fmt: skip

ENTRIES: Final[Mapping[str, Entry]] = MappingProxyType({entry.name: entry for entry in _ALL})
"""Every named trace, in order."""

_BY_ERRNO: Final = {e.EINTR: "T1", e.EINVAL: "T2", e.EIO: "T3", e.EAGAIN: "T4"}
_LOST_PAGE: Final = {Page.H: "T7", Page.S: "T7s", Page.N: "T8", Page.P: "T8b", Page.E: "T15"}


def classify(violation: Violation) -> str:
    """Name a violation: one of ``ENTRIES``. Raises LookupError for one that has no name: the catalogue has a gap."""
    if violation.subject is Subject.ANSWER:
        return "T13"
    if violation.erased:
        return "T11"
    name = _of_fault(violation) if violation.subject is Subject.FAULT else _of_exit(violation)
    if name is None:
        raise LookupError(f"no name for {violation}")
    return name


def _of_fault(violation: Violation) -> str | None:
    if violation.property is Property.FAULT_LOST:
        return _LOST_PAGE.get(violation.cause) if violation.cause else None
    if violation.page is violation.cause:  # it really failed for this page, and resolving it did not help
        return "T8b" if violation.cause is Page.P else "guard"
    if violation.origin is Origin.ASYNC:
        return "T6"
    if violation.errno == e.EFAULT:
        return "early" if violation.cause is None else "T15n" if violation.cause is Page.E else "T7n"
    if violation.errno == e.ENOMEM:
        return "T8n"
    return "T5" if violation.origin is Origin.PRE_FAULT else _BY_ERRNO.get(violation.errno)


def _of_exit(violation: Violation) -> str | None:
    if violation.property is Property.ACCESS_LOST:
        return ("T9" if violation.errno else "T9f") if violation.deferred else None
    if violation.origin is Origin.ABANDONED:
        return "T14"
    return "T12" if violation.errno else "T10"


def named(found: Found) -> dict[str, Trace]:
    """The shortest trace of a search for each name, shortest first."""
    traces: dict[str, Trace] = {}
    for violation, trace in found.traces.items():
        traces.setdefault(classify(violation), trace)
    return traces


@cache
def _searched(game: Game) -> Found:
    return search(game)


@cache
def trace(name: str) -> Trace:
    """The shortest trace of a name, where its entry shows it. Raises KeyError for an unknown name.

    >>> trace("T7").length
    2
    """
    return named(_searched(ENTRIES[name].game))[name]
