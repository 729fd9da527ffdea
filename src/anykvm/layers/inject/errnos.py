"""Which errnos each ioctl can give, and by which function of the kernel: what may be injected without lying.

Source: Linux 7.3; ABI.md 1 for KVM_RUN, 4 for memory, else the function that the row names. Every row also has what its
kind gives, so that it is said once: EFAULT where the argument is a structure; EIO on a VM or a vCPU (another mm, or the
VM is dead); ENOTTY (VM) or EINVAL (vCPU, /dev/kvm) for an ioctl that this kernel may not have. EBADF, and ENOTTY of a
descriptor that is no KVM file, are the caller's doing alone, and not listed.
"""

from __future__ import annotations

import errno as _errno
from typing import Final, NamedTuple

from anykvm.abi import ioctls
from anykvm.abi.names import decode_request, errno_name
from anykvm.abi.validity import EHWPOISON


class Row(NamedTuple):
    """What one ioctl, or another site, can give."""

    errnos: frozenset[int]
    source: str
    """The kernel's function, or a section of ABI.md."""


_SYSTEM, _VM = "system", "VM"
_CORE: Final = frozenset(
    (
        "KVM_GET_API_VERSION",
        "KVM_CREATE_VM",
        "KVM_CHECK_EXTENSION",
        "KVM_GET_VCPU_MMAP_SIZE",
        "KVM_CREATE_VCPU",
        "KVM_GET_REGS",
        "KVM_SET_REGS",
        "KVM_GET_SREGS",
        "KVM_SET_SREGS",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_GET_FPU",
        "KVM_SET_FPU",
        "KVM_TRANSLATE",
    )
)
"""Every kernel with KVM on x86 has these."""

