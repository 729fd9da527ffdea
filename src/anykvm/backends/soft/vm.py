"""The ioctls of a VM. Source: kvm_main.c:kvm_vm_ioctl(), x86.c:kvm_arch_vm_ioctl()."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.limits import KVM_MIN_ALLOC_MMU_PAGES
from anykvm.abi.structures import kvm_enable_cap, kvm_userspace_memory_region, kvm_userspace_memory_region2
from anykvm.backends.soft import dirty
from anykvm.backends.soft.attributes import enable_exit_hypercall, set_memory_attributes
from anykvm.backends.soft.capabilities import KVM_MAX_VCPU_IDS, KVM_MAX_VCPUS, check_extension
from anykvm.backends.soft.engine.library import install_handlers, library
from anykvm.backends.soft.errors import IN_DEVICE_FAULT, Refused
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.guest_memfd import create_guest_memfd
from anykvm.backends.soft.memslots import Memslots, Region
from anykvm.backends.soft.profiles import Profile
from anykvm.backends.soft.upcall import in_device_fault
from anykvm.backends.soft.usercopy import copy_from_user
from anykvm.backends.soft.vcpu import Vcpu, VcpuFile, create_vcpu
from anykvm.host.atomic import Finalizer
from anykvm.host.ranges import PAGE_SIZE

TSC_KHZ: Final = 1_000_000
"""Guests' TSC frequency unless KVM_SET_TSC_KHZ says otherwise: 1 GHz, one tick a nanosecond."""
MAX_TSC_KHZ: Final = 1 << 32
"""KVM_SET_TSC_KHZ takes a 32-bit number."""
_MAX_TSS_ADDR: Final = (1 << 32) - 3 * PAGE_SIZE


class Vm:
    """struct kvm: lives while a descriptor of it, or of one of its vCPUs, lives."""

    def __init__(self, profile: Profile, type: int) -> None:
        """An empty VM of a KVM_X86_*_VM type. Raises OSError from the signal handlers; Refused: ENOMEM."""
        engine = library()
        install_handlers(engine)
        try:
            self.lock = threading.RLock()  # taken on workers only: see anykvm.host.atomic
            """kvm->lock and kvm->slots_lock."""
        except RuntimeError:  # what it says instead of MemoryError
            raise Refused(errno.ENOMEM) from None
        address: int = engine.ak_vm_create()
        if not address:
            raise Refused(errno.ENOMEM)
        try:
            self._set_up(address, profile, type)
        except BaseException:
            engine.ak_vm_destroy(address)
            raise

    def _set_up(self, address: int, profile: Profile, type: int) -> None:
        engine = library()
        self.address = address
        """Of struct ak_vm."""
        self.profile = profile
        self.type = type
        bit = profile.private_gpa_bit if type == c.KVM_X86_SW_PROTECTED_VM else None
        engine.ak_vm_configure(address, 0 if bit is None else 1 << bit, profile.map_writable)
        self.vcpus: dict[int, Vcpu] = {}
        """By vCPU id. A vCPU lives until its VM goes, also without a descriptor."""
        spaces, gmem = map(self.check_extension, (c.KVM_CAP_MULTI_ADDRESS_SPACE, c.KVM_CAP_GUEST_MEMFD))
        self.memslots = Memslots(address, spaces, guest_memfd=bool(gmem))
        self.tsc_khz = TSC_KHZ
        self.bsp_vcpu_id = 0
        self.max_vcpu_ids = 0
        """Limit of KVM_ENABLE_CAP(KVM_CAP_MAX_VCPU_ID); 0: not set."""
        self.refusal_hook: object = None
        """Keeps what the engine asks about page look-ups (refusal.c); a layer's."""
        # Not at the process's end: that frees everything, and threads may still be running guests.
        Finalizer(self, _destroy, address, self.vcpus, engine.ak_mm_generation())

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: the value of a capability in this VM."""
        return check_extension(self.profile, capability, self.type)

    def check_alive(self) -> None:
        """Refused: EIO when the VM belongs to another process (it was made before a fork) or is dead."""
        if library().ak_vm_dead(self.address):
            raise Refused(errno.EIO, "the VM is dead, or was made in another process")

    def check_not_in_device_fault(self) -> None:
        """Refused: EDEADLK for a device's fault handler, which the VM's vCPUs wait for, and its lock for them."""
        if in_device_fault() and library().ak_vm_in_device_fault(self.address):
            raise Refused(errno.EDEADLK, IN_DEVICE_FAULT)

    def kill(self) -> None:
        """kvm_vm_dead(): every later ioctl of the VM and its vCPUs is EIO; running vCPUs return it."""
        library().ak_vm_kill(self.address)


def _destroy(address: int, vcpus: dict[int, Vcpu], generation: int) -> None:
    """kvm_destroy_vm(). A forked child's copy is left alone: its locks may be held by threads it does not have."""
    engine = library()
    if engine.ak_mm_generation() != generation:
        return
    for vcpu in vcpus.values():
        vcpu.destroy()
    engine.ak_vm_destroy(address)


