"""KVM's API, anywhere.

Open KVM, make a virtual machine, run it; on the kernel's /dev/kvm or without it::

    >>> import anykvm
    >>> with anykvm.open() as kvm, kvm.create_vm() as vm, anykvm.GuestMemory(0x1000) as memory:
    ...     memory[0] = 0xF4  # hlt
    ...     _ = vm.map(memory, guest_phys_addr=0)
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.set_real_mode(rip=0)
    ...     vcpu.run()
    Hlt()
"""

from anykvm import abi as abi
from anykvm.api import PAGE_SIZE as PAGE_SIZE
from anykvm.api import Answerable as Answerable
from anykvm.api import ApResetHold as ApResetHold
from anykvm.api import Debug as Debug
from anykvm.api import DirtyPage as DirtyPage
from anykvm.api import DirtyRing as DirtyRing
from anykvm.api import DirtyRingFull as DirtyRingFull
from anykvm.api import Exit as Exit
from anykvm.api import FailEntry as FailEntry
from anykvm.api import GuestMemory as GuestMemory
from anykvm.api import Hlt as Hlt
from anykvm.api import Hypercall as Hypercall
from anykvm.api import InternalError as InternalError
from anykvm.api import Intr as Intr
from anykvm.api import Io as Io
from anykvm.api import IoapicEoi as IoapicEoi
from anykvm.api import IrqWindowOpen as IrqWindowOpen
from anykvm.api import Kvm as Kvm
from anykvm.api import MemoryFault as MemoryFault
from anykvm.api import Mmio as Mmio
from anykvm.api import Nmi as Nmi
from anykvm.api import Notify as Notify
from anykvm.api import SetTpr as SetTpr
from anykvm.api import Shutdown as Shutdown
from anykvm.api import StaleExit as StaleExit
from anykvm.api import SystemEvent as SystemEvent
from anykvm.api import TprAccess as TprAccess
from anykvm.api import Unknown as Unknown
from anykvm.api import Vcpu as Vcpu
from anykvm.api import Vm as Vm
from anykvm.api import X86BusLock as X86BusLock
from anykvm.api import X86Rdmsr as X86Rdmsr
from anykvm.api import X86Wrmsr as X86Wrmsr
from anykvm.api import open as open
from anykvm.backends import Backend as Backend
from anykvm.backends import Probe as Probe
from anykvm.backends import backend as backend
from anykvm.backends import probe_device as probe_device
from anykvm.backends import probe_soft as probe_soft

__version__ = "0.1.0"
