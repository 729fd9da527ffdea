"""The oracle: a real Linux with a real /dev/kvm (kvm_amd, nested paging), in a virtual machine that needs no KVM.

QEMU's TCG emulates a processor with SVM, so the Linux inside it has its own KVM: what that does is what KVM does, up to
the few things that are the emulated processor's (``anykvm/conformance/records/README.md`` names them). ``machine.run``
runs a command there; ``kernels`` and ``apt`` get what it needs; ``initramfs`` and ``init.sh`` are the little that runs
before the command.
"""

from anykvm.conformance.oracle.errors import OracleError as OracleError
from anykvm.conformance.oracle.machine import Settings as Settings
from anykvm.conformance.oracle.machine import run as run