class VmFile(File):
    """A VM's descriptor."""

    kind = "anon_inode:kvm-vm"
    direct = frozenset((n.KVM_CHECK_EXTENSION, n.KVM_GET_TSC_KHZ))
    """They read one thing, without the VM's lock."""

    def __init__(self, vm: Vm) -> None:
        """Keeps ``vm`` alive."""
        self.vm = vm

    def ioctl(self, request: int, arg: int) -> int:
        """Do a VM ioctl. Refused: EIO as ``Vm.check_alive``; ENOTTY for one a VM does not have; as each says."""
        self.vm.check_alive()
        handler = _HANDLERS.get(request)
        if handler is None or request in self.vm.profile.absent_ioctls:
            raise Refused(errno.ENOTTY, "not an ioctl of a VM, or not offered")
        if request in self.direct:
            return handler(self.vm, arg)
        self.vm.check_not_in_device_fault()
        with self.vm.lock:
            return handler(self.vm, arg)


def create_vm(profile: Profile, type: int) -> int:
    """KVM_CREATE_VM: returns the VM's descriptor. Raises OSError: EMFILE, ENOMEM."""
    return FILES.open("kvm-vm", VmFile(Vm(profile, type)))


def _check_extension(vm: Vm, arg: int) -> int:
    return vm.check_extension(arg)


def _set_user_memory_region(vm: Vm, arg: int) -> int:
    r = copy_from_user(kvm_userspace_memory_region, arg)
    region = Region(r.slot, r.flags, r.guest_phys_addr, r.memory_size, r.userspace_addr)
    vm.memslots.set_memory_region(region, v1=True)
    return 0


def _set_user_memory_region2(vm: Vm, arg: int) -> int:
    r = copy_from_user(kvm_userspace_memory_region2, arg)
    gmem = r.guest_memfd, r.guest_memfd_offset
    region = Region(r.slot, r.flags, r.guest_phys_addr, r.memory_size, r.userspace_addr, *gmem)
    vm.memslots.set_memory_region(region, v1=False)
    return 0


def _create_vcpu(vm: Vm, arg: int) -> int:
    """kvm_vm_ioctl_create_vcpu(), kvm_arch_vcpu_precreate()."""
    if arg >= KVM_MAX_VCPU_IDS:
        raise Refused(errno.EINVAL, f"vcpu_id is not below {KVM_MAX_VCPU_IDS} (KVM_CAP_MAX_VCPU_ID)")
    if len(vm.vcpus) >= KVM_MAX_VCPUS:
        raise Refused(errno.EINVAL, f"the VM has {KVM_MAX_VCPUS} vCPUs (KVM_CAP_MAX_VCPUS)")
    vm.max_vcpu_ids = vm.max_vcpu_ids or KVM_MAX_VCPU_IDS
    if arg >= vm.max_vcpu_ids:
        raise Refused(errno.EINVAL, f"vcpu_id is not below {vm.max_vcpu_ids} (set by KVM_ENABLE_CAP)")
    if arg in vm.vcpus:
        raise Refused(errno.EEXIST, f"this vcpu_id is in use: {arg}")
    ring_size = vm.memslots.dirty.ring_size
    fd, vcpu = create_vcpu(vm.address, arg, vm.profile, bsp=arg == vm.bsp_vcpu_id, ring_size=ring_size)
    try:
        FILES.install(fd, VcpuFile(vcpu, vm))
        vm.vcpus[arg] = vcpu
    except BaseException:
        FILES.close(fd)
        vcpu.destroy()
        raise
    return fd


def _set_tss_addr(vm: Vm, arg: int) -> int:
    """Only Intel hardware needs it: checked, then unused (svm.c:svm_set_tss_addr())."""
    if arg > _MAX_TSS_ADDR:
        raise Refused(errno.EINVAL, f"address {arg:#x} does not leave three pages below 4 GiB")
    return 0


