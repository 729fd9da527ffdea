"""System and VM ioctls of the soft backend, bad pointers for all, and capabilities that say the truth."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from anykvm import abi
from anykvm.backends.soft import PROFILES, Profile, SoftBackend
from anykvm.backends.soft.capabilities import CAPABILITIES
from anykvm.backends.soft.engine import library
from anykvm.backends.soft.msrs import FEATURE_MSRS, MSRS_TO_SAVE
from anykvm.backends.soft.profiles import RESEARCH
from anykvm.backends.soft.system import _HANDLERS as SYSTEM
from anykvm.backends.soft.vcpu_state import HANDLERS as VCPU
from anykvm.backends.soft.vm import _HANDLERS as VM
from anykvm.host import libc
from soft_helpers import PAGE, Guest, error_of, refused

ADDRESS = ctypes.addressof
NO_POINTER = {
    abi.KVM_RESET_DIRTY_RINGS,
    abi.KVM_NMI,
    abi.KVM_GET_TSC_KHZ,
    abi.KVM_SET_TSC_KHZ,
    abi.KVM_GET_API_VERSION,
    abi.KVM_GET_VCPU_MMAP_SIZE,
    abi.KVM_CREATE_VM,
    abi.KVM_CREATE_VCPU,
    abi.KVM_CHECK_EXTENSION,
    abi.KVM_SET_TSS_ADDR,
    abi.KVM_SET_NR_MMU_PAGES,
    abi.KVM_SET_BOOT_CPU_ID,
}


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(SoftBackend())
    yield made
    made.close()


def empty_vm(guest: Guest) -> int:
    return guest.backend.ioctl(guest.kvm, abi.KVM_CREATE_VM)


@pytest.mark.parametrize("request_", sorted(set(SYSTEM) - NO_POINTER), ids=abi.ioctl_name)
@pytest.mark.parametrize("address", [0, 8, 0x7FFFFFFFF000, 1 << 63, (1 << 64) - 1])
def test_bad_pointer_system(guest: Guest, request_: int, address: int) -> None:
    assert error_of(guest.backend, guest.kvm, request_, address) == errno.EFAULT


@pytest.mark.parametrize("request_", sorted(set(VM) - NO_POINTER), ids=abi.ioctl_name)
@pytest.mark.parametrize("address", [0, 8, 0x7FFFFFFFF000, 1 << 63, (1 << 64) - 1])
def test_bad_pointer_vm(guest: Guest, request_: int, address: int) -> None:
    vm = empty_vm(guest)
    assert error_of(guest.backend, vm, request_, address) == errno.EFAULT
    guest.backend.close(vm)


@pytest.mark.parametrize("request_", sorted(set(VCPU) - NO_POINTER), ids=abi.ioctl_name)
@pytest.mark.parametrize("address", [0, 8, 0x7FFFFFFFF000, 1 << 63, (1 << 64) - 1])
def test_bad_pointer_vcpu(guest: Guest, request_: int, address: int) -> None:
    expected = 0 if (request_, address) == (abi.KVM_SET_SIGNAL_MASK, 0) else errno.EFAULT
    assert error_of(guest.backend, guest.vcpu, request_, address) == expected


@pytest.mark.parametrize("request_", [abi.KVM_GET_REGS, abi.KVM_GET_SREGS, abi.KVM_TRANSLATE, abi.KVM_GET_MSRS])
def test_read_only_and_crossing_memory(guest: Guest, request_: int) -> None:
    """A structure the kernel cannot write, and one whose end is not there."""
    import mmap

    writable, readonly = mmap.mmap(-1, 2 * PAGE), mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = ctypes.c_uint8.from_buffer(readonly)
    view.value = 1  # of KVM_GET_MSRS the number of entries; of none nothing is written
    libc.mprotect(ADDRESS(view), PAGE, mmap.PROT_READ)
    assert error_of(guest.backend, guest.vcpu, request_, ADDRESS(view)) == errno.EFAULT
    edge = ctypes.c_uint8.from_buffer(writable)
    libc.mprotect(ADDRESS(edge) + PAGE, PAGE, 0)
    assert error_of(guest.backend, guest.vcpu, request_, ADDRESS(edge) + PAGE - 4) == errno.EFAULT


def test_system_scalars(guest: Guest) -> None:
    backend, kvm = guest.backend, guest.kvm
    assert backend.ioctl(kvm, abi.KVM_GET_API_VERSION) == 12
    assert backend.ioctl(kvm, abi.KVM_GET_VCPU_MMAP_SIZE) == 12288
    for request in (abi.KVM_GET_API_VERSION, abi.KVM_GET_VCPU_MMAP_SIZE):
        assert error_of(backend, kvm, request, 1) == errno.EINVAL
    for kind in range(2, 40):
        assert error_of(backend, kvm, abi.KVM_CREATE_VM, kind) == errno.EINVAL
    assert error_of(backend, kvm, abi.KVM_CREATE_VM, 1 << 32) == errno.EINVAL


def test_capabilities(guest: Guest) -> None:
    backend = guest.backend
    for fd in (guest.kvm, guest.vm):
        assert backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_MEMORY_FAULT_INFO) == 1
        assert backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_NR_MEMSLOTS) == 32764
        assert backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_VM_TYPES) == 3
        assert backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, 9999) == 0
        assert backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, 1 << 40 | abi.KVM_CAP_USER_MEMORY) == 0
        assert 1 <= backend.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_NR_VCPUS) <= 256
    for absent in (
        abi.KVM_CAP_IRQCHIP,
        abi.KVM_CAP_COALESCED_MMIO,
        abi.KVM_CAP_SET_GUEST_DEBUG,
        abi.KVM_CAP_TSC_CONTROL,
        abi.KVM_CAP_ASYNC_PF,
    ):
        assert backend.ioctl(guest.kvm, abi.KVM_CHECK_EXTENSION, absent) == 0


OFFERED: dict[int, list[tuple[Mapping[int, object], int]]] = {
    # capability -> requests that must exist (on the file that has them) when it is offered, and must not when it is not
    abi.KVM_CAP_USER_MEMORY: [(VM, abi.KVM_SET_USER_MEMORY_REGION)],
    abi.KVM_CAP_USER_MEMORY2: [(VM, abi.KVM_SET_USER_MEMORY_REGION2)],
    abi.KVM_CAP_SET_TSS_ADDR: [(VM, abi.KVM_SET_TSS_ADDR)],
    abi.KVM_CAP_SET_IDENTITY_MAP_ADDR: [(VM, abi.KVM_SET_IDENTITY_MAP_ADDR)],
    abi.KVM_CAP_SET_BOOT_CPU_ID: [(VM, abi.KVM_SET_BOOT_CPU_ID)],
    abi.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: [(VM, abi.KVM_SET_NR_MMU_PAGES)],
    abi.KVM_CAP_CHECK_EXTENSION_VM: [(VM, abi.KVM_CHECK_EXTENSION)],
    abi.KVM_CAP_ENABLE_CAP_VM: [(VM, abi.KVM_ENABLE_CAP)],
    abi.KVM_CAP_VM_TSC_CONTROL: [(VM, abi.KVM_SET_TSC_KHZ)],
    abi.KVM_CAP_GET_TSC_KHZ: [(VM, abi.KVM_GET_TSC_KHZ), (VCPU, abi.KVM_GET_TSC_KHZ)],
    abi.KVM_CAP_IRQCHIP: [(VM, abi.KVM_CREATE_IRQCHIP), (VM, abi.KVM_IRQ_LINE), (VCPU, abi.KVM_GET_LAPIC)],
    abi.KVM_CAP_IRQFD: [(VM, abi.KVM_IRQFD)],
    abi.KVM_CAP_IOEVENTFD: [(VM, abi.KVM_IOEVENTFD)],
    abi.KVM_CAP_GUEST_MEMFD: [(VM, abi.KVM_CREATE_GUEST_MEMFD)],
    abi.KVM_CAP_MEMORY_ATTRIBUTES: [(VM, abi.KVM_SET_MEMORY_ATTRIBUTES)],
    abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: [(VM, abi.KVM_CLEAR_DIRTY_LOG)],
    abi.KVM_CAP_DIRTY_LOG_RING: [(VM, abi.KVM_RESET_DIRTY_RINGS)],
    abi.KVM_CAP_COALESCED_MMIO: [(VM, abi.KVM_REGISTER_COALESCED_MMIO)],
    abi.KVM_CAP_ADJUST_CLOCK: [(VM, abi.KVM_GET_CLOCK), (VM, abi.KVM_SET_CLOCK)],
    abi.KVM_CAP_EXT_CPUID: [(SYSTEM, abi.KVM_GET_SUPPORTED_CPUID), (VCPU, abi.KVM_SET_CPUID2)],
    abi.KVM_CAP_EXT_EMUL_CPUID: [(SYSTEM, abi.KVM_GET_EMULATED_CPUID)],
    abi.KVM_CAP_GET_MSR_FEATURES: [(SYSTEM, abi.KVM_GET_MSR_FEATURE_INDEX_LIST), (SYSTEM, abi.KVM_GET_MSRS)],
    abi.KVM_CAP_MP_STATE: [(VCPU, abi.KVM_GET_MP_STATE), (VCPU, abi.KVM_SET_MP_STATE)],
    abi.KVM_CAP_USER_NMI: [(VCPU, abi.KVM_NMI)],
    abi.KVM_CAP_VCPU_EVENTS: [(VCPU, abi.KVM_GET_VCPU_EVENTS), (VCPU, abi.KVM_SET_VCPU_EVENTS)],
    abi.KVM_CAP_DEBUGREGS: [(VCPU, abi.KVM_GET_DEBUGREGS), (VCPU, abi.KVM_SET_DEBUGREGS)],
    abi.KVM_CAP_ENABLE_CAP: [(VCPU, abi.KVM_ENABLE_CAP)],
    abi.KVM_CAP_XSAVE: [(VCPU, abi.KVM_GET_XSAVE), (VCPU, abi.KVM_SET_XSAVE)],
    abi.KVM_CAP_XSAVE2: [(VCPU, abi.KVM_GET_XSAVE2)],
    abi.KVM_CAP_XCRS: [(VCPU, abi.KVM_GET_XCRS), (VCPU, abi.KVM_SET_XCRS)],
    abi.KVM_CAP_SREGS2: [(VCPU, abi.KVM_GET_SREGS2), (VCPU, abi.KVM_SET_SREGS2)],
    abi.KVM_CAP_SET_GUEST_DEBUG: [(VCPU, abi.KVM_SET_GUEST_DEBUG)],
    abi.KVM_CAP_ONE_REG: [(VCPU, abi.KVM_GET_ONE_REG)],
    abi.KVM_CAP_PRE_FAULT_MEMORY: [(VCPU, abi.KVM_PRE_FAULT_MEMORY)],
    abi.KVM_CAP_BINARY_STATS_FD: [(VM, abi.KVM_GET_STATS_FD), (VCPU, abi.KVM_GET_STATS_FD)],
    abi.KVM_CAP_X86_SMM: [(VCPU, abi.KVM_SMI)],
    abi.KVM_CAP_NESTED_STATE: [(VCPU, abi.KVM_GET_NESTED_STATE)],
}


@pytest.mark.parametrize("capability", OFFERED, ids=abi.cap_name)
def test_capability_says_the_truth(capability: int) -> None:
    for handlers, request in OFFERED[capability]:
        assert (request in handlers) == bool(CAPABILITIES.get(capability, 0)), abi.ioctl_name(request)


def test_informational_capabilities_cannot_be_enabled(guest: Guest) -> None:
    for cap in (
        abi.KVM_CAP_MEMORY_FAULT_INFO,
        abi.KVM_CAP_USER_MEMORY2,
        abi.KVM_CAP_READONLY_MEM,
        abi.KVM_CAP_GUEST_MEMFD,
        abi.KVM_CAP_PRE_FAULT_MEMORY,
        9999,
    ):
        for flags, value in ((0, 0), (1, 0), (0, 1)):
            request = abi.kvm_enable_cap(cap=cap, flags=flags)
            request.args[0] = value
            for fd in (guest.vm, guest.vcpu, guest.kvm):
                assert error_of(guest.backend, fd, abi.KVM_ENABLE_CAP, ADDRESS(request)) == errno.EINVAL


def test_max_vcpu_id(guest: Guest) -> None:
    vm = empty_vm(guest)

    def limit(value: int, flags: int = 0) -> int:
        request = abi.kvm_enable_cap(cap=abi.KVM_CAP_MAX_VCPU_ID, flags=flags)
        request.args[0] = value
        return error_of(guest.backend, vm, abi.KVM_ENABLE_CAP, ADDRESS(request))

    assert guest.backend.ioctl(vm, abi.KVM_SET_BOOT_CPU_ID, 3) == 0
    assert limit(1025) == limit(8, flags=1) == limit(2) == errno.EINVAL
    assert limit(8) == limit(8) == 0
    assert limit(9) == errno.EINVAL
    assert error_of(guest.backend, vm, abi.KVM_SET_BOOT_CPU_ID, 9) == errno.EINVAL
    assert error_of(guest.backend, vm, abi.KVM_CREATE_VCPU, 8) == errno.EINVAL
    vcpu = guest.backend.ioctl(vm, abi.KVM_CREATE_VCPU, 7)
    guest.backend.close(vcpu)
    guest.backend.close(vm)


def test_create_vcpu(guest: Guest) -> None:
    assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 0) == errno.EEXIST
    assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 1024) == errno.EINVAL
    assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 1 << 32) == errno.EINVAL
    last = guest.backend.ioctl(guest.vm, abi.KVM_CREATE_VCPU, 1023)
    guest.backend.close(last)


def test_boot_cpu(guest: Guest) -> None:
    vm = empty_vm(guest)
    assert guest.backend.ioctl(vm, abi.KVM_SET_BOOT_CPU_ID, 1) == 0
    bases = []
    for number in (0, 1):
        vcpu = guest.backend.ioctl(vm, abi.KVM_CREATE_VCPU, number)
        sregs = abi.kvm_sregs()
        guest.backend.ioctl(vcpu, abi.KVM_GET_SREGS, ADDRESS(sregs))
        bases.append(sregs.apic_base)
        guest.backend.close(vcpu)
    assert bases == [0xFEE00800, 0xFEE00900]
    assert error_of(guest.backend, vm, abi.KVM_SET_BOOT_CPU_ID, 0) == errno.EBUSY
    guest.backend.close(vm)


def test_vm_scalars(guest: Guest) -> None:
    backend, vm = guest.backend, empty_vm(guest)
    assert error_of(backend, vm, abi.KVM_SET_TSS_ADDR, 0xFFFFD000) == 0
    assert error_of(backend, vm, abi.KVM_SET_TSS_ADDR, 0xFFFFD001) == errno.EINVAL
    assert error_of(backend, vm, abi.KVM_SET_NR_MMU_PAGES, 64) == 0
    assert error_of(backend, vm, abi.KVM_SET_NR_MMU_PAGES, 63) == errno.EINVAL
    address = ctypes.c_uint64(0xFFFBC000)
    assert error_of(backend, vm, abi.KVM_SET_IDENTITY_MAP_ADDR, ADDRESS(address)) == 0
    assert error_of(backend, guest.vm, abi.KVM_SET_IDENTITY_MAP_ADDR, 8) == errno.EINVAL  # vCPUs: before the pointer
    assert backend.ioctl(vm, abi.KVM_GET_TSC_KHZ) == 1_000_000
    assert backend.ioctl(vm, abi.KVM_SET_TSC_KHZ, 2_400_000) == 0
    vcpu = backend.ioctl(vm, abi.KVM_CREATE_VCPU)
    assert backend.ioctl(vm, abi.KVM_GET_TSC_KHZ) == backend.ioctl(vcpu, abi.KVM_GET_TSC_KHZ) == 2_400_000
    assert error_of(backend, vm, abi.KVM_SET_TSC_KHZ, 1_000_000) == errno.EINVAL
    assert backend.ioctl(vcpu, abi.KVM_SET_TSC_KHZ, 2_400_001) == 0
    assert backend.ioctl(vcpu, abi.KVM_SET_TSC_KHZ, 0) == 0
    assert error_of(backend, vcpu, abi.KVM_SET_TSC_KHZ, 1_000_000) == errno.EINVAL
    backend.close(vcpu)
    backend.close(vm)


@pytest.mark.parametrize("request_", [abi.KVM_GET_SUPPORTED_CPUID, abi.KVM_GET_EMULATED_CPUID], ids=abi.ioctl_name)
def test_cpuid_lists(guest: Guest, request_: int) -> None:
    table = (ctypes.c_uint8 * (8 + 40 * 300))()
    header = abi.kvm_cpuid2.from_buffer(table)
    for nent in (0, 1):
        header.nent = nent
        assert error_of(guest.backend, guest.kvm, request_, ADDRESS(table)) == errno.E2BIG
        assert header.nent == nent
    header.nent = 300
    assert guest.backend.ioctl(guest.kvm, request_, ADDRESS(table)) == 0
    exact = header.nent
    assert 1 < exact < 100
    assert guest.backend.ioctl(guest.kvm, request_, ADDRESS(table)) == 0
    table[8 + 39] = 1  # padding of the first entry
    expected = errno.EINVAL if request_ == abi.KVM_GET_EMULATED_CPUID else 0
    assert error_of(guest.backend, guest.kvm, request_, ADDRESS(table)) == expected


@pytest.mark.parametrize(
    ("request_", "indices"),
    [(abi.KVM_GET_MSR_INDEX_LIST, MSRS_TO_SAVE), (abi.KVM_GET_MSR_FEATURE_INDEX_LIST, tuple(FEATURE_MSRS))],
)
def test_msr_lists(guest: Guest, request_: int, indices: tuple[int, ...]) -> None:
    numbers = (ctypes.c_uint32 * 300)()
    assert error_of(guest.backend, guest.kvm, request_, ADDRESS(numbers)) == errno.E2BIG
    assert numbers[0] == len(indices)
    assert guest.backend.ioctl(guest.kvm, request_, ADDRESS(numbers)) == 0
    assert tuple(numbers[1 : 1 + numbers[0]]) == indices
    assert len(set(indices)) == len(indices)


def test_feature_msrs(guest: Guest) -> None:
    data = (ctypes.c_uint64 * 7)(3)  # kvm_msrs with three entries
    data[1], data[3], data[5] = 0x8B, 0x10, 0x8B
    assert guest.backend.ioctl(guest.kvm, abi.KVM_GET_MSRS, ADDRESS(data)) == 1  # 0x10 is none: it ends there
    assert data[2] == FEATURE_MSRS[0x8B] and data[6] == 0
    assert guest.backend.ioctl(guest.vcpu, abi.KVM_GET_MSRS, ADDRESS(data)) == 3
    assert data[6] == FEATURE_MSRS[0x8B]
    data[0] = 256
    assert error_of(guest.backend, guest.kvm, abi.KVM_GET_MSRS, ADDRESS(data)) == errno.E2BIG


PLAIN = Profile("plain", annotate_unresolved=False)


def test_profiles() -> None:
    assert list(PROFILES) == ["documented", "linux-7.3", "linux-6.12"]
    every = {"annotate_unresolved", "init_after_shutdown", "map_writable", "purge"}
    for profile in (*PROFILES.values(), *RESEARCH.values()):
        own = {field.name for field in fields(profile) if getattr(profile, field.name) != getattr(PLAIN, field.name)}
        assert set(profile.cites) == every | own - {"name", "cites"}
    assert [RESEARCH[name].memory_fault_valid(errno.EINTR, 39) for name in RESEARCH] == [False, True] + [False] * 4
    assert RESEARCH["any-errno"].memory_fault_valid(0, 39) is False
    small = Profile("small", annotate_unresolved=False, capabilities={abi.KVM_CAP_NR_MEMSLOTS: 8})
    backend = SoftBackend(small)
    kvm = backend.open()
    assert backend.ioctl(kvm, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_NR_MEMSLOTS) == 8
    backend.close(kvm)


def test_missing_engine(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="anykvm was installed without its engine"):
        library.load(str(tmp_path / "nothing.so"))
    (tmp_path / "wrong.so").write_text("")
    with pytest.raises(ImportError, match="does not fit this installation"):
        library.load(str(tmp_path / "wrong.so"))


def test_errors_name_the_ioctl_and_the_field(guest: Guest) -> None:
    region = abi.kvm_userspace_memory_region(slot=1, memory_size=100)
    with refused(errno.EINVAL, r"KVM_SET_USER_MEMORY_REGION: memory_size is not page aligned"):
        guest.backend.ioctl(guest.vm, abi.KVM_SET_USER_MEMORY_REGION, ADDRESS(region))
