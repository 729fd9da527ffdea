"""Policies: what a KVM writes, and what its documents promise. Source: ABI.md 7.3, unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from anykvm.backends.soft.profiles import Purge


class Annotates(Enum):
    """Which failures of guest accesses fill ``memory_fault``."""

    NOTHING = "nothing"
    """Before 6.8."""
    PRIVATE = "private"
    """Those of private memory and guest_memfd: ABI.md 2.1."""
    PAGES = "pages"
    """Those, and every page of a memslot that the host refuses: api.rst 8.44."""


class Valid(Enum):
    """The documented rule: with which errnos of KVM_RUN ``memory_fault`` is valid if exit_reason says so."""

    NEVER = "never"
    EFAULT_EHWPOISON = "EFAULT, EHWPOISON"
    ANY = "any errno"


@dataclass(frozen=True)
class Policy:
    """One KVM of the question."""

    name: str
    title: str
    source: str
    annotates: Annotates = Annotates.PRIVATE
    valid: Valid = Valid.EFAULT_EHWPOISON
    purge: Purge = Purge.VCPU_RUN
    early_efault: bool = False
    """KVM_RUN may fail with EFAULT before vcpu_run() resets exit_reason. No x86 kernel does: ABI.md 0, fact 7."""
    profile: str | None = None
    """The soft backend's profile that behaves like this; None: there is none."""


_ALL: Final = (
    Policy(
        "P0",
        "before 6.8: every EFAULT is bare",
        "ABI.md 7.3, P0; 2.6",
        Annotates.NOTHING,
        Valid.NEVER,
        profile="pre-6.8",
    ),
    Policy("P1", "mainline: valid with EFAULT and EHWPOISON", "ABI.md 7.2; 7.3, P1", profile="linux-7.3"),
    Policy(
        "P1d",
        "mainline, and refused pages of memslots are annotated as api.rst says",
        "ABI.md 7.3, P1d",
        Annotates.PAGES,
        profile="documented",
    ),
    Policy("P2", "valid with any errno", "ABI.md 7.3, P2", valid=Valid.ANY, profile="any-errno"),
    Policy(
        "P3a",
        "exit_reason is also reset before vcpu->mutex is taken",
        "ABI.md 7.3, P3a",
        purge=Purge.BEFORE_LOCK,
        profile="early-purge-before-lock",
    ),
    Policy(
        "P3b",
        "exit_reason is also reset when the mutex is taken",
        "ABI.md 7.3, P3b",
        purge=Purge.AFTER_LOCK,
        profile="early-purge-after-lock",
    ),
    Policy(
        "P3c",
        "exit_reason is also reset after the completion, before immediate_exit is looked at",
        "ABI.md 7.3, P3c",
        purge=Purge.AFTER_COMPLETION,
        profile="early-purge-after-completion",
    ),
    Policy(
        "never",
        "what if: exit_reason is reset nowhere",
        "ABI.md 7.4, T15, last sentence",
        purge=Purge.NEVER,
        profile="never-purge",
    ),
    Policy(
        "early-EFAULT",
        "what if: mainline had an EFAULT before the reset",
        "ABI.md 7.3, first verdict: 'any new early EFAULT breaks it'",
        early_efault=True,
    ),
    Policy(
        "early-EFAULT+P3b",
        "what if: the same EFAULT, in a KVM with an early reset",
        "ABI.md 7.3, first verdict, with P3b",
        purge=Purge.AFTER_LOCK,
        early_efault=True,
    ),
)

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType({policy.name: policy for policy in _ALL})
"""Every policy by name, in the order of the table."""