# Where, ioctl, errnos beyond those of its kind, source (km: kvm_main.c, x86: arch/x86/kvm/x86.c).
_TABLE: Final = """
system KVM_GET_API_VERSION | EINVAL | km:kvm_dev_ioctl()
system KVM_CREATE_VM | EINVAL ENOMEM EMFILE ENFILE EBUSY EIO | km:kvm_dev_ioctl_create_vm(), kvm_enable_virtualization()
system KVM_CHECK_EXTENSION | | km:kvm_vm_ioctl_check_extension_generic()
system KVM_GET_VCPU_MMAP_SIZE | EINVAL | km:kvm_dev_ioctl()
system KVM_GET_MSR_INDEX_LIST | E2BIG | x86:kvm_arch_dev_ioctl()
system KVM_GET_MSR_FEATURE_INDEX_LIST | E2BIG | x86:kvm_arch_dev_ioctl()
system KVM_GET_SUPPORTED_CPUID | E2BIG EINVAL ENOMEM | cpuid.c:kvm_dev_ioctl_get_cpuid()
system KVM_GET_EMULATED_CPUID | E2BIG EINVAL ENOMEM | cpuid.c:kvm_dev_ioctl_get_cpuid()
system KVM_GET_SUPPORTED_HV_CPUID | E2BIG ENOMEM | hyperv.c:kvm_get_hv_cpuid()
system KVM_X86_GET_MCE_CAP_SUPPORTED | | x86:kvm_arch_dev_ioctl()
VM KVM_CREATE_VCPU | EINVAL EEXIST ENOMEM EMFILE ENFILE | km:kvm_vm_ioctl_create_vcpu()
VM KVM_SET_USER_MEMORY_REGION | EINVAL EEXIST ENOMEM | ABI.md 4.1
VM KVM_SET_USER_MEMORY_REGION2 | EINVAL EEXIST ENOMEM EBADF | ABI.md 4.1
VM KVM_GET_DIRTY_LOG | ENXIO EINVAL ENOENT | ABI.md 4.6
VM KVM_CLEAR_DIRTY_LOG | ENXIO EINVAL ENOENT | ABI.md 4.6
VM KVM_RESET_DIRTY_RINGS | EINVAL | ABI.md 4.6
VM KVM_SET_MEMORY_ATTRIBUTES | EINVAL ENOMEM | ABI.md 4.3
VM KVM_CREATE_GUEST_MEMFD | EINVAL EMFILE ENFILE ENOMEM | ABI.md 4.4
VM KVM_ENABLE_CAP | EINVAL E2BIG EEXIST ENOMEM EBUSY | km:kvm_vm_ioctl_enable_cap_generic(), kvm_vm_ioctl_enable_cap()
VM KVM_SET_TSS_ADDR | EINVAL EEXIST ENOMEM | x86:kvm_vm_ioctl_set_tss_addr()
VM KVM_SET_IDENTITY_MAP_ADDR | EINVAL | x86:kvm_vm_ioctl_set_identity_map_addr()
VM KVM_SET_NR_MMU_PAGES | EINVAL | x86:kvm_vm_ioctl_set_nr_mmu_pages()
VM KVM_SET_BOOT_CPU_ID | EBUSY EINVAL | x86:kvm_arch_vm_ioctl()
VM KVM_CREATE_IRQCHIP | EEXIST EINVAL ENOMEM | x86:kvm_arch_vm_ioctl()
VM KVM_CREATE_PIT | EEXIST ENOENT ENOMEM | x86:kvm_arch_vm_ioctl()
VM KVM_CREATE_PIT2 | EEXIST ENOENT ENOMEM | x86:kvm_arch_vm_ioctl()
VM KVM_GET_IRQCHIP | ENXIO EINVAL ENOMEM | x86:kvm_vm_ioctl_get_irqchip()
VM KVM_SET_IRQCHIP | ENXIO EINVAL ENOMEM | x86:kvm_vm_ioctl_set_irqchip()
VM KVM_GET_PIT | ENXIO | x86:kvm_arch_vm_ioctl()
VM KVM_SET_PIT | ENXIO | x86:kvm_arch_vm_ioctl()
VM KVM_GET_PIT2 | ENXIO | x86:kvm_arch_vm_ioctl()
VM KVM_SET_PIT2 | ENXIO | x86:kvm_arch_vm_ioctl()
VM KVM_REINJECT_CONTROL | ENXIO | x86:kvm_vm_ioctl_reinject()
VM KVM_IRQ_LINE | ENXIO EINVAL | x86:kvm_vm_ioctl_irq_line()
VM KVM_IRQ_LINE_STATUS | ENXIO EINVAL | x86:kvm_vm_ioctl_irq_line()
VM KVM_REGISTER_COALESCED_MMIO | EINVAL ENOMEM ENOSPC | coalesced_mmio.c:kvm_vm_ioctl_register_coalesced_mmio()
VM KVM_UNREGISTER_COALESCED_MMIO | EINVAL ENOMEM | coalesced_mmio.c:kvm_vm_ioctl_unregister_coalesced_mmio()
VM KVM_SET_GSI_ROUTING | EINVAL ENOMEM | irqchip.c:kvm_set_irq_routing()
VM KVM_IRQFD | EINVAL EBADF EBUSY ENOMEM | eventfd.c:kvm_irqfd()
VM KVM_IOEVENTFD | EINVAL EBADF EEXIST ENOMEM ENOENT ENOSPC | eventfd.c:kvm_ioeventfd()
VM KVM_SIGNAL_MSI | EINVAL | irqchip.c:kvm_send_userspace_msi()
VM KVM_CREATE_DEVICE | ENODEV ENOMEM EMFILE EEXIST EINVAL | km:kvm_ioctl_create_device()
VM KVM_GET_CLOCK | EINVAL | x86:kvm_vm_ioctl_get_clock()
VM KVM_SET_CLOCK | EINVAL | x86:kvm_vm_ioctl_set_clock()
VM KVM_GET_TSC_KHZ | EINVAL | x86:kvm_arch_vm_ioctl()
VM KVM_SET_TSC_KHZ | EINVAL | x86:kvm_arch_vm_ioctl()
VM KVM_SET_PMU_EVENT_FILTER | EINVAL E2BIG ENOMEM | pmu.c:kvm_vm_ioctl_set_pmu_event_filter()
VM KVM_MEMORY_ENCRYPT_OP | EINVAL ENOMEM EBUSY EBADF EPERM | svm/sev.c:sev_mem_enc_ioctl()
VM KVM_MEMORY_ENCRYPT_REG_REGION | EINVAL ENOMEM | svm/sev.c:sev_mem_enc_register_region()
VM KVM_MEMORY_ENCRYPT_UNREG_REGION | EINVAL | svm/sev.c:sev_mem_enc_unregister_region()
VM KVM_HYPERV_EVENTFD | EINVAL ENOENT EBADF EEXIST ENOMEM ENOSPC | hyperv.c:kvm_vm_ioctl_hv_eventfd()
VM KVM_X86_SET_MSR_FILTER | EINVAL ENOMEM | x86:kvm_vm_ioctl_set_msr_filter()
VM KVM_XEN_HVM_CONFIG | EINVAL | xen.c:kvm_xen_hvm_config()
VM KVM_XEN_HVM_GET_ATTR | ENOENT EINVAL | xen.c:kvm_xen_hvm_get_attr()
VM KVM_XEN_HVM_SET_ATTR | ENOENT EINVAL ENOMEM | xen.c:kvm_xen_hvm_set_attr()
VM KVM_XEN_HVM_EVTCHN_SEND | EINVAL ENOENT | xen.c:kvm_xen_hvm_evtchn_send()
VM KVM_GET_STATS_FD | EMFILE ENFILE ENOMEM | km:kvm_vm_ioctl_get_stats_fd()
vCPU KVM_GET_REGS | ENOMEM | km:kvm_vcpu_ioctl()
vCPU KVM_SET_REGS | ENOMEM | km:kvm_vcpu_ioctl()
vCPU KVM_GET_SREGS | ENOMEM | km:kvm_vcpu_ioctl()
vCPU KVM_SET_SREGS | EINVAL ENOMEM | x86:kvm_arch_vcpu_ioctl_set_sregs()
vCPU KVM_GET_SREGS2 | ENOMEM | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_SET_SREGS2 | EINVAL ENOMEM | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_GET_FPU | ENOMEM | km:kvm_vcpu_ioctl()
vCPU KVM_SET_FPU | ENOMEM | km:kvm_vcpu_ioctl()
vCPU KVM_GET_MSRS | E2BIG ENOMEM | x86:msr_io()
vCPU KVM_SET_MSRS | E2BIG ENOMEM | x86:msr_io()
vCPU KVM_TRANSLATE | | x86:kvm_arch_vcpu_ioctl_translate()
vCPU KVM_INTERRUPT | EINVAL ENXIO EEXIST | x86:kvm_vcpu_ioctl_interrupt()
vCPU KVM_SET_SIGNAL_MASK | EINVAL | km:kvm_vcpu_ioctl()
vCPU KVM_GET_MP_STATE | EINVAL | x86:kvm_arch_vcpu_ioctl_get_mpstate()
vCPU KVM_SET_MP_STATE | EINVAL | x86:kvm_arch_vcpu_ioctl_set_mpstate()
vCPU KVM_SET_GUEST_DEBUG | EINVAL EBUSY | x86:kvm_arch_vcpu_ioctl_set_guest_debug()
vCPU KVM_SET_CPUID | EINVAL E2BIG ENOMEM | cpuid.c:kvm_vcpu_ioctl_set_cpuid()
vCPU KVM_SET_CPUID2 | EINVAL E2BIG ENOMEM | cpuid.c:kvm_vcpu_ioctl_set_cpuid2()
vCPU KVM_GET_CPUID2 | E2BIG | cpuid.c:kvm_vcpu_ioctl_get_cpuid2()
vCPU KVM_GET_LAPIC | EINVAL ENOMEM | x86:kvm_vcpu_ioctl_get_lapic()
vCPU KVM_SET_LAPIC | EINVAL ENOMEM | x86:kvm_vcpu_ioctl_set_lapic()
vCPU KVM_NMI | | x86:kvm_vcpu_ioctl_nmi()
vCPU KVM_SMI | EINVAL | x86:kvm_inject_smi()
vCPU KVM_TPR_ACCESS_REPORTING | | x86:vcpu_ioctl_tpr_access_reporting()
vCPU KVM_SET_VAPIC_ADDR | EINVAL | lapic.c:kvm_lapic_set_vapic_addr()
vCPU KVM_X86_SETUP_MCE | EINVAL | x86:kvm_vcpu_ioctl_x86_setup_mce()
vCPU KVM_X86_SET_MCE | EINVAL | x86:kvm_vcpu_ioctl_x86_set_mce()
vCPU KVM_GET_VCPU_EVENTS | | x86:kvm_vcpu_ioctl_x86_get_vcpu_events()
vCPU KVM_SET_VCPU_EVENTS | EINVAL | x86:kvm_vcpu_ioctl_x86_set_vcpu_events()
vCPU KVM_GET_DEBUGREGS | EINVAL | x86:kvm_vcpu_ioctl_x86_get_debugregs()
vCPU KVM_SET_DEBUGREGS | EINVAL | x86:kvm_vcpu_ioctl_x86_set_debugregs()
vCPU KVM_GET_XSAVE | EINVAL ENOMEM | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_GET_XSAVE2 | EINVAL ENOMEM | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_SET_XSAVE | EINVAL ENOMEM | x86:kvm_vcpu_ioctl_x86_set_xsave()
vCPU KVM_GET_XCRS | EINVAL ENOMEM | x86:kvm_vcpu_ioctl_x86_get_xcrs()
vCPU KVM_SET_XCRS | EINVAL ENOMEM | x86:kvm_vcpu_ioctl_x86_set_xcrs()
vCPU KVM_KVMCLOCK_CTRL | EINVAL | x86:kvm_set_guest_paused()
vCPU KVM_GET_ONE_REG | EINVAL ENOENT | x86:kvm_get_set_one_reg()
vCPU KVM_SET_ONE_REG | EINVAL ENOENT | x86:kvm_get_set_one_reg()
vCPU KVM_GET_REG_LIST | E2BIG | x86:kvm_get_reg_list()
vCPU KVM_GET_NESTED_STATE | EINVAL E2BIG | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_SET_NESTED_STATE | EINVAL ENOMEM | x86:kvm_arch_vcpu_ioctl()
vCPU KVM_XEN_VCPU_GET_ATTR | ENOENT EINVAL EOPNOTSUPP | xen.c:kvm_xen_vcpu_get_attr()
vCPU KVM_XEN_VCPU_SET_ATTR | ENOENT EINVAL EOPNOTSUPP ENXIO | xen.c:kvm_xen_vcpu_set_attr()
vCPU KVM_SET_DEVICE_ATTR | ENXIO EINVAL EPERM | x86:kvm_vcpu_ioctl_device_attr(), km:kvm_device_ioctl()
vCPU KVM_GET_DEVICE_ATTR | ENXIO EINVAL EPERM | x86:kvm_vcpu_ioctl_device_attr(), km:kvm_device_ioctl()
vCPU KVM_HAS_DEVICE_ATTR | ENXIO EINVAL EPERM | x86:kvm_vcpu_ioctl_device_attr(), km:kvm_device_ioctl()
vCPU KVM_PRE_FAULT_MEMORY | EINVAL EOPNOTSUPP EINTR EAGAIN ENOENT EHWPOISON ENOMEM | ABI.md 4.5
"""


