"""How KVM_RUN fails on demand: before it does anything, or where a guest's access would fail."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NoReturn

from anykvm.abi.constants import KVM_EXIT_MEMORY_FAULT
from anykvm.abi.ioctls import KVM_RUN
from anykvm.abi.structures import kvm_run
from anykvm.layers.inject.rule import Rule
from anykvm.layers.shadow import ShadowVcpu

Ioctl = Callable[[int, int, int], int]


class Later(Exception):
    """KVM_RUN ended before it came to where it was to fail: with an exit, or an error of its own."""

    def __init__(self, error: OSError | None) -> None:
        """``error``: None for an exit."""
        super().__init__()
        self.error = error

    def answer(self) -> int:
        """Give what KVM_RUN gave. Raises its error."""
        if self.error is not None:
            raise self.error from None
        return 0


def fail_run(rule: Rule, ioctl: Ioctl, fd: int, vcpu: ShadowVcpu | None) -> None:
    """Do what KVM_RUN does before it fails as ``rule`` says, and leave kvm_run as it would be.

    Late: the last exit's instruction is completed (ABI.md 7.2, S4), exit_reason is reset (S7), and the guest executes
    nothing, as if its first access had failed. The completion is had by a KVM_RUN with immediate_exit. Raises Later.
    """
    page = None if vcpu is None or not vcpu.page else vcpu.run
    if rule.when == "late":
        if page is None:
            _run(ioctl, fd)
        else:
            _complete(page, ioctl, fd)
    if page is None:
        return
    if rule.exit_reason >= 0:
        page.exit_reason = rule.exit_reason
    if rule.exit_reason == KVM_EXIT_MEMORY_FAULT and rule.memory_fault >= 0:
        page.memory_fault.flags = rule.flags
        page.memory_fault.gpa = rule.memory_fault
        page.memory_fault.size = rule.size


def _run(ioctl: Ioctl, fd: int) -> NoReturn:
    """Nothing is known of the vCPU: let it run. Raises Later."""
    try:
        ioctl(fd, KVM_RUN, 0)
    except OSError as error:
        raise Later(error) from None
    raise Later(None)


def _complete(page: kvm_run, ioctl: Ioctl, fd: int) -> None:
    """Complete the last exit. Raises Later where KVM_RUN has an exit or an error of its own first (rows 1 to 17)."""
    wanted = page.immediate_exit
    page.immediate_exit = 1
    try:
        ioctl(fd, KVM_RUN, 0)
    except OSError as error:
        if error.errno != errno.EINTR or wanted:
            raise Later(error) from None
    else:
        raise Later(None)
    finally:
        page.immediate_exit = wanted


def race_run(ioctl: Ioctl, fd: int, vcpu: ShadowVcpu | None) -> int:
    """Do KVM_RUN with immediate_exit set by somebody else, who clears it afterwards. Raises OSError as KVM_RUN."""
    if vcpu is None or not vcpu.page:
        return ioctl(fd, KVM_RUN, 0)
    page = vcpu.run
    wanted = page.immediate_exit
    page.immediate_exit = 1
    try:
        return ioctl(fd, KVM_RUN, 0)
    finally:
        page.immediate_exit = wanted
