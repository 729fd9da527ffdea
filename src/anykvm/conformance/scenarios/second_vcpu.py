"""An application processor: a second vCPU that waits for INIT and SIPI before it runs."""

from __future__ import annotations

import threading
import time
from typing import Any

from anykvm.abi.ioctls import KVM_RUN
from anykvm.api.vcpu import Vcpu
from anykvm.conformance import guest_code as code
from anykvm.conformance.machine import Machine, run_vcpu
from anykvm.conformance.observe import observe, poison
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "second_vcpu"
_MSI_TO_APIC_1 = 0xFEE01000
_INIT = 0x500
_SIPI = 0x620
_SIPI_CODE = 0x20000
"""Where vector 0x20 starts a processor."""
_SETTLE = 0.2
_JOIN = 0.5


@scenario("ap", area=AREA, needs=("irqchip", "smp"))
def ap(lab: Lab) -> None:
    """Uninitialized, it sleeps until a signal, or is woken with EAGAIN by INIT; SIPI then starts it."""
    m = lab.irqchip_machine()
    if m is None:
        return
    second = m.vm.create_vcpu(1)
    second.set_cpuid2(m.kvm.get_supported_cpuid())
    second.set_lapic(second.get_lapic())  # puts this vCPU into KVM's map of APICs
    lab.note("initial_state", mp_state=second.get_mp_state())
    _uninitialized(lab, second)
    run = _Background(second)
    time.sleep(_SETTLE)
    lab.step("SIGNAL_MSI_INIT", lambda: m.vm.signal_msi(_MSI_TO_APIC_1, _INIT))
    if run.join(_JOIN):
        _observe(lab, second, run, "run_woken_by_INIT")
        lab.note("state_after_INIT", mp_state=second.get_mp_state())
        run = _Background(second)
        time.sleep(_SETTLE)
    m.memory.put(_SIPI_CODE, code.TARGET)
    lab.step("SIGNAL_MSI_SIPI_vec20", lambda: m.vm.signal_msi(_MSI_TO_APIC_1, _SIPI))
    kicked: dict[str, Any] = {}
    if not run.join(_JOIN):
        second.immediate_exit = True
        kicked["needed_kick"] = 1
    _observe(lab, second, run, "run_after_SIPI", **kicked)
    lab.note("state_after_SIPI", mp_state=second.get_mp_state())
    _halt(m)


def _uninitialized(lab: Lab, second: Vcpu) -> None:
    run = second.kvm_run
    run_vcpu(second, lab.signals, lab.record, "uninitialized_run_alarm500ms", 0.5, True, {})
    run.immediate_exit = 1
    run_vcpu(second, lab.signals, lab.record, "uninitialized_immediate_exit", 0.5, True, {})
    run.kvm_valid_regs = 1 << 20
    run_vcpu(second, lab.signals, lab.record, "uninitialized_bad_valid_regs_ie", 0.5, True, {})
    run.kvm_valid_regs = 0
    run.immediate_exit = 0


def _halt(m: Machine) -> None:
    m.at(code.HALT)
    m.run("bsp_hlt_irqchip_alarm500ms", timeout=0.5)


def _observe(lab: Lab, vcpu: Vcpu, run: _Background, step: str, **seen: Any) -> None:
    lab.signals.clear()
    lab.record(step, **observe(vcpu, run.outcome), **seen)


class _Background:
    """KVM_RUN in another thread."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.outcome = Outcome(-1, 0)
        flags = vcpu.kvm_run.flags
        poison(vcpu)
        vcpu.kvm_run.flags = flags
        self._vcpu = vcpu
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.outcome = attempt(lambda: self._vcpu.ioctl(KVM_RUN))

    def join(self, seconds: float) -> bool:
        """Wait; returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()
