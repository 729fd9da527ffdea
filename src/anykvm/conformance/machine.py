"""Machine: a VM with one vCPU in 64-bit mode, laid out as ``layout`` says, and the steps a scenario takes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.reading import span
from anykvm.abi.structures import (
    kvm_cpuid_entry2,
    kvm_create_guest_memfd,
    kvm_memory_attributes,
    kvm_regs,
    kvm_run,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)
from anykvm.api.kvm import Kvm
from anykvm.api.kvm import open as open_kvm
from anykvm.api.vcpu import Vcpu
from anykvm.api.vm import Vm
from anykvm.backends.base import Backend
from anykvm.conformance import layout
from anykvm.conformance.host import Host, anonymous
from anykvm.conformance.observe import observe, poison
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.signals import Signals

_TSS_ADDR: Final = 0xFFFBD000
_MAX_FRAGMENTS: Final = 64
_TIMEOUT: Final = 2.0
_KEPT: Final = (c.KVM_EXIT_MMIO, c.KVM_EXIT_HYPERCALL, c.KVM_EXIT_X86_RDMSR, c.KVM_EXIT_X86_WRMSR)
_MMIO_DATA: Final = span(kvm_run, "mmio.data")


class Keep(Protocol):
    """Keeps a record of a step."""

    def __call__(self, step: str, **fields: Any) -> None:
        """Keep it."""


class Machine:
    """A VM and a vCPU of a scenario. What fails is given as an ``Outcome``, not raised, except when making it."""

    def __init__(
        self,
        backend: Backend,
        signals: Signals,
        keep: Keep,
        type: int = 0,
        irqchip: bool = False,
        prepare: Callable[[Vm], None] | None = None,
        *,
        cpuid: list[kvm_cpuid_entry2] | None = None,
    ) -> None:
        """Make it; see ``Lab.machine``. ``cpuid``: the vCPU's, default all that is supported."""
        self._signals = signals
        self._keep = keep
        self.kvm: Kvm = open_kvm(backend)
        self.vm = self.kvm.create_vm(type)
        attempt(lambda: self.vm.set_tss_addr(_TSS_ADDR))  # Intel's KVM wants it; elsewhere it may not be there
        if irqchip:
            self.vm.create_irqchip()
        if prepare:
            prepare(self.vm)
        self.memory = anonymous(layout.MEMORY_SIZE)
        self.slot(0, 0, layout.MEMORY_SIZE, self.memory).check("slot 0")
        layout.build(self.memory)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.kvm.get_supported_cpuid() if cpuid is None else cpuid)
        self.vcpu.set_sregs(layout.long_mode(self.vcpu.get_sregs()))

    @property
    def run_page(self) -> kvm_run:
        """The vCPU's kvm_run page."""
        return self.vcpu.kvm_run

    def slot(self, slot: int, gpa: int, size: int, host: Host | int, flags: int = 0) -> Outcome:
        """KVM_SET_USER_MEMORY_REGION; ``host`` is memory or an address."""
        region = kvm_userspace_memory_region(slot, flags, gpa, size, _address(host))
        return attempt(lambda: self.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION, region))

    def slot2(
        self, slot: int, gpa: int, size: int, host: Host | int, flags: int = 0, gmem: int = 0, offset: int = 0
    ) -> Outcome:
        """KVM_SET_USER_MEMORY_REGION2, with a guest_memfd and an offset into it."""
        region = kvm_userspace_memory_region2(slot, flags, gpa, size, _address(host), offset)
        region.guest_memfd = gmem & 0xFFFFFFFF
        return attempt(lambda: self.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION2, region))

    def delete_slot(self, slot: int) -> Outcome:
        """Delete a slot."""
        return self.slot(slot, 0, 0, 0)

    def guest_memfd(self, size: int, flags: int = 0) -> Outcome:
        """KVM_CREATE_GUEST_MEMFD; the result is the descriptor."""
        request = kvm_create_guest_memfd(size, flags)
        return attempt(lambda: self.vm.ioctl(n.KVM_CREATE_GUEST_MEMFD, request))

    def attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> Outcome:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        request = kvm_memory_attributes(address, size, attributes, flags)
        return attempt(lambda: self.vm.ioctl(n.KVM_SET_MEMORY_ATTRIBUTES, request))

    def drain(self) -> None:
        """Finish the I/O of an exit that the scenario leaves behind, so that the vCPU can be used for something else.

        immediate_exit completes what is pending without entering the guest; an access may have several parts.
        """
        run = self.run_page
        saved = run.immediate_exit, run.kvm_valid_regs, run.kvm_dirty_regs
        run.immediate_exit, run.kvm_valid_regs, run.kvm_dirty_regs = 1, 0, 0
        for _ in range(_MAX_FRAGMENTS):
            if attempt(lambda: self.vcpu.ioctl(n.KVM_RUN)).failed:
                break
        run.immediate_exit, run.kvm_valid_regs, run.kvm_dirty_regs = saved
        run.exit_reason = 0

    def registers(self, rip: int = layout.CODE, **values: int) -> None:
        """KVM_SET_REGS: these, RBX, a stack, and 0 in the others."""
        self.vcpu.set_regs(kvm_regs(**{"rip": rip, "rsp": layout.STACK, "rflags": 2, "rbx": layout.RBX, **values}))

    def change(self, **values: int) -> None:
        """KVM_GET_REGS, change some, KVM_SET_REGS."""
        registers = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(registers, name, value)
        self.vcpu.set_regs(registers)

    def at(self, code: bytes, rdi: int = 0, **values: int) -> None:
        """Get ready to run ``code`` with RDI and other registers set; what was pending is finished first."""
        self.drain()
        self.memory.put(layout.CODE, code)
        self.registers(rdi=rdi, **values)

    def string(self, code: bytes, rdi: int, rsi: int, rcx: int) -> None:
        """Get ready to run a string instruction: ``at`` with its three registers, and 0x41 in AL to store."""
        self.at(code, rdi, rsi=rsi, rcx=rcx, rax=0x41)

    def run(self, step: str, *, timeout: float = _TIMEOUT, poisoned: bool = True, **seen: Any) -> Outcome:
        """KVM_RUN after poisoning the page, and record it; ``seen`` goes into the record too."""
        return run_vcpu(self.vcpu, self._signals, self._keep, step, timeout, poisoned, seen)

    def run_as_is(self, step: str, arg: int = 0) -> Outcome:
        """KVM_RUN with the page left as the last one left it, and record it."""
        outcome = attempt(lambda: self.vcpu.ioctl(n.KVM_RUN, arg))
        self._keep(step, **observe(self.vcpu, outcome), **self._signals.fields())
        return outcome

    def answer_mmio(self, value: int) -> None:
        """Give an MMIO read its 8 bytes."""
        self.vcpu.io_page[_MMIO_DATA] = value.to_bytes(8, "little")

    def pio_data(self, length: int) -> memoryview:
        """Give the data of a port exit."""
        offset = self.run_page.io.data_offset
        return self.vcpu.io_page[offset : offset + length]


def run_vcpu(
    vcpu: Vcpu, signals: Signals, keep: Keep, step: str, timeout: float, poisoned: bool, seen: dict[str, Any]
) -> Outcome:
    """KVM_RUN of any vCPU, as ``Machine.run``."""
    run = vcpu.kvm_run
    if poisoned:
        # After MMIO and hypercall exits the union carries the answer, so it stays.
        poison(vcpu, keep_union=run.exit_reason in _KEPT)
    else:
        flags = run.flags
        poison(vcpu, keep_union=True)
        run.flags = flags
    signals.start(timeout)
    outcome = attempt(lambda: vcpu.ioctl(n.KVM_RUN))
    signals.stop()
    keep(step, **observe(vcpu, outcome), **signals.fields(), **seen)
    return outcome


def capability(check: Callable[[int], int], number: int) -> int:
    """KVM_CHECK_EXTENSION, -1 where it fails."""
    return attempt(lambda: check(number)).ret


def _address(host: Host | int) -> int:
    return host if isinstance(host, int) else host.address
