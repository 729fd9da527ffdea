"""Architectures: how a pending completion is found, and which parts of the question exist. Source: ABI.md 0, fact 8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Final


class Selects(Enum):
    """What tells KVM_RUN that the last exit's access is to be completed."""

    KERNEL = "the kernel's own memory"
    """A function pointer (x86), a private flag (ppc, mips)."""
    EXIT_REASON = "kvm_run.exit_reason"
    """The access is completed only if exit_reason still is the exit's; otherwise the guest does it again."""
    NOTHING = "nothing"
    """There are no completions: user space does all of it."""


class Feature(Enum):
    """What only some architectures have."""

    SYNC_REGS = auto()
    """KVM_RUN refuses register sets it does not know: x86, ABI.md 1, rows 12 and 13."""
    MP_STATE = auto()
    """KVM_RUN of an uninitialised vCPU sleeps, then EAGAIN: x86, ABI.md 1, row 11."""
    HELPER = auto()
    """The first KVM_RUN starts a thread, and may fail to: x86, ABI.md 1, row 7."""
    MMU_LOAD = auto()
    """Page-table roots are allocated in the guest loop: x86, ABI.md 1, row 26."""
    MISMATCH = auto()
    """An access that does not fit the page's attribute is annotated: x86, ABI.md 2.1."""
    GUEST_MEMFD = auto()
    """A failed look-up in a guest_memfd is annotated: x86 and arm64, ABI.md 2.1."""
    PRE_FAULT = auto()
    """KVM_PRE_FAULT_MEMORY annotates: x86, ABI.md 2.2."""
    ASYNC = auto()
    """An asynchronous page fault that is ready annotates: x86, ABI.md 2.2."""
    FRAGMENTS = auto()
    """One access may be two exits; the completion of the first is the second: x86, ABI.md 1, row 15."""
    ABANDONED = auto()
    """The emulator may drop an MMIO exit it has prepared: x86, ABI.md 7.4, T14."""
    VEPC = auto()
    """Virtual EPC of SGX: x86, ABI.md 7.4, T15."""
    SCRATCH = auto()
    """SEV-ES: an unreadable GHCB scratch area is a bare EFAULT: x86, ABI.md 2.3."""


@dataclass(frozen=True)
class Arch:
    """One kind of architecture."""

    name: str
    members: tuple[str, ...]
    selects: Selects
    features: frozenset[Feature]
    source: str
    immediate_exit_first: bool = False
    """immediate_exit ends KVM_RUN before anything else is done."""
    retires_at_exit: bool = True
    """A device write has retired when user space sees the exit (else: when it is completed)."""


_ALL: Final = (
    Arch("x86", ("x86",), Selects.KERNEL, frozenset(Feature), "ABI.md 0, fact 8; 1.3"),
    Arch(
        "arm64",
        ("arm64",),
        Selects.EXIT_REASON,
        frozenset({Feature.GUEST_MEMFD}),
        "ABI.md 0, fact 8: MMIO; 2.1",
        retires_at_exit=False,
    ),
    Arch(
        "riscv",
        ("riscv", "loongarch"),
        Selects.EXIT_REASON,
        frozenset(),
        "ABI.md 0, fact 8: MMIO, SBI, CSR (riscv); HYPERCALL, IOCSR (loongarch)",
        retires_at_exit=False,
    ),
    Arch("ppc", ("ppc", "mips"), Selects.KERNEL, frozenset(), "ABI.md 0, fact 8: private vCPU flags"),
    Arch(
        "s390",
        ("s390",),
        Selects.NOTHING,
        frozenset(),
        "ABI.md 0, fact 8: EINTR for immediate_exit before anything",
        immediate_exit_first=True,
    ),
)

ARCHITECTURES: Final[Mapping[str, Arch]] = MappingProxyType({arch.name: arch for arch in _ALL})
"""Every kind by its name, in the order of the table."""


def architecture(name: str) -> Arch:
    """Find the kind of an architecture. Raises ValueError for an unknown one.

    >>> architecture("loongarch").name
    'riscv'
    """
    for arch in _ALL:
        if name in arch.members:
            return arch
    known = ", ".join(member for arch in _ALL for member in arch.members)
    raise ValueError(f"no architecture named {name!r}; there are {known}")
