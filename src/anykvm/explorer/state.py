"""The state of the model: immutable, small, and hashable. The variables are those of ABI.md 7.1.

``Kernel`` is what KVM and the shared page hold, ``Vmm`` what user space remembers. What neither of them can see, and
the properties ask for, is marked as ghost.
"""

from __future__ import annotations

import errno as e
from enum import Enum
from typing import Final, NamedTuple

from anykvm.abi import constants as c
from anykvm.abi.validity import EHWPOISON


class Member(Enum):
    """A value of a variable. There is one object for each, so its identity is its hash: Enum's own is a Python call."""

    __hash__ = object.__hash__


class Reason(Member):
    """X: kvm_run.exit_reason. MMIO stands for every exit that user space answers or performs: IO, HYPERCALL, ..."""

    UNKNOWN = c.KVM_EXIT_UNKNOWN
    HLT = c.KVM_EXIT_HLT
    MMIO = c.KVM_EXIT_MMIO
    INTR = c.KVM_EXIT_INTR
    MEMORY_FAULT = c.KVM_EXIT_MEMORY_FAULT


class Page(Member):
    """A guest page that cannot be had, by what is wrong with it."""

    G = "g"
    """Private by its attribute; the access is shared: EFAULT. ABI.md 2.1."""
    N = "n"
    """Of a guest_memfd that has no memory for it: ENOMEM. ABI.md 2.1."""
    P = "p"
    """Of a guest_memfd, poisoned: EHWPOISON. ABI.md 2.1."""
    H = "h"
    """Of a memslot whose host address has no mapping: EFAULT. ABI.md 2.3."""
    E = "e"
    """Of virtual EPC when the machine has none left; VM_PFNMAP: EFAULT. ABI.md 2.3; 7.4, T15."""
    S = "s"
    """The scratch area of an SEV-ES guest's GHCB, not readable: EFAULT. ABI.md 2.3."""


ERRNO: Final = {
    Page.G: e.EFAULT,
    Page.N: e.ENOMEM,
    Page.P: EHWPOISON,
    Page.H: e.EFAULT,
    Page.E: e.EFAULT,
    Page.S: e.EFAULT,
}
"""With which errno KVM_RUN fails for a page."""


class Origin(Member):
    """Ghost: which step wrote the union."""

    RUN = "KVM_RUN"
    PRE_FAULT = "KVM_PRE_FAULT_MEMORY"
    ASYNC = "an asynchronous page fault that got ready"
    ABANDONED = "a step of the emulator that was given up"


class Union(NamedTuple):
    """U: what the bytes of the exit union say: ``page`` for MEMORY_FAULT, else a device access, or nothing."""

    page: Page | None = None
    origin: Origin | None = None
    read: bool = False
    write: bool = False
    answered: bool = False
    """Of a read: user space has stored the value."""


class Completion(Member):
    """C: what the next KVM_RUN has to finish."""

    NONE = "none"
    READ = "read"
    WRITE = "write"
    FRAGMENT = "the second half of a write"


class Insn(Member):
    """What the guest does next. It does it again until it is done."""

    HLT = "halts"
    READ = "reads a device"
    WRITE = "writes to a device"
    WRITE_ACROSS = "writes to a device across a page boundary"
    TOUCH_G = "touches page g"
    TOUCH_N = "touches page n"
    TOUCH_P = "touches page p"
    TOUCH_H = "touches page h"
    TOUCH_E = "touches page e"
    TOUCH_S = "exits to the hypervisor by page s"
    TOUCH_SWAPPED = "touches page g, and does something else meanwhile"
    PUSH_ACROSS = "pushes onto a device and a page that is not present, and takes the #PF"


PAGE_OF: Final = {
    Insn.TOUCH_G: Page.G,
    Insn.TOUCH_N: Page.N,
    Insn.TOUCH_P: Page.P,
    Insn.TOUCH_H: Page.H,
    Insn.TOUCH_E: Page.E,
    Insn.TOUCH_S: Page.S,
}
"""The page an instruction needs."""


class Swapped(Member):
    """Page g under an asynchronous page fault."""

    NO = "no"
    OUT = "out"
    CONVERTED = "out, and private by now"


class Kernel(NamedTuple):
    """One vCPU with its VM and its guest."""

    reason: Reason = Reason.UNKNOWN
    union: Union = Union()
    completion: Completion = Completion.NONE
    started: bool = False
    """A KVM_RUN has got past the start of the helper thread."""
    uninitialized: bool = False
    """M is UNINITIALIZED."""
    dead: bool = False
    """D."""
    swapped: Swapped = Swapped.NO
    insn: Insn | None = None
    """The instruction the guest stands at; None: whichever comes next."""


class Call(NamedTuple):
    """How KVM_RUN is called."""

    immediate_exit: bool = False
    signal: bool = False
    """S: one is pending that KVM_SET_SIGNAL_MASK lets through."""
    bad_sync: bool = False
    """kvm_dirty_regs has an unknown bit."""


class Return(NamedTuple):
    """How KVM_RUN ended, and what it left."""

    kernel: Kernel
    errno: int
    """E; 0: it succeeded."""
    steps: tuple[str, ...]
    """Those of ABI.md 7.2 that did something, and what the guest did, in words."""
    did: tuple[Insn, ...] = ()
    """What the guest did, the instruction it ended at included."""
    again: bool = False
    """The first of them is one that it had begun before."""
    cause: Page | None = None
    """Ghost: the page for which it failed."""
    device: bool = False
    """Ghost: it ended with an exit for a device access."""
    answer_lost: bool = False
    """Ghost: it gave the guest a value for a device read that is not user space's answer."""


class Access(Member):
    """Ghost: the device access last handed to user space."""

    NONE = "none"
    REPORTED = "reported"
    PERFORMED = "performed"


class Unread(NamedTuple):
    """A KVM_RUN that has ended and that the VMM has not looked at. Only ``errno`` is the VMM's; the rest is ghost."""

    errno: int
    cause: Page | None
    device: bool
    erased: bool = False
    """Another thread's KVM_RUN has changed exit_reason since."""


class Vmm(NamedTuple):
    """User space."""

    unread: Unread | None = None
    deferred: bool = False
    """It will perform the device write it has seen when that is completed."""
    resolved: Page | None = None
    """Ghost: what it last resolved, if the guest has done nothing since."""
    stopped: bool = False
    access: Access = Access.NONE
    """Ghost."""


class World(NamedTuple):
    """All of it."""

    kernel: Kernel = Kernel()
    vmm: Vmm = Vmm()
