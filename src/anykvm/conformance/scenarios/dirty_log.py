"""KVM_GET_DIRTY_LOG: what sets a bit, and what does not."""

from __future__ import annotations

import ctypes

from anykvm.abi.constants import KVM_MEM_LOG_DIRTY_PAGES
from anykvm.abi.ioctls import KVM_GET_DIRTY_LOG
from anykvm.abi.structures import kvm_dirty_log
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "dirty_log"


def dirty_log(m: Machine, slot: int) -> tuple[Outcome, int]:
    """Get and clear a slot's dirty log; the bitmap is that of its first 64 pages."""
    bitmap = ctypes.c_uint64(0)
    request = kvm_dirty_log(slot=slot)
    request.dirty_bitmap = ctypes.addressof(bitmap)
    outcome = attempt(lambda: m.vm.ioctl(KVM_GET_DIRTY_LOG, request))
    return outcome, bitmap.value


def record_bits(lab: Lab, m: Machine, step: str, slot: int = 1) -> None:
    """Record a slot's dirty log, which that clears."""
    outcome, bitmap = dirty_log(m, slot)
    lab.step(step, outcome, bitmap=hex(bitmap))


@scenario("dirty", area=AREA, needs=("dirty_log",))
def dirty(lab: Lab) -> None:
    """A write sets its page's bit, again after the log was read; a write that faulted does not."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host, KVM_MEM_LOG_DIRTY_PAGES)
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write")
    outcome, bitmap = dirty_log(m, 1)
    lab.step("GET_DIRTY_LOG", outcome)
    lab.note("bitmap", bm=hex(bitmap))
    host.unmap(2 * PAGE, PAGE)
    m.at(code.WRITE8, TEST + 2 * PAGE)
    m.run("write_unmapped")
    lab.note("bitmap_after_efault", bm=hex(dirty_log(m, 1)[1]))
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_wp_again")
    lab.note("bitmap_again", bm=hex(dirty_log(m, 1)[1]))
    lab.step("GET_DIRTY_LOG_noslot", dirty_log(m, 7)[0])
    m.slot(2, TEST + 0x100000, PAGE, host)
    lab.step("GET_DIRTY_LOG_nolog", dirty_log(m, 2)[0])
