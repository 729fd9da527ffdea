"""Dirty rings: how they are made, filled and reset, and the exit of a full one: ABI.md 4.6 and row 21."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_dirty_gfn
from anykvm.api.pages import map_pages
from anykvm.api.vm import Vm
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.dirty_log import dirty_log

AREA = "dirty_ring"
NEEDS: Final = ("dirty_ring",)
_RING: Final = c.KVM_CAP_DIRTY_LOG_RING
_SIZE: Final = 4096
_OFFSET: Final = c.KVM_DIRTY_LOG_PAGE_OFFSET * 4096
_PAGES: Final = 512
# mov [rdi], rbx; add rdi, 0x1000; jmp: every page, until an exit
_ALL_PAGES: Final = bytes.fromhex("48891f4881c700100000ebf4")  # again: mov [rdi], rbx; add rdi, 0x1000; jmp again


def _enable(size: int) -> Callable[[Vm], None]:
    def enable(vm: Vm) -> None:
        vm.enable_cap(_RING, size)

    return enable


def _with_ring(lab: Lab) -> Machine:
    """Make a machine with a ring of 256 entries and a logged slot."""
    m = lab.machine(prepare=_enable(_SIZE))
    m.slot(1, TEST, _PAGES * PAGE, anonymous(_PAGES * PAGE), c.KVM_MEM_LOG_DIRTY_PAGES)
    return m


def _entries(m: Machine, count: int) -> list[kvm_dirty_gfn]:
    ring = map_pages(m.kvm.backend, m.vcpu.fileno(), _SIZE, _OFFSET)
    return list((kvm_dirty_gfn * count).from_buffer(ring))


def _show(lab: Lab, m: Machine, step: str, count: int) -> None:
    seen = [f"{entry.flags}:{entry.slot:#x}:{entry.offset}" for entry in _entries(m, count)]
    lab.note(step, entries=seen)


@scenario("dirty_ring_sizes", area=AREA, needs=NEEDS)
def dirty_ring_sizes(lab: Lab) -> None:
    """A ring's size: a power of two, a page at least, a mebibyte at most; once, and before any vCPU."""
    m = lab.machine()
    lab.note("cap", ring=m.vm.check_extension(_RING), acq_rel=m.vm.check_extension(c.KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
    lab.step("after_vcpu", attempt(m.vm.enable_cap, _RING, _SIZE))
    for size in (0, 1, 2048, 4095, 4097, 6144, 1 << 20 | 1, 1 << 21, 1 << 32):
        lab.step("size", attempt(m.kvm.create_vm().enable_cap, _RING, size), size=hex(size))
    vm = m.kvm.create_vm()
    lab.step("flags", attempt(vm.enable_cap, _RING, _SIZE, flags=1))
    lab.step("page", attempt(vm.enable_cap, _RING, _SIZE))
    lab.step("twice", attempt(vm.enable_cap, _RING, _SIZE))
    lab.step("acq_rel_too", attempt(vm.enable_cap, c.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, _SIZE))
    lab.step("largest", attempt(m.kvm.create_vm().enable_cap, _RING, 1 << 20))
    lab.step("with_bitmap", attempt(vm.enable_cap, c.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP))


@scenario("dirty_ring_none", area=AREA, needs=NEEDS)
def dirty_ring_none(lab: Lab) -> None:
    """Without rings there is nothing to reset, and nothing to map."""
    m = lab.machine()
    lab.ioctl("RESET", m.vm, n.KVM_RESET_DIRTY_RINGS)
    m = _with_ring(lab)
    lab.step("GET_DIRTY_LOG_with_ring", dirty_log(m, 1)[0])
    lab.ioctl("RESET_with_ring", m.vm, n.KVM_RESET_DIRTY_RINGS)


@scenario("dirty_ring_entries", area=AREA, needs=NEEDS)
def dirty_ring_entries(lab: Lab) -> None:
    """Each page is an entry when it is first written, and again after a reset of what was harvested."""
    m = _with_ring(lab)
    for page in (3, 1, 3):
        m.at(code.WRITE8, TEST + page * PAGE)
        m.run("write")
    _show(lab, m, "entries", 4)
    lab.ioctl("reset_nothing_harvested", m.vm, n.KVM_RESET_DIRTY_RINGS)
    _entries(m, 4)[0].flags = 2
    lab.ioctl("reset_one", m.vm, n.KVM_RESET_DIRTY_RINGS)
    _show(lab, m, "after_reset", 4)
    for page in (3, 1):
        m.at(code.WRITE8, TEST + page * PAGE)
        m.run("write_again")
    _show(lab, m, "entries_again", 4)


@scenario("dirty_ring_full", area=AREA, needs=NEEDS)
def dirty_ring_full(lab: Lab) -> None:
    """At its soft limit KVM_RUN returns 0 with DIRTY_RING_FULL, whatever signal waits, until it is reset."""
    m = _with_ring(lab)
    m.at(_ALL_PAGES, TEST)
    m.run("full")
    filled = sum(entry.flags == 1 for entry in _entries(m, _SIZE // 16))
    lab.note("filled", some=filled > 0, at_most=filled <= _SIZE // 16 - 64)
    m.run("still_full")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    m.vcpu.set_signal_mask(())
    signal.raise_signal(signal.SIGUSR1)
    m.run("signal_waits")
    m.run_page.immediate_exit = 1
    m.run("immediate_exit")
    m.run_page.immediate_exit = 0
    signal.sigtimedwait({signal.SIGUSR1}, 0)
    for entry in _entries(m, _SIZE // 16):
        if entry.flags == 1:
            entry.flags = 2
    reset = attempt(m.vm.ioctl, n.KVM_RESET_DIRTY_RINGS)
    lab.note("reset", all=reset.ret == filled)
    m.run("full_again")


@scenario("dirty_ring_pages", area=AREA, needs=NEEDS)
def dirty_ring_pages(lab: Lab) -> None:
    """The ring is at page 64 of the vCPU's file and counts in no page before it; each vCPU has its own."""
    m = _with_ring(lab)
    lab.note("size", size=m.kvm.get_vcpu_mmap_size())
    for step, length, offset in (("ring", _SIZE, _OFFSET), ("run", 3 * PAGE, 0)):
        lab.step(step, attempt(_map, m, length, offset))
    second = m.vm.create_vcpu(1)
    m.at(code.WRITE8, TEST)
    m.run("write")
    ring = map_pages(m.kvm.backend, second.fileno(), _SIZE, _OFFSET)
    lab.note("second", flags=kvm_dirty_gfn.from_buffer(ring).flags)
    _show(lab, m, "first", 1)


def _map(m: Machine, length: int, offset: int) -> None:
    m.kvm.backend.mmap(m.vcpu.fileno(), length, offset)
