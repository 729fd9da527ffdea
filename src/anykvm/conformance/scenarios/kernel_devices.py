"""Accesses that end in the kernel without an exit, and reports that an interrupt controller makes."""

from __future__ import annotations

import os
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import (
    kvm_coalesced_mmio_zone,
    kvm_ioeventfd,
    kvm_irq_routing_entry,
    kvm_tpr_access_ctl,
)
from anykvm.api.vm import Vm
from anykvm.conformance import guest_code as code
from anykvm.conformance.layout import HANDLERS, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "kernel_devices"
_RING: Final = 2 * 4096
_TPR: Final = bytes.fromhex("c70720000000e610f4")  # mov dword ptr [rdi], 0x20; out 0x10, al; hlt
_TPR_GPA: Final = 0xFEE00080
_APIC_GPA: Final = 0xFEE00000
_GSI: Final = 5
_VECTOR: Final = 0x40
_LEVEL: Final = 1 << 15 | 1 << 14
_ENABLE_APIC: Final = bytes.fromhex(
    "b8f000e0fec700ff010000e610fb90ebfe"
)  # mov eax, 0xfee000f0; mov dword ptr [rax], 0x1ff; out 0x10, al; sti; nop; jmp .
_EOI: Final = bytes.fromhex(
    "b8b000e0fec70000000000e612f4"
)  # mov eax, 0xfee000b0; mov dword ptr [rax], 0; out 0x12, al; hlt


@scenario("coalesced_mmio", area=AREA, needs=("coalesced_io",))
def coalesced_mmio(lab: Lab) -> None:
    """Writes to a registered zone are collected in the vCPU's third page; what is beside it makes an exit."""
    m = lab.machine()
    lab.note("cap", page=m.vm.check_extension(c.KVM_CAP_COALESCED_MMIO))
    zone = kvm_coalesced_mmio_zone(addr=TEST, size=16)
    registered = lab.ioctl("register", m.vm, n.KVM_REGISTER_COALESCED_MMIO, zone)
    m.at(code.WRITE8, TEST + 8)
    m.run("inside")
    if registered.failed:
        return
    ring = m.vcpu.io_page[_RING : _RING + 32]
    lab.note("ring", head=hex(ring[0]), tail=hex(ring[4]), length=hex(ring[16]), data=bytes(ring[24:32]).hex())
    m.at(code.WRITE8, TEST + 12)
    m.run("crossing_the_end")
    m.at(code.READ8, TEST)
    m.run("a_read")
    lab.ioctl("unregister", m.vm, n.KVM_UNREGISTER_COALESCED_MMIO, zone)
    m.at(code.WRITE8, TEST + 8)
    m.run("unregistered")


@scenario("ioeventfd", area=AREA, needs=("ioeventfd",))
def ioeventfd(lab: Lab) -> None:
    """A write to a registered address signals an eventfd instead of an exit; length and value must match."""
    m = lab.machine()
    event = os.eventfd(0, os.EFD_NONBLOCK)
    request = kvm_ioeventfd(addr=TEST, len=8, fd=event)
    made = lab.ioctl("assign", m.vm, n.KVM_IOEVENTFD, request)
    lab.ioctl("assign_again", m.vm, n.KVM_IOEVENTFD, request)
    for length in (3, 16):
        lab.ioctl("length", m.vm, n.KVM_IOEVENTFD, kvm_ioeventfd(addr=TEST + 64, len=length, fd=event), length=length)
    lab.ioctl("flags", m.vm, n.KVM_IOEVENTFD, kvm_ioeventfd(addr=TEST + 64, len=8, fd=event, flags=1 << 30))
    m.at(code.WRITE8, TEST)
    m.run("write")
    lab.step("signalled", attempt(os.eventfd_read, event))
    if made.failed:
        return
    m.at(code.WRITE8, TEST + 4)
    m.run("beside")
    request.flags = c.KVM_IOEVENTFD_FLAG_DEASSIGN
    lab.ioctl("deassign", m.vm, n.KVM_IOEVENTFD, request)
    m.at(code.WRITE8, TEST)
    m.run("deassigned")


@scenario("tpr_access", area=AREA, needs=("irqchip",))
def tpr_access(lab: Lab) -> None:
    """KVM_TPR_ACCESS_REPORTING: an access to the APIC's task priority is an exit (row 24)."""
    m = lab.irqchip_machine()
    if m is None:
        return
    lab.ioctl("enable", m.vcpu, n.KVM_TPR_ACCESS_REPORTING, kvm_tpr_access_ctl(enabled=1))
    m.at(_TPR, _TPR_GPA)
    m.run("write")
    access = m.run_page.tpr_access
    lab.note("access", rip=hex(access.rip), is_write=access.is_write)
    m.run("goes_on")


def _split(vm: Vm) -> None:
    vm.enable_cap(c.KVM_CAP_SPLIT_IRQCHIP, 24)
    route = kvm_irq_routing_entry(gsi=_GSI, type=c.KVM_IRQ_ROUTING_MSI)
    route.u.msi.address_lo, route.u.msi.data = _APIC_GPA, _LEVEL | _VECTOR
    vm.set_gsi_routing([route])


@scenario("ioapic_eoi", area=AREA, needs=("irqchip",))
def ioapic_eoi(lab: Lab) -> None:
    """With the I/O APIC in user space the end of a level interrupt is an exit that names its vector (row 24)."""
    try:
        m = lab.machine(prepare=_split)
    except OSError as error:
        lab.step("split_irqchip", Outcome(-1, error.errno or 0))
        return
    m.memory.put(HANDLERS + 16 * _VECTOR, _EOI)
    m.at(_ENABLE_APIC)
    m.run("enable")
    lab.step("SIGNAL_MSI", attempt(_signalled, m))
    m.run("eoi")
    lab.note("vector", vector=hex(m.run_page.eoi.vector))
    m.run("goes_on")


def _signalled(m: Machine) -> None:
    """KVM_SIGNAL_MSI, whose result is how many vCPUs got it."""
    m.vm.signal_msi(_APIC_GPA, _LEVEL | _VECTOR)
