"""annotate: for a KVM_RUN that failed with a bare EFAULT, which guest access it was, and why the host refused it.

``Annotate(inner)`` wraps any backend. Where the kernel says only EFAULT, it reads the registers, decodes the
instruction, walks the guest's page tables, and asks the host about every page the instruction needs.

>>> import anykvm
>>> backend = Annotate(anykvm.backend("soft", "linux-7.3"))  # a KVM that does not annotate
>>> with anykvm.open(backend) as kvm, kvm.create_vm() as vm, anykvm.GuestMemory(0x8000) as memory:
...     memory[0:3] = bytes.fromhex("a00070")  # mov al, [0x7000]
...     memory.protect(0x7000, 0x1000, 0)
...     _ = vm.map(memory, 0)
...     vcpu = vm.create_vcpu()
...     vcpu.set_real_mode(0)
...     try:
...         vcpu.run()
...     except OSError as error:
...         cause = error.cause
>>> hex(cause.gpa), cause.access.value, cause.slot, cause.instruction
('0x7000', 'read', 0, 'mov al, byte ptr [0x7000]')
"""

from anykvm.layers.annotate.access import Access as Access
from anykvm.layers.annotate.cause import Cause as Cause
from anykvm.layers.annotate.cause import Look as Look
from anykvm.layers.annotate.cause import Suspect as Suspect
from anykvm.layers.annotate.hostmap import Vma as Vma
from anykvm.layers.annotate.layer import Annotate as Annotate
from anykvm.layers.annotate.layer import UnresolvedAccess as UnresolvedAccess
from anykvm.layers.annotate.walk import Entry as Entry