def _set_identity_map_addr(vm: Vm, arg: int) -> int:
    """Only Intel hardware needs it: checked, then unused."""
    if vm.vcpus:
        raise Refused(errno.EINVAL, "the VM has vCPUs already")
    copy_from_user(_U64Argument, arg)
    return 0


class _U64Argument(ctypes.Structure):
    _fields_ = [("value", ctypes.c_uint64)]


def _set_nr_mmu_pages(vm: Vm, arg: int) -> int:
    """A limit for shadow page tables, which there are none of."""
    if arg < KVM_MIN_ALLOC_MMU_PAGES:
        raise Refused(errno.EINVAL, f"{arg} pages are fewer than {KVM_MIN_ALLOC_MMU_PAGES}")
    return 0


def _set_boot_cpu_id(vm: Vm, arg: int) -> int:
    if vm.vcpus:
        raise Refused(errno.EBUSY, "the VM has vCPUs already")
    if arg > (vm.max_vcpu_ids or KVM_MAX_VCPU_IDS):
        raise Refused(errno.EINVAL, f"vCPU id {arg} is too large (KVM_CAP_MAX_VCPU_ID)")
    vm.bsp_vcpu_id = arg
    return 0


def _set_tsc_khz(vm: Vm, arg: int) -> int:
    """The frequency of all vCPUs, in kHz; 0: the default. EINVAL once there is a vCPU."""
    khz = arg % MAX_TSC_KHZ or TSC_KHZ
    if vm.vcpus:
        raise Refused(errno.EINVAL, "the VM has vCPUs already")
    library().ak_vm_set_tsc_khz(vm.address, khz)
    vm.tsc_khz = khz
    return 0


def _get_tsc_khz(vm: Vm, arg: int) -> int:
    return vm.tsc_khz


def _enable_cap(vm: Vm, arg: int) -> int:
    """kvm_vm_ioctl_enable_cap(). Informational capabilities, KVM_CAP_MEMORY_FAULT_INFO among them, are EINVAL."""
    cap = copy_from_user(kvm_enable_cap, arg)
    enable = dirty.enabler(vm, cap.cap)
    if enable:
        return enable(vm, cap)
    if cap.flags:
        raise Refused(errno.EINVAL, f"flags: {cap.flags:#x}, not 0")
    if cap.cap == c.KVM_CAP_EXIT_HYPERCALL:
        return enable_exit_hypercall(vm, cap)
    if cap.cap != c.KVM_CAP_MAX_VCPU_ID:
        raise Refused(errno.EINVAL, f"cap: {cap.cap} is not one that can be enabled on a VM")
    limit: int = cap.args[0]
    if not vm.bsp_vcpu_id <= limit <= KVM_MAX_VCPU_IDS:
        raise Refused(errno.EINVAL, f"args[0]: {limit} is not a limit of vCPU ids")
    if vm.max_vcpu_ids not in (0, limit):
        raise Refused(errno.EINVAL, f"args[0]: the limit is {vm.max_vcpu_ids} already")
    vm.max_vcpu_ids = limit
    return 0


_HANDLERS: Final[dict[int, Callable[[Vm, int], int]]] = {
    n.KVM_CHECK_EXTENSION: _check_extension,
    n.KVM_SET_USER_MEMORY_REGION: _set_user_memory_region,
    n.KVM_SET_USER_MEMORY_REGION2: _set_user_memory_region2,
    n.KVM_CREATE_VCPU: _create_vcpu,
    n.KVM_SET_TSS_ADDR: _set_tss_addr,
    n.KVM_SET_IDENTITY_MAP_ADDR: _set_identity_map_addr,
    n.KVM_SET_NR_MMU_PAGES: _set_nr_mmu_pages,
    n.KVM_SET_BOOT_CPU_ID: _set_boot_cpu_id,
    n.KVM_SET_TSC_KHZ: _set_tsc_khz,
    n.KVM_GET_TSC_KHZ: _get_tsc_khz,
    n.KVM_ENABLE_CAP: _enable_cap,
    n.KVM_SET_MEMORY_ATTRIBUTES: set_memory_attributes,
    n.KVM_CREATE_GUEST_MEMFD: create_guest_memfd,
    **dirty.HANDLERS,
}
