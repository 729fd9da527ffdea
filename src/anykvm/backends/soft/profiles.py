"""Profiles: which KVM the soft backend is. Each difference cites what it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.validity import memory_fault_valid
from anykvm.backends.soft.cpuid import MAXPHYADDR

_MAX_ADDRESS_BIT: Final = 51
"""The highest of a page table entry's physical address."""


class Purge(Enum):
    """Where KVM_RUN resets ``kvm_run.exit_reason`` to KVM_EXIT_UNKNOWN."""

    VCPU_RUN = "vcpu_run"
    """At the top of x86.c:vcpu_run(), after completions and the test of immediate_exit: all of mainline."""
    BEFORE_LOCK = "before_lock"
    """Also before vcpu->mutex is taken (policy P3a of ABI.md 7.3). A vCPU that is dead is refused earlier."""
    AFTER_LOCK = "after_lock"
    """Also after the mutex is taken and the argument checked (policy P3b)."""
    AFTER_COMPLETION = "after_completion"
    """Also after the pending completion, before immediate_exit is looked at (policy P3c)."""
    NEVER = "never"
    """Nowhere: the reset of vcpu_run() is missing too."""


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
    emulate_in_delivery: bool = False
    """Where the delivery of an exception or interrupt meets a device (no slot, or one that is read-only), the
    instruction at RIP is emulated, again and again while the event waits (else: KVM_INTERNAL_ERROR_DELIVERY_EV)."""
    any_efer: bool = False
    """KVM_SET_SREGS takes any bits of EFER (else: EINVAL for those that CPUID does not have). The engine ignores those
    it does not have."""
    sync_low_half: bool = False
    """Unknown bits of ``kvm_valid_regs`` and ``kvm_dirty_regs`` are EINVAL below bit 32 only (else: all)."""
    stale_pre_fault: bool = False
    """KVM_PRE_FAULT_MEMORY makes no progress, and ends with EINTR when a signal comes, from when a slot is deleted or
    moved to the vCPU's next KVM_RUN (else: what happens to slots does not matter)."""
    hypercall_as_6_12: bool = False
    """``kvm_run.hypercall.ret`` is not written before the exit (else: 0). A KVM_HC_MAP_GPA_RANGE of 32-bit code with a
    bit above 31 in RAX is 0 for the guest, which goes on; what the next exit without a completion of its own leaves in
    ``hypercall.ret`` becomes RAX, three bytes further (else: the exit)."""
    purge: Purge = Purge.VCPU_RUN
    any_errno: bool = False
    """The documents of this KVM promise that ``memory_fault`` is valid for every errno if exit_reason says so (else:
    only for EFAULT and EHWPOISON). A promise about what is read; what KVM_RUN writes is the same."""
    absent_ioctls: frozenset[int] = frozenset()
    """Requests that this KVM does not know: ENOTTY of a VM, EINVAL of a vCPU."""
    private_gpa_bit: int | None = None
    """In a KVM_X86_SW_PROTECTED_VM, the bit (40 to 51) of page table entries and CR3 by which the guest itself says
    that an access is private, as SEV-SNP's C-bit does, without the encryption; without paging, accesses are shared. An
    access that does not fit the page's attribute is then EFAULT with memory_fault, in both directions. None: the access
    follows the attribute, as mainline's does in such a VM, and can never mismatch."""
    capabilities: Mapping[int, int] = field(default_factory=_nothing)
    """Values of KVM_CHECK_EXTENSION that differ from ``capabilities.CAPABILITIES``; on VMs of any type, too."""
    vm_capabilities: Mapping[int, int] = field(default_factory=_nothing)
    """Those that differ in a VM of the default type only. Without KVM_CAP_GUEST_MEMFD its slots have no guest_memfd."""
    cites: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """For each field: the document or kernel function it follows."""

    def __post_init__(self) -> None:
        """Raise ValueError for a bit that is not above guest-physical addresses, or not an address bit."""
        if self.private_gpa_bit is not None and not MAXPHYADDR <= self.private_gpa_bit <= _MAX_ADDRESS_BIT:
            raise ValueError(f"private_gpa_bit {self.private_gpa_bit} is not from {MAXPHYADDR} to {_MAX_ADDRESS_BIT}")

    def memory_fault_valid(self, errno: int, exit_reason: int) -> bool:
        """Say whether this KVM's documents call ``memory_fault`` valid. ``errno`` is KVM_RUN's, 0 if it did not fail.

        Without KVM_CAP_MEMORY_FAULT_INFO it never is.

        >>> LINUX_7_3.memory_fault_valid(4, 39), RESEARCH["any-errno"].memory_fault_valid(4, 39)
        (False, True)
        """
        if self.capabilities.get(c.KVM_CAP_MEMORY_FAULT_INFO, 1) == 0:
            return False
        if self.any_errno:
            return errno != 0 and exit_reason == c.KVM_EXIT_MEMORY_FAULT
        return memory_fault_valid(errno, exit_reason)


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

