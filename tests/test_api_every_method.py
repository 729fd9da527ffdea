"""Every public method is called somewhere; here those that nothing else needs, on every backend.

Where a KVM offers what a method is for, it works; else it fails with an errno that is known, and names the ioctl.
"""

from __future__ import annotations

import ctypes
import errno
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import anykvm
from anykvm import Backend, Kvm, Vcpu, Vm, abi
from anykvm.abi.limits import KVM_MIN_ALLOC_MMU_PAGES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def kvm(backend: Backend) -> Iterator[Kvm]:
    with anykvm.open(backend) as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    return vm.create_vcpu()


@pytest.fixture
def soft() -> Iterator[Vm]:
    """A VM of the soft backend, whose answers are known."""
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm:
        yield vm


class refused:
    """The block fails with one of these errnos and names the ioctl, or does not fail at all."""

    def __init__(self, ioctl: str, *codes: int) -> None:
        self.ioctl, self.codes = ioctl, codes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, OSError):
            return False
        assert error.errno in self.codes, error
        assert str(error.strerror).startswith(self.ioctl)
        return True


def test_every_public_method_is_called() -> None:
    folders = ("src", "tests", "bench", "examples", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    text = "".join(path.read_text() for path in files)
    for kind in (Kvm, Vm, Vcpu):
        for name, member in inspect.getmembers(kind):
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert re.search(rf"\.{name}\b", text), f"{kind.__name__}.{name} is called by nobody"


def test_get_emulated_cpuid(kvm: Kvm) -> None:
    if not kvm.check_extension(abi.KVM_CAP_EXT_EMUL_CPUID):
        pytest.skip("no KVM_CAP_EXT_EMUL_CPUID")
    leaves = {entry.function: entry for entry in kvm.get_emulated_cpuid()}
    assert leaves[1].ecx & 1 << 22  # MOVBE


def test_get_supported_hv_cpuid(kvm: Kvm) -> None:
    with refused("KVM_GET_SUPPORTED_HV_CPUID", errno.EINVAL):
        assert any(entry.function == 0x40000000 for entry in kvm.get_supported_hv_cpuid())


def test_set_boot_cpu_id(vm: Vm) -> None:
    if not vm.check_extension(abi.KVM_CAP_SET_BOOT_CPU_ID):
        pytest.skip("no KVM_CAP_SET_BOOT_CPU_ID")
    vm.set_boot_cpu_id(1)
    bsp = [vm.create_vcpu(number).get_sregs().apic_base >> 8 & 1 for number in (0, 1)]
    assert bsp == [0, 1]
    with pytest.raises(OSError, match=r"KVM_SET_BOOT_CPU_ID") as caught:
        vm.set_boot_cpu_id(0)
    assert caught.value.errno == errno.EBUSY


def test_set_nr_mmu_pages(vm: Vm) -> None:
    vm.set_nr_mmu_pages(KVM_MIN_ALLOC_MMU_PAGES)
    with pytest.raises(OSError, match=r"KVM_SET_NR_MMU_PAGES\(pages=63\).*fewer than 64") as caught:
        vm.set_nr_mmu_pages(KVM_MIN_ALLOC_MMU_PAGES - 1)
    assert caught.value.errno == errno.EINVAL


def test_set_tsc_khz_of_a_vm(soft: Vm) -> None:
    soft.set_tsc_khz(2_000_000)
    vcpu = soft.create_vcpu()
    assert vcpu.get_tsc_khz() == 2_000_000
    with pytest.raises(OSError, match="KVM_SET_TSC_KHZ.*vCPUs already") as caught:
        soft.set_tsc_khz(1_000_000)
    assert caught.value.errno == errno.EINVAL


def test_set_tsc_khz_of_a_vcpu(vcpu: Vcpu) -> None:
    khz = vcpu.get_tsc_khz()
    vcpu.set_tsc_khz(khz)
    assert vcpu.get_tsc_khz() == khz


def test_set_tsc_khz_without_scaling(soft: Vm) -> None:
    vcpu = soft.create_vcpu()
    with pytest.raises(OSError, match="KVM_SET_TSC_KHZ.*the VM's frequency is 1000000 kHz") as caught:
        vcpu.set_tsc_khz(3_000_000)
    assert caught.value.errno == errno.EINVAL


def test_x86_set_msr_filter(vm: Vm) -> None:
    with refused("KVM_X86_SET_MSR_FILTER", errno.ENOTTY):
        vm.x86_set_msr_filter(abi.kvm_msr_filter())  # none is denied


def test_device_attributes(vcpu: Vcpu) -> None:
    """KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET."""
    with refused("KVM_GET_DEVICE_ATTR", errno.ENXIO, errno.EINVAL, errno.ENOTTY):
        offset = vcpu.get_device_attr(0, 0)
        vcpu.set_device_attr(0, 0, offset)
        assert vcpu.get_device_attr(0, 0) == offset
    with refused("KVM_SET_DEVICE_ATTR", errno.ENXIO, errno.EINVAL, errno.ENOTTY):
        vcpu.set_device_attr(99, 99, 0)
        pytest.fail("an attribute that nobody has")


def test_nested_state(vm: Vm, vcpu: Vcpu) -> None:
    with refused("KVM_GET_NESTED_STATE", errno.EINVAL, errno.ENOTTY):
        state = vcpu.get_nested_state()
        vcpu.set_nested_state(state)
    with refused("KVM_SET_NESTED_STATE", errno.EINVAL, errno.ENOTTY, errno.EFAULT):
        vcpu.set_nested_state(b"\xff" * 128)
        pytest.fail("a state that cannot be")


def test_registers_by_id(vcpu: Vcpu) -> None:
    """x86 has them from 6.18 on, if at all."""
    codes = (errno.EINVAL, errno.ENOTTY, errno.ENOENT)
    with refused("KVM_GET_REG_LIST", *codes):
        assert isinstance(vcpu.get_reg_list(), list)
    with refused("KVM_GET_ONE_REG", *codes):
        vcpu.get_one_reg(0)
        pytest.fail("no register has this id")
    with refused("KVM_SET_ONE_REG", *codes):
        vcpu.set_one_reg(0, 1)
        pytest.fail("no register has this id")
    for size in (0, 3, 9, 512, -1):
        with pytest.raises(ValueError, match=f"size {size} is none of 1, 2, 4"):
            vcpu.get_one_reg(0, size)
    for value, size in ((-1, 8), (1 << 64, 8), (256, 1)):
        with pytest.raises(ValueError, match="is not a number of"):
            vcpu.set_one_reg(0, value, size)


def test_kvmclock_ctrl(vcpu: Vcpu) -> None:
    with refused("KVM_KVMCLOCK_CTRL", errno.EINVAL):  # the guest has no kvmclock
        vcpu.kvmclock_ctrl()


def test_local_apic(vcpu: Vcpu) -> None:
    """Without one in the kernel."""
    with refused("KVM_SET_VAPIC_ADDR", errno.EINVAL):
        vcpu.set_vapic_addr(0x1000)
    with refused("KVM_TPR_ACCESS_REPORTING", errno.EINVAL):
        vcpu.tpr_access_reporting(True)


def test_smi(vm: Vm, vcpu: Vcpu) -> None:
    with refused("KVM_SMI", errno.EINVAL, errno.ENOTTY):
        vcpu.smi()
        assert vcpu.get_vcpu_events().smi.pending


def test_machine_checks(vcpu: Vcpu) -> None:
    with refused("KVM_X86_SETUP_MCE", errno.EINVAL):
        vcpu.x86_setup_mce(10)  # ten banks
        mce = abi.kvm_x86_mce()
        ctypes.memset(ctypes.addressof(mce), 0, ctypes.sizeof(mce))
        mce.bank = 99
        with pytest.raises(OSError, match=r"KVM_X86_SET_MCE\(bank=99"):
            vcpu.x86_set_mce(mce)
    with refused("KVM_X86_SET_MCE", errno.EINVAL):
        vcpu.x86_set_mce(abi.kvm_x86_mce(bank=200))
        pytest.fail("a bank that nobody has")


def test_one_name_for_an_errno() -> None:
    from anykvm.abi import names
    from anykvm.conformance import outcome

    assert outcome.errno_name is names.errno_name
    assert [abi.errno_name(code) for code in (0, 11, 14, 35, 95, 133, 999)] == [
        *("0", "EAGAIN", "EFAULT", "EDEADLK", "EOPNOTSUPP", "EHWPOISON", "errno 999"),
    ]
