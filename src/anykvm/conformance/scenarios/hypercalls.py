"""VMCALL: what KVM answers itself, and KVM_HC_MAP_GPA_RANGE, which user space may answer: ABI.md 1.3."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import USER_IOPL, compatibility_mode, user_mode
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "hypercalls"
_VMMCALL: Final = bytes.fromhex("0f01d9e610f4")  # vmmcall; out 0x10, al; hlt
_MAP_GPA_RANGE: Final = 12
_NO_SUCH: Final = 77


def _enabled(lab: Lab) -> Machine:
    m = lab.machine()
    lab.note("cap", mask=hex(m.vm.check_extension(c.KVM_CAP_EXIT_HYPERCALL)))
    lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_EXIT_HYPERCALL, 1 << _MAP_GPA_RANGE))
    return m


def _call(m: Machine, number: int, a0: int = 0, a1: int = 0, a2: int = 0, **more: int) -> None:
    m.at(_VMMCALL, rax=number, rbx=a0, rcx=a1, rdx=a2, **more)


def _seen(lab: Lab, m: Machine) -> None:
    call = m.run_page.hypercall
    lab.note("hypercall", nr=call.nr, args=[hex(call.args[at]) for at in range(3)], ret=hex(call.ret), flags=call.flags)


@scenario("hypercall_enable", area=AREA, needs=("hypercalls",))
def hypercall_enable(lab: Lab) -> None:
    """KVM_CAP_EXIT_HYPERCALL takes only the calls that it says."""
    m = lab.machine()
    for mask in (0, 1 << _MAP_GPA_RANGE, 1 << 1, 1 << 63, 1 << _MAP_GPA_RANGE | 1):
        lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_EXIT_HYPERCALL, mask), mask=hex(mask))
    lab.step("flags", attempt(m.vm.enable_cap, c.KVM_CAP_EXIT_HYPERCALL, 1 << _MAP_GPA_RANGE, flags=1))


@scenario("hypercall_answered_by_kvm", area=AREA)
def hypercall_answered_by_kvm(lab: Lab) -> None:
    """A call nobody has, and one that is not enabled: an errno in RAX and no exit; in ring 3 it is not allowed."""
    m = lab.machine()
    for step, number in (("no_such", _NO_SUCH), ("not_enabled", _MAP_GPA_RANGE), ("huge", 1 << 40)):
        _call(m, number, TEST, 1, 1)
        m.run(step)
    user_mode(m)
    _call(m, _NO_SUCH, rflags=USER_IOPL)
    m.run("user_mode")


@scenario("hypercall_map_gpa_range", area=AREA, needs=("hypercalls",))
def hypercall_map_gpa_range(lab: Lab) -> None:
    """An exit with the arguments; the answer is RAX; RIP is past it only when completed."""
    m = _enabled(lab)
    _call(m, _MAP_GPA_RANGE, TEST, 3, 0x10)
    m.run("call")
    _seen(lab, m)
    m.run_page.hypercall.ret = 0x1122334455667788
    m.run("answered")
    _call(m, _MAP_GPA_RANGE, TEST, 3, 0x10)
    m.run("call_again")
    m.run_page.hypercall.ret = 5
    m.run_page.immediate_exit = 1
    m.run("answered_immediate_exit")
    m.run_page.immediate_exit = 0
    m.run("goes_on")


@scenario("hypercall_bad_arguments", area=AREA, needs=("hypercalls",))
def hypercall_bad_arguments(lab: Lab) -> None:
    """A range that is unaligned, empty, wraps, or is beyond physical addresses: EINVAL in RAX, no exit."""
    m = _enabled(lab)
    for step, gpa, pages in (
        ("unaligned", TEST + 8, 1),
        ("empty", TEST, 0),
        ("wraps", (1 << 64) - 0x1000, 2),
        ("beyond_physical", 1 << 52, 1),
        ("no_slot", 0x70000000, 1),
    ):
        _call(m, _MAP_GPA_RANGE, gpa, pages)
        m.run(step)


@scenario("hypercall_32_bit", area=AREA, needs=("hypercalls",))
def hypercall_32_bit(lab: Lab) -> None:
    """Outside 64-bit mode arguments and answer have 32 bits."""
    m = _enabled(lab)
    compatibility_mode(m)
    _call(m, _MAP_GPA_RANGE | 7 << 32, TEST | 9 << 32, 1 | 5 << 32, 0x10)
    m.run("call")
    _seen(lab, m)
    m.run_page.hypercall.ret = 0x1122334455667788
    m.run("answered")
