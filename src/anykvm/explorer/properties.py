"""The properties: what it means that a VMM misreads, loses or repeats something.

Each is checked at one kind of step, against what neither side can see (the ghosts of ``state``):

- **misread** (a VMM's decision; ABI.md 7.1, soundness: A implies g). It resolves a page that is not the page for which
  this KVM_RUN failed; or it performs a device access though this KVM_RUN ended with none.
- **fault lost** (ABI.md 7.1, completeness). A KVM_RUN failed for a guest page, and the VMM does not resolve that page.
- **access lost** (ABI.md 1.3: exactly once an access). A device access was an exit, and its effect never happens; or
  the guest reads from a device what nobody answered.
- **repeated** (ABI.md 1.3; 2.5: VMMs that retry should guard against the same fault repeating). A device access is
  performed that was performed before; or a page is resolved again though the guest has done nothing since.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from anykvm.explorer.rules import Act, Decision, Rule
from anykvm.explorer.state import Access, Origin, Page, Return, Union, Unread, Vmm


class Property(Enum):
    """What must not happen."""

    MISREAD = "misread"
    FAULT_LOST = "fault lost"
    ACCESS_LOST = "access lost"
    REPEATED = "repeated"


class Subject(Enum):
    """To what it happens."""

    FAULT = "a fault"
    EXIT = "a device access"
    ANSWER = "the answer to a device read"


class Violation(NamedTuple):
    """A property that a step violates, and by what."""

    property: Property
    subject: Subject
    errno: int
    cause: Page | None = None
    """The page for which KVM_RUN failed."""
    page: Page | None = None
    """The page that the VMM resolves."""
    origin: Origin | None = None
    """Who wrote what it believed, if that is a page, or a device access that was given up."""
    erased: bool = False
    """Another thread's KVM_RUN had changed exit_reason."""
    deferred: bool = False
    """The VMM had put the access off."""


def of_decision(vmm: Vmm, unread: Unread, union: Union, decision: Decision, *, redone: bool) -> tuple[Violation, ...]:
    """What a VMM's decision violates. ``union`` is what it saw in the page.

    ``redone``: the guest will do its device access again, so that it is not lost; unless the VMM puts it off each time.
    """
    found: list[Violation] = []
    act, page = decision
    errno, cause = unread.errno, unread.cause
    if act is Act.RESOLVE:
        if page is not cause:
            found.append(Violation(Property.MISREAD, Subject.FAULT, errno, cause, page, union.origin))
        if page is vmm.resolved:
            found.append(Violation(Property.REPEATED, Subject.FAULT, errno, cause, page, union.origin))
    elif cause is not None:
        found.append(Violation(Property.FAULT_LOST, Subject.FAULT, errno, cause, erased=unread.erased))
    if act is Act.SERVE:
        if not unread.device and not vmm.deferred:
            found.append(Violation(Property.MISREAD, Subject.EXIT, errno, cause, origin=union.origin))
        if vmm.access is Access.PERFORMED:
            found.append(Violation(Property.REPEATED, Subject.EXIT, errno, cause, origin=union.origin))
    elif vmm.access is Access.REPORTED and act is not Act.DEFER and (vmm.deferred or not redone):
        found.append(Violation(Property.ACCESS_LOST, Subject.EXIT, errno, erased=unread.erased, deferred=vmm.deferred))
    return tuple(found)


def of_return(vmm: Vmm, ended: Return) -> tuple[Violation, ...]:
    """What the end of a KVM_RUN violates, whatever the VMM makes of it."""
    found: list[Violation] = []
    if ended.answer_lost:
        found.append(Violation(Property.ACCESS_LOST, Subject.ANSWER, ended.errno))
    if ended.device and not ended.again and vmm.access is Access.REPORTED:
        found.append(Violation(Property.ACCESS_LOST, Subject.EXIT, ended.errno, deferred=vmm.deferred))
    return tuple(found)


def helps(rule: Rule, page: Page | None, stands_at: Page | None) -> bool:
    """Say whether resolving ``page`` lets the guest go on that stands at ``stands_at``."""
    return page is not None and page is stands_at and page in rule.resolves
