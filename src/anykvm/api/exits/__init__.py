"""The exits of KVM_RUN as classes: snapshots of one exit, for ``match``. One file a kind."""

from anykvm.api.exits.accesses import Io, Mmio
from anykvm.api.exits.base import Answerable, Exit, StaleExit
from anykvm.api.exits.ends import Debug, FailEntry, Hlt, InternalError, Shutdown, SystemEvent
from anykvm.api.exits.interrupts import ApResetHold, IoapicEoi, IrqWindowOpen, Nmi, SetTpr, TprAccess
from anykvm.api.exits.intr import Intr, Unknown
from anykvm.api.exits.memory_fault import MemoryFault
from anykvm.api.exits.notifications import DirtyRingFull, Notify, X86BusLock
from anykvm.api.exits.requests import Hypercall, X86Rdmsr, X86Wrmsr

__all__ = [
    "Answerable",
    "ApResetHold",
    "Debug",
    "DirtyRingFull",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "InternalError",
    "Intr",
    "Io",
    "IoapicEoi",
    "IrqWindowOpen",
    "MemoryFault",
    "Mmio",
    "Nmi",
    "Notify",
    "SetTpr",
    "Shutdown",
    "StaleExit",
    "SystemEvent",
    "TprAccess",
    "Unknown",
    "X86BusLock",
    "X86Rdmsr",
    "X86Wrmsr",
]