def errno_number(name: str) -> int | None:
    """Give an errno's number by its name; None for an unknown name.

    >>> errno_number("EFAULT"), errno_number("EHWPOISON"), errno_number("EBROKEN")
    (14, 133, None)
    """
    number: int | None = EHWPOISON if name == "EHWPOISON" else getattr(_errno, name, None)
    return number


def _row(line: str) -> tuple[int, Row]:
    head, names, source = (part.strip() for part in line.split("|"))
    kind, name = head.split()
    request: int = getattr(ioctls, name)
    errnos = {number for text in names.split() if (number := errno_number(text)) is not None}
    if decode_request(request).size:
        errnos.add(_errno.EFAULT)
    if kind != _SYSTEM or name == "KVM_CHECK_EXTENSION":
        errnos.add(_errno.EIO)
    if name not in _CORE:
        errnos.add(_errno.ENOTTY if kind == _VM else _errno.EINVAL)
    return request, Row(frozenset(errnos), source)


EARLY: Final = Row(
    frozenset((_errno.EIO, _errno.EINVAL, _errno.EINTR, _errno.EAGAIN, _errno.ENOMEM, _errno.EFAULT)),
    "ABI.md 1, rows 1 to 16; EFAULT: no path of x86 7.3, but of other architectures and older kernels",
)
"""KVM_RUN before the guest, and before the completion of the last exit: ``exit_reason`` stays what it was."""
LATE: Final = Row(
    frozenset((_errno.EFAULT, EHWPOISON, _errno.ENOMEM, _errno.EINTR, _errno.EIO, _errno.EINVAL, _errno.ENOSPC)),
    "ABI.md 1, rows 18 to 31",
)
"""KVM_RUN after the completion of the last exit: ``exit_reason`` was reset."""