LINUX_6_12: Final = replace(
    LINUX_7_3,
    name="linux-6.12",
    emulate_in_delivery=True,
    any_efer=True,
    sync_low_half=True,
    stale_pre_fault=True,
    hypercall_as_6_12=True,
    capabilities=MappingProxyType({c.KVM_CAP_GUEST_MEMFD_FLAGS: 0}),
    vm_capabilities=MappingProxyType({c.KVM_CAP_GUEST_MEMFD: 0}),
    cites=MappingProxyType(
        {
            **LINUX_7_3.cites,
            "annotate_unresolved": "arch/x86/kvm/mmu/mmu.c:kvm_handle_error_pfn() of 6.12 ends in a bare -EFAULT",
            "emulate_in_delivery": "arch/x86/kvm/x86.c:x86_emulate_instruction() of 6.12 does not ask whether an event "
            "is being delivered; 7.3: svm.c:svm_check_emulate_instruction(), X86EMUL_UNHANDLEABLE_VECTORING",
            "any_efer": "arch/x86/kvm/x86.c:kvm_is_valid_sregs() of 6.12; 7.3 also asks kvm_valid_efer()",
            "sync_low_half": "arch/x86/kvm/x86.c:kvm_sync_valid_fields() of 6.12 is a u32, so its complement is, too",
            "stale_pre_fault": "arch/x86/kvm/mmu.h:kvm_mmu_reload() of 7.3 frees obsolete roots, 6.12's does not: "
            "mmu.c:is_page_fault_stale(), kvm_tdp_map_page()",
            "hypercall_as_6_12": "arch/x86/kvm/x86.c:__kvm_emulate_hypercall() of 6.12 leaves hypercall.ret; "
            "kvm_emulate_hypercall() compares all of RAX with KVM_HC_MAP_GPA_RANGE",
            "capabilities": "include/uapi/linux/kvm.h of 6.12 has no KVM_CAP_GUEST_MEMFD_FLAGS; "
            "virt/kvm/guest_memfd.c:kvm_gmem_create() takes no flag",
            "vm_capabilities": "virt/kvm/kvm_main.c of 6.12: KVM_CAP_GUEST_MEMFD and check_memory_region_flags() ask "
            "kvm_arch_has_private_mem()",
        }
    ),
)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType({p.name: p for p in (DOCUMENTED, LINUX_7_3, LINUX_6_12)})
"""What KVM promises and what its kernels do, by name."""


def _research(name: str, why: Mapping[str, str], **changes: Any) -> Profile:
    cites = MappingProxyType({**LINUX_7_3.cites, **why})
    return replace(LINUX_7_3, name=name, cites=cites, **changes)


_ABSENT_BEFORE_6_8: Final = MappingProxyType(
    dict.fromkeys(
        (
            c.KVM_CAP_MEMORY_FAULT_INFO,
            c.KVM_CAP_USER_MEMORY2,
            c.KVM_CAP_MEMORY_ATTRIBUTES,
            c.KVM_CAP_GUEST_MEMFD,
            c.KVM_CAP_GUEST_MEMFD_FLAGS,
            c.KVM_CAP_VM_TYPES,
            c.KVM_CAP_PRE_FAULT_MEMORY,
        ),
        0,
    )
)
_PURGE: Final = "no kernel: the proposal to reset exit_reason early, ABI.md 7.3"
RESEARCH: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        made.name: made
        for made in (
            _research(
                "pre-6.8",
                {
                    "capabilities": "include/uapi/linux/kvm.h of 6.7 ends before KVM_CAP_USER_MEMORY2",
                    "absent_ioctls": "include/uapi/linux/kvm.h of 6.7",
                },
                capabilities=_ABSENT_BEFORE_6_8,
                absent_ioctls=frozenset(
                    (
                        n.KVM_SET_USER_MEMORY_REGION2,
                        n.KVM_SET_MEMORY_ATTRIBUTES,
                        n.KVM_CREATE_GUEST_MEMFD,
                        n.KVM_PRE_FAULT_MEMORY,
                    )
                ),
            ),
            _research("any-errno", {"any_errno": "no kernel: policy P2, ABI.md 7.3"}, any_errno=True),
            _research("early-purge-before-lock", {"purge": _PURGE}, purge=Purge.BEFORE_LOCK),
            _research("early-purge-after-lock", {"purge": _PURGE}, purge=Purge.AFTER_LOCK),
            _research("early-purge-after-completion", {"purge": _PURGE}, purge=Purge.AFTER_COMPLETION),
            _research("never-purge", {"purge": "no kernel: ABI.md 7.4, T15 asks for it"}, purge=Purge.NEVER),
        )
    }
)
"""KVMs that do not exist, or no longer: for questions about the ABI, ``anykvm explore`` for one. By name."""


def profile(name: str | Profile) -> Profile:
    """Find a profile by name, also one of ``RESEARCH``. One of your own is taken as it is.

    Raises ValueError for an unknown name.

    >>> profile("documented").annotate_unresolved, profile("linux-7.3").annotate_unresolved
    (True, False)
    >>> profile("linux-2.6")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: no profile named 'linux-2.6'; there are documented, linux-7.3, linux-6.12; for research pre-6.8, ...
    """
    if isinstance(name, Profile):
        return name
    try:
        return PROFILES[name] if name in PROFILES else RESEARCH[name]
    except KeyError:
        known = f"{', '.join(PROFILES)}; for research {', '.join(RESEARCH)}"
        raise ValueError(f"no profile named {name!r}; there are {known}") from None
