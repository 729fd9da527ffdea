"""The less common ioctls, each through its method, on every backend that offers its capability."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import Backend, GuestMemory, Hlt, Io, Vm, abi


@pytest.fixture
def vm(backend: Backend) -> Iterator[Vm]:
    """A VM without memory."""
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm:
        yield vm


def need(vm: Vm, *capabilities: int) -> None:
    """Skip unless this KVM has the capabilities."""
    for capability in capabilities:
        if not vm.check_extension(capability):
            pytest.skip(f"{vm.backend.name} has no {abi.cap_name(capability)}")


def test_dirty_log(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    with GuestMemory(70 * 4096) as memory:
        memory[0:5] = bytes.fromhex("a20020 f4 90")  # mov [0x2000],al; hlt
        slot = vm.map(memory, 0, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(0)
        vm.get_dirty_log(slot)
        assert vcpu.run() == Hlt()
        bitmap = vm.get_dirty_log(slot)
        assert len(bitmap) == 16
        assert bitmap[0] & 4
        with pytest.raises(OSError, match=r"KVM_CLEAR_DIRTY_LOG\(slot=0, first_page=1, num_pages=64\)") as caught:
            vm.clear_dirty_log(slot, 1, 64, bytes(8))
        assert caught.value.errno == errno.EINVAL
        vm.clear_dirty_log(slot, 64, 6, b"\xff")
        with pytest.raises(OSError, match="the slot does not exist or has no KVM_MEM_LOG_DIRTY_PAGES") as caught:
            vm.get_dirty_log(9, pages=64)
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(OSError, match="KVM_RESET_DIRTY_RINGS") as caught:
            vm.reset_dirty_rings()
        assert caught.value.errno == errno.EINVAL


def test_guest_memfd(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_GUEST_MEMFD)
    for size in (0, 100):
        with pytest.raises(OSError, match="size is 0 or not page aligned") as caught:
            vm.create_guest_memfd(size)
        assert caught.value.errno == errno.EINVAL
    fd = vm.create_guest_memfd(8192)
    try:
        assert os.fstat(fd).st_size == 8192
        with pytest.raises(OSError, match="guest_memfd") as caught, GuestMemory(16384) as memory:
            vm.set_user_memory_region2(0, 0, 16384, memory.address, abi.KVM_MEM_GUEST_MEMFD, fd, 0)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_memory_attributes_are_checked(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_USER_MEMORY2)
    try:
        vm.set_memory_attributes(0, 4096, 0)
    except OSError as error:
        assert error.errno == errno.ENOTTY  # built without them
        return
    for address, size, text in ((1, 4096, "address is not page aligned"), (0, 0, "size is 0")):
        with pytest.raises(OSError, match=text) as caught:
            vm.set_memory_attributes(address, size, 0)
        assert caught.value.errno == errno.EINVAL


def test_vm_addresses_clock_and_tsc(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFFFBC000)
    vm.set_tss_addr(0xFFFBD000)
    need(vm, abi.KVM_CAP_ADJUST_CLOCK, abi.KVM_CAP_GET_TSC_KHZ)
    clock = vm.get_clock()
    clock.flags = 0
    vm.set_clock(clock)
    vcpu = vm.create_vcpu()
    assert vcpu.get_tsc_khz() > 0
    with pytest.raises(OSError, match="KVM_SET_IDENTITY_MAP_ADDR") as caught:
        vm.set_identity_map_addr(0xFFFBC000)
    assert caught.value.errno == errno.EINVAL


def test_user_space_interrupts(vm: Vm) -> None:
    with GuestMemory(0x10000) as memory:
        vm.map(memory, 0)
        memory[0x1000:0x1003] = bytes.fromhex("fb f4 f4")  # sti; hlt
        memory[0x2000:0x2003] = bytes.fromhex("e6e9 f4")  # out 0xe9,al; hlt
        memory[4 * 0x21 : 4 * 0x21 + 4] = bytes.fromhex("00200000")  # vector 0x21 -> 0:0x2000
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(0x1000)
        regs = vcpu.get_regs()
        regs.rsp = 0x8000
        vcpu.set_regs(regs)
        with pytest.raises(OSError, match=r"KVM_INTERRUPT\(irq=256\): irq is above 255") as caught:
            vcpu.interrupt(256)
        assert caught.value.errno == errno.EINVAL
        assert vcpu.run() == Hlt()
        assert vcpu.kvm_run.if_flag == 1
        vcpu.interrupt(0x21)
        assert vcpu.run() == Io(Io.OUT, 0xE9, 1, 1, b"\0")


def test_vcpu_state_calls(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_VCPU_EVENTS, abi.KVM_CAP_DEBUGREGS, abi.KVM_CAP_XSAVE, abi.KVM_CAP_XCRS)
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid2(vm.kvm.get_supported_cpuid())
    vcpu.set_vcpu_events(vcpu.get_vcpu_events())
    debugregs = vcpu.get_debugregs()
    debugregs.db[0] = 0x1234
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[0] == 0x1234
    xsave = vcpu.get_xsave()
    vcpu.set_xsave(xsave)
    if vm.check_extension(abi.KVM_CAP_XSAVE2):
        vcpu.set_xsave(vcpu.get_xsave2())
    vcpu.set_xcrs(vcpu.get_xcrs())
    if vm.check_extension(abi.KVM_CAP_SREGS2):
        vcpu.set_sregs2(vcpu.get_sregs2())
    if vm.check_extension(abi.KVM_CAP_SET_GUEST_DEBUG):
        vcpu.set_guest_debug(abi.kvm_guest_debug(control=0))
    if vm.check_extension(abi.KVM_CAP_BINARY_STATS_FD):
        for handle in (vm, vcpu):
            os.close(handle.get_stats_fd())
    if vm.check_extension(abi.KVM_CAP_VCPU_ATTRIBUTES):
        assert not vcpu.has_device_attr(99, 99)


def test_pre_fault_memory(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_PRE_FAULT_MEMORY)
    with GuestMemory(0x4000) as memory:
        vm.map(memory, 0)
        vcpu = vm.create_vcpu()
        assert vcpu.pre_fault_memory(0, 0x4000).size == 0
        assert vcpu.pre_fault_memory(0x3000, 0x4000).size == 0x3000
        with pytest.raises(OSError, match="no slot at gpa") as caught:
            vcpu.pre_fault_memory(0x4000, 0x1000)
        assert caught.value.errno == errno.ENOENT


def test_irqchip_and_devices(vm: Vm) -> None:
    need(vm, abi.KVM_CAP_IRQCHIP, abi.KVM_CAP_PIT2)
    with pytest.raises(OSError, match="KVM_IRQ_LINE.*call create_irqchip before") as caught:
        vm.irq_line(4, 1)
    assert caught.value.errno == errno.ENXIO
    vm.create_irqchip()
    with pytest.raises(OSError, match="KVM_CREATE_IRQCHIP: there is one already"):
        vm.create_irqchip()
    vm.create_pit2()
    vm.set_pit2(vm.get_pit2())
    vm.reinject_control(True)
    chip = vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    assert chip.chip.ioapic.base_address == 0xFEC00000
    vm.set_irqchip(chip)
    vm.irq_line(4, 1)
    assert isinstance(vm.irq_line_status(4, 0), int)
    route = abi.kvm_irq_routing_entry(gsi=30, type=abi.KVM_IRQ_ROUTING_MSI)
    route.u.msi.address_lo, route.u.msi.data = 0xFEE00000, 0x30
    vm.set_gsi_routing([route])
    vcpu = vm.create_vcpu()
    assert vm.signal_msi(0xFEE00000, 0x30) >= 0
    lapic = vcpu.get_lapic()
    assert ctypes.sizeof(lapic) == 1024
    vcpu.set_lapic(lapic)
    vcpu.set_mp_state(abi.KVM_MP_STATE_HALTED)
    assert vcpu.get_mp_state() == abi.KVM_MP_STATE_HALTED
    event = os.eventfd(0)
    try:
        vm.irqfd(event, 30)
        vm.irqfd(event, 30, abi.KVM_IRQFD_FLAG_DEASSIGN)
        vm.ioeventfd(0x1000, 4, event)
        with pytest.raises(OSError, match=r"KVM_IOEVENTFD\(addr=0x1000") as caught:
            vm.ioeventfd(0x1000, 4, event)
        assert caught.value.errno == errno.EEXIST
        vm.ioeventfd(0x1000, 4, event, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
    finally:
        os.close(event)
    vm.register_coalesced_mmio(0xA0000, 0x1000)
    vm.unregister_coalesced_mmio(0xA0000, 0x1000)
    os.close(vm.create_device(abi.KVM_DEV_TYPE_VFIO))


def test_feature_msrs_and_lists(vm: Vm) -> None:
    kvm = vm.kvm
    features = kvm.get_msr_feature_index_list()
    assert set(kvm.get_msrs(features)) <= set(features)
    with pytest.raises(ValueError, match="at most four arguments"):
        vm.enable_cap(abi.KVM_CAP_HLT, 1, 2, 3, 4, 5)
    vcpu = vm.create_vcpu()
    with pytest.raises(OSError, match=r"KVM_SET_CPUID2\(nent=300\): more than 256 entries") as caught:
        vcpu.set_cpuid2([abi.kvm_cpuid_entry2(function=i) for i in range(300)])
    assert caught.value.errno == errno.E2BIG
