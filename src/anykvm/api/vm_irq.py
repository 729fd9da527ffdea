"""Interrupts and in-kernel devices of a VM."""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence

from anykvm.abi import ioctls as n
from anykvm.abi import structures as s
from anykvm.api.flexible import flexible, tail
from anykvm.api.handle import Handle


class VmIrq(Handle):
    """The interrupt and device ioctls of ``Vm``. Most need an in-kernel interrupt controller: ENXIO without."""

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, I/O APIC and local APICs in the kernel.

        Raises OSError: EEXIST the second time, EINVAL once a vCPU exists.
        """
        self._call(n.KVM_CREATE_IRQCHIP, why=_why_irqchip)

    def get_irqchip(self, chip_id: int) -> s.kvm_irqchip:
        """KVM_GET_IRQCHIP of a KVM_IRQCHIP_*. Raises OSError: ENXIO, EINVAL."""
        chip = s.kvm_irqchip(chip_id=chip_id)
        self._call(n.KVM_GET_IRQCHIP, chip, {"chip_id": chip_id}, _why_irqchip)
        return chip

    def set_irqchip(self, chip: s.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP. Raises OSError: ENXIO, EINVAL."""
        self._call(n.KVM_SET_IRQCHIP, chip, {"chip_id": chip.chip_id}, _why_irqchip)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2: an i8254. Raises OSError: EEXIST; ENOENT without an in-kernel irqchip."""
        self._call(n.KVM_CREATE_PIT2, s.kvm_pit_config(flags=flags), {"flags": flags})

    def get_pit2(self) -> s.kvm_pit_state2:
        """KVM_GET_PIT2. Raises OSError: ENXIO without a PIT."""
        return self._get(n.KVM_GET_PIT2, s.kvm_pit_state2)

    def set_pit2(self, state: s.kvm_pit_state2) -> None:
        """KVM_SET_PIT2. Raises OSError: ENXIO without a PIT."""
        self._call(n.KVM_SET_PIT2, state)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE: set a GSI's level. Raises OSError: ENXIO without an in-kernel irqchip."""
        self._call(n.KVM_IRQ_LINE, s.kvm_irq_level(irq=irq, level=level), {"irq": irq, "level": level}, _why_irqchip)

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as ``irq_line``; returns to how many CPUs it went, 0 if merged, negative if masked."""
        line = s.kvm_irq_level(irq=irq, level=level)
        self._call(n.KVM_IRQ_LINE_STATUS, line, {"irq": irq, "level": level}, _why_irqchip)
        return s.S32(line.irq).value  # the kernel puts the status over irq, a union of the two

    def set_gsi_routing(self, entries: Sequence[s.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replace the routing table. Raises OSError: EINVAL."""
        buffer, header = flexible(s.kvm_irq_routing, s.kvm_irq_routing_entry, len(entries))
        header.nr = len(entries)
        tail(buffer, header, s.kvm_irq_routing_entry, len(entries))[:] = list(entries)
        self._call(n.KVM_SET_GSI_ROUTING, buffer, {"nr": len(entries)})

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD: signal ``gsi`` when eventfd ``fd`` is written.

        ``flags`` is KVM_IRQFD_FLAG_DEASSIGN, _RESAMPLE. Raises OSError: EINVAL, EBADF, EBUSY.
        """
        what = s.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd)
        self._call(n.KVM_IRQFD, what, {"fd": fd, "gsi": gsi, "flags": flags})

    def ioeventfd(self, addr: int, len: int, fd: int, flags: int = 0, datamatch: int = 0) -> None:
        """KVM_IOEVENTFD: write eventfd ``fd`` when the guest writes ``addr``, instead of an exit.

        ``flags`` is KVM_IOEVENTFD_FLAG_*. Raises OSError: EINVAL, EBADF, EEXIST; ENOENT to deassign what is not there.
        """
        what = s.kvm_ioeventfd(addr=addr, len=len, fd=fd, flags=flags, datamatch=datamatch)
        self._call(n.KVM_IOEVENTFD, what, {"addr": addr, "len": len, "fd": fd, "flags": flags})

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI: returns > 0 if delivered, 0 if the guest blocked it.

        Raises OSError: EINVAL without an in-kernel irqchip or for unknown flags.
        """
        message = s.kvm_msi(
            address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data, flags=flags, devid=devid
        )
        return self._call(n.KVM_SIGNAL_MSI, message, {"address": address, "data": data})

    def create_device(self, type: int, flags: int = 0) -> int:
        """KVM_CREATE_DEVICE: returns the device's descriptor; the caller closes it.

        ``flags`` is KVM_CREATE_DEVICE_TEST or 0. Raises OSError: ENODEV for an unknown type, EEXIST.
        """
        device = s.kvm_create_device(type=type, flags=flags)
        self._call(n.KVM_CREATE_DEVICE, device, {"type": type, "flags": flags})
        return device.fd

    def reinject_control(self, pit_reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: whether the PIT makes up for lost ticks. Raises OSError: ENXIO."""
        self._call(n.KVM_REINJECT_CONTROL, s.kvm_reinject_control(pit_reinject=int(pit_reinject)))


def _why_irqchip(errno: int) -> str | None:
    return {
        _errno.ENXIO: "there is no in-kernel interrupt controller; call create_irqchip before create_vcpu",
        _errno.EEXIST: "there is one already",
        _errno.EINVAL: "a vCPU exists already, or a field is out of range",
    }.get(errno)
