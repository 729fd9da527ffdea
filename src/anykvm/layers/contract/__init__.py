"""contract: who broke the ABI, the kernel or the VMM?

``Contract(inner)`` wraps any backend, and holds every KVM_RUN, and what the VMM does next, against ``RULES``. A
violation names the rule, where it is written, and whose mistake it is.

>>> import anykvm
>>> from anykvm import abi
>>> contract = Contract(anykvm.backend("soft"))
>>> with anykvm.open(contract) as kvm, kvm.create_vm() as vm:
...     try:
...         vm.enable_cap(abi.KVM_CAP_MEMORY_FAULT_INFO)
...     except OSError:
...         pass
>>> print(contract.violations[0].rule.whose, contract.violations[0].rule.name)
VMM enables-informational-capability
"""

from anykvm.layers.contract.layer import Contract as Contract
from anykvm.layers.contract.layer import ContractError as ContractError
from anykvm.layers.contract.layer import ContractWarning as ContractWarning
from anykvm.layers.contract.layer import Violation as Violation
from anykvm.layers.contract.rules import RULES as RULES
from anykvm.layers.contract.rules import ContractRule as ContractRule