IOCTLS: Final[dict[int, Row]] = {
    **dict(_row(line) for line in _TABLE.strip().splitlines()),
    ioctls.KVM_RUN: Row(EARLY.errnos | LATE.errnos, f"{EARLY.source}; {LATE.source}"),
}
"""Request number -> what it can give."""

CALLS: Final[dict[str, Row]] = {
    "open": Row(
        frozenset((_errno.ENOENT, _errno.EACCES, _errno.EPERM, _errno.ENODEV, _errno.ENXIO, _errno.EMFILE))
        | {_errno.ENFILE, _errno.ENOMEM},
        "open(2) of /dev/kvm",
    ),
    "mmap": Row(frozenset((_errno.ENOMEM, _errno.EAGAIN, _errno.EINVAL, _errno.ENODEV)), "mmap(2) of a vCPU"),
}
"""The other calls of the waist that can fail."""

GMEM: Final = Row(
    frozenset((_errno.EFAULT, _errno.EIO, _errno.ENOMEM, EHWPOISON)), "ABI.md 2.1, gm:__kvm_gmem_get_pfn()"
)
"""What the look-up of a guest_memfd's page can give."""


def names(row: Row) -> str:
    """List a row's errnos by name.

    >>> names(IOCTLS[ioctls.KVM_GET_REGS])
    'EFAULT, EIO, ENOMEM'
    """
    return ", ".join(sorted(errno_name(number) for number in row.errnos))
