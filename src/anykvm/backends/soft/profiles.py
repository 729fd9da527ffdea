"""Profiles: which KVM the soft backend is. Each difference cites what it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Final

from anykvm.backends.soft.cpuid import MAXPHYADDR

_MAX_ADDRESS_BIT: Final = 51
"""The highest of a page table entry's physical address."""


class Purge(Enum):
    """Where KVM_RUN resets ``kvm_run.exit_reason`` to KVM_EXIT_UNKNOWN."""

    VCPU_RUN = "vcpu_run"
    """At the top of x86.c:vcpu_run(), after completions and the test of immediate_exit: all of mainline."""


def _nothing() -> Mapping[int, int]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Profile:
    """One KVM's behaviour where KVMs differ; immutable, chosen when a backend is made."""

    name: str
    annotate_unresolved: bool
    """A guest page fault with a memslot but no usable host page fills ``memory_fault`` (else: a bare EFAULT)."""
    init_after_shutdown: bool = False
    """A triple fault leaves the vCPU reset (else: its registers stay, to be looked at)."""
    map_writable: bool = False
    """A page that the guest reads is dirty, the first time, if user space has it writable (else: only by a write)."""
    purge: Purge = Purge.VCPU_RUN
    private_gpa_bit: int | None = None
    """In a KVM_X86_SW_PROTECTED_VM, the bit (40 to 51) of page table entries and CR3 by which the guest itself says
    that an access is private, as SEV-SNP's C-bit does, without the encryption; without paging, accesses are shared. An
    access that does not fit the page's attribute is then EFAULT with memory_fault, in both directions. None: the access
    follows the attribute, as mainline's does in such a VM, and can never mismatch."""
    capabilities: Mapping[int, int] = field(default_factory=_nothing)
    """Values of KVM_CHECK_EXTENSION that differ from ``capabilities.CAPABILITIES``."""
    cites: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """For each field: the document or kernel function it follows."""

    def __post_init__(self) -> None:
        """Raise ValueError for a bit that is not above guest-physical addresses, or not an address bit."""
        if self.private_gpa_bit is not None and not MAXPHYADDR <= self.private_gpa_bit <= _MAX_ADDRESS_BIT:
            raise ValueError(f"private_gpa_bit {self.private_gpa_bit} is not from {MAXPHYADDR} to {_MAX_ADDRESS_BIT}")


DOCUMENTED: Final = Profile(
    name="documented",
    annotate_unresolved=True,
    cites=MappingProxyType(
        {
            "annotate_unresolved": "Documentation/virt/kvm/api.rst 8.44: a valid memslot without a VMA is its example",
            "init_after_shutdown": "arch/x86/kvm/vmx/vmx.c:handle_triple_fault(); nothing is documented",
            "map_writable": "Documentation/virt/kvm/api.rst 4.8: 'any pages dirtied since the last call'",
            "purge": "arch/x86/kvm/x86.c:vcpu_run()",
        }
    ),
)
LINUX_7_3: Final = Profile(
    name="linux-7.3",
    annotate_unresolved=False,
    init_after_shutdown=True,
    map_writable=True,
    cites=MappingProxyType(
        {
            "annotate_unresolved": "arch/x86/kvm/mmu/mmu.c:kvm_handle_error_pfn() of 7.3 ends in a bare -EFAULT",
            "init_after_shutdown": "arch/x86/kvm/svm/svm.c:shutdown_interception(): the VMCB is undefined, so an INIT",
            "map_writable": "arch/x86/kvm/mmu/spte.c:make_spte(): what is mapped for writing is dirty; "
            "virt/kvm/kvm_main.c:hva_to_pfn(): a read asks whether it can be",
            "purge": "arch/x86/kvm/x86.c:vcpu_run()",
        }
    ),
)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType({p.name: p for p in (DOCUMENTED, LINUX_7_3)})
"""Every profile by name."""


def profile(name: str | Profile) -> Profile:
    """Find a profile by name; one of your own is taken as it is. Raises ValueError for an unknown name.

    >>> profile("documented").annotate_unresolved, profile("linux-7.3").annotate_unresolved
    (True, False)
    >>> profile("linux-2.6")
    Traceback (most recent call last):
    ...
    ValueError: no profile named 'linux-2.6'; there are documented, linux-7.3
    """
    if isinstance(name, Profile):
        return name
    try:
        return PROFILES[name]
    except KeyError:
        raise ValueError(f"no profile named {name!r}; there are {', '.join(PROFILES)}") from None
