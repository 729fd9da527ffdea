"""inject: any failure that a KVM can give, on demand, from any backend.

``Inject(inner, rules)`` wraps a backend. A ``Rule`` names a site, selects calls of it, and says how they fail. What was
injected is in ``Inject.fired``; each entry has the one line that replays it. ``sweep`` fails the first call, then the
second, until a run ends with none left.

>>> import anykvm
>>> inject = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EFAULT"])  # bare, as if the first access had failed
>>> with anykvm.open(inject) as kvm, kvm.create_vm() as vm, anykvm.GuestMemory(4096) as memory:
...     memory[0] = 0xF4  # hlt
...     _ = vm.map(memory, 0)
...     vcpu = vm.create_vcpu()
...     vcpu.set_real_mode(0)
...     try:
...         vcpu.run()
...     except OSError as error:
...         print(error.strerror)
...     vcpu.run()
KVM_RUN(vcpu=0): injected EFAULT; replay: KVM_RUN:errno=EFAULT
Hlt()
"""

from anykvm.layers.inject.file import load as load
from anykvm.layers.inject.file import rules as rules
from anykvm.layers.inject.layer import Inject as Inject
from anykvm.layers.inject.rule import Rule as Rule
from anykvm.layers.inject.rule import RuleError as RuleError
from anykvm.layers.inject.selection import Fired as Fired
from anykvm.layers.inject.sweep import Outcome as Outcome
from anykvm.layers.inject.sweep import Sweep as Sweep
from anykvm.layers.inject.sweep import sweep as sweep
