"""Pages that a guest only reads, in a logged slot: dirty at once where user space has them writable (make_spte()).

KVM asks the host for a page that is read, and takes it for writing too if the host's page table has it writable
(``kvm_page_fault.map_writable``); what is mapped writable counts as dirty. A page that is mapped already is not asked
for again, so a log that was read shows no second read.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.api.dirty_ring import DirtyRing
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous, file_mapping, memfd
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.dirty_log import record_bits
from anykvm.host.libc import PROT_READ

AREA = "dirty_log"
NEEDS: Final = ("dirty_log",)
_LOG: Final = c.KVM_MEM_LOG_DIRTY_PAGES
_PAGES: Final = 4
_SIZE: Final = _PAGES * PAGE
_ELSEWHERE: Final = TEST + 0x100000


def _read(lab: Lab, m: Machine, step: str, page: int = 0, gpa: int = TEST) -> None:
    """Read a page, and the log."""
    m.at(code.READ8, gpa + page * PAGE)
    m.run(step)
    record_bits(lab, m, f"bits_{step}")


def _written(pages: int = _PAGES) -> Host:
    """Private memory that user space has written."""
    host = anonymous(pages * PAGE)
    for page in range(pages):
        host.put64(page * PAGE, page + 1)
    return host


@scenario("dirty_reads_by_memory", area=AREA, needs=NEEDS)
def dirty_reads_by_memory(lab: Lab) -> None:
    """A first read of each kind of host memory."""
    m = lab.machine()
    file = memfd(_SIZE)
    os.pwrite(file, b"x" * PAGE, 0)
    private = file_mapping(file, _SIZE, shared=False)
    private.put64(PAGE, 1)
    protected, opened, forgotten = _written(), anonymous(_SIZE, PROT_READ), _written()
    protected.protect(PROT_READ)
    opened.protect(READ_WRITE)
    forgotten.advise(mmap.MADV_DONTNEED)
    for step, host in (
        ("anonymous", anonymous(_SIZE)),
        ("written", _written()),
        ("file", file_mapping(file, _SIZE)),
        ("file_read_only", file_mapping(file, _SIZE, PROT_READ)),
        ("private_file", private),
        ("protected", protected),
        ("opened", opened),
        ("forgotten", forgotten),
    ):
        m.slot(1, TEST, _SIZE, host, _LOG)
        m.at(code.READ8, TEST)
        m.run(step)
        _read(lab, m, f"{step}_1", 1)
        m.delete_slot(1)


@scenario("dirty_reads_again", area=AREA, needs=NEEDS)
def dirty_reads_again(lab: Lab) -> None:
    """Only the read that maps the page counts; what unmaps it makes the next read count again."""
    m, host = lab.machine(), _written()
    m.slot(1, TEST, _SIZE, host)
    m.at(code.READ8, TEST)
    m.run("before_logging")
    m.slot(1, TEST, _SIZE, host, _LOG)
    _read(lab, m, "mapped_before")
    _read(lab, m, "first", 1)
    _read(lab, m, "second", 1)
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write")
    record_bits(lab, m, "bits_write")
    _read(lab, m, "after_write", 1)
    m.slot(2, _ELSEWHERE, _SIZE, anonymous(_SIZE))
    _read(lab, m, "another_slot_is_new", 1)
    m.slot(2, _ELSEWHERE + _SIZE, _SIZE, anonymous(_SIZE))
    _read(lab, m, "another_slot_in_vain", 1)
    m.delete_slot(2)
    _read(lab, m, "another_slot_is_gone", 1)
    m.slot(1, TEST, _SIZE, host)
    m.slot(1, TEST, _SIZE, host, _LOG)
    _read(lab, m, "off_and_on", 1)
    m.slot(1, TEST + _SIZE, _SIZE, host, _LOG)
    _read(lab, m, "moved", 1, TEST + _SIZE)
    m.vcpu.set_cpuid2(m.vcpu.get_cpuid2())
    m.vcpu.set_sregs(m.vcpu.get_sregs())
    _read(lab, m, "state_set", 1, TEST + _SIZE)


@scenario("dirty_reads_of_new_slots", area=AREA, needs=NEEDS)
def dirty_reads_of_new_slots(lab: Lab) -> None:
    """A slot over the same memory has nothing mapped; one that moves away and back neither."""
    m, host = lab.machine(), _written()
    m.slot(1, TEST, _SIZE, host, _LOG)
    _read(lab, m, "first")
    m.slot(2, _ELSEWHERE, _SIZE, host, _LOG)
    m.at(code.READ8, _ELSEWHERE)
    m.run("alias")
    record_bits(lab, m, "bits_alias", 2)
    record_bits(lab, m, "bits_first_again")
    m.slot(2, _ELSEWHERE + _SIZE, _SIZE, host, _LOG)
    _read(lab, m, "other_moved")
    m.slot(2, _ELSEWHERE + _SIZE, _SIZE, host, 0)
    _read(lab, m, "other_not_logged")


@scenario("dirty_reads_host_changes", area=AREA, needs=NEEDS)
def dirty_reads_host_changes(lab: Lab) -> None:
    """What user space does to its memory unmaps the guest's page, which the next read maps as the host has it then."""
    m, host, file = lab.machine(), _written(8), memfd(8 * PAGE)
    m.slot(1, TEST, 8 * PAGE, host, _LOG)
    for page in range(8):
        m.at(code.READ8, TEST + page * PAGE)
        m.run("map")
    record_bits(lab, m, "mapped")
    host.protect(PROT_READ, 0, PAGE)
    _read(lab, m, "protected", 0)
    host.protect(READ_WRITE, 0, PAGE)
    _read(lab, m, "opened", 0)
    host.advise(mmap.MADV_DONTNEED, PAGE, PAGE)
    _read(lab, m, "forgotten", 1)
    host.put64(PAGE, 1)
    _read(lab, m, "written", 1)
    host.unmap(2 * PAGE, PAGE)
    _read(lab, m, "gone", 2)
    host.fix(2 * PAGE, PAGE)
    _read(lab, m, "fresh", 2)
    host.map_file(file, 3 * PAGE, PAGE)
    _read(lab, m, "file", 3)
    os.ftruncate(file, 0)
    _read(lab, m, "truncated", 3)
    os.ftruncate(file, PAGE)
    _read(lab, m, "file_again", 3)
    host.put64(4 * PAGE, 7)
    _read(lab, m, "only_written", 4)


@scenario("dirty_reads_other_ways", area=AREA, needs=(*NEEDS, "pre_fault"))
def dirty_reads_other_ways(lab: Lab) -> None:
    """A fetch, a read-only slot, KVM's own accesses, KVM_PRE_FAULT_MEMORY, and a read before a fault."""
    m, host = lab.machine(), _written(16)
    host.put(0, code.TARGET)
    m.slot(1, TEST, 16 * PAGE, host, _LOG)
    m.at(code.JUMP, TEST)
    m.run("fetch")
    record_bits(lab, m, "bits_fetch")
    m.string(code.REP_OUTSB, 0, TEST + PAGE, 4)
    m.run("rep_outs")
    record_bits(lab, m, "bits_rep_outs")
    _read(lab, m, "read_after_rep_outs", 1)
    for page, size in ((2, PAGE), (4, 2 * PAGE)):
        request = kvm_pre_fault_memory(gpa=TEST + page * PAGE, size=size)
        lab.ioctl("pre_fault", m.vcpu, n.KVM_PRE_FAULT_MEMORY, request)
        record_bits(lab, m, "bits_pre_fault")
        _read(lab, m, "read_after_pre_fault", page)
    m.string(code.MOVSQ, 0x20000000, TEST + 6 * PAGE, 1)
    m.run("to_device")
    record_bits(lab, m, "bits_to_device")
    m.string(code.MOVSQ, TEST + 7 * PAGE, 0x20000000, 1)
    m.run("from_device")
    record_bits(lab, m, "bits_at_device")
    m.run("device_answered")
    record_bits(lab, m, "bits_from_device")
    host.protect(0, 9 * PAGE, PAGE)
    m.at(code.READ8, TEST + 9 * PAGE - 4)
    m.run("over_the_edge")
    record_bits(lab, m, "bits_over_the_edge")
    m.slot(2, _ELSEWHERE, _SIZE, _written(), _LOG | c.KVM_MEM_READONLY)
    m.at(code.READ8, _ELSEWHERE)
    m.run("read_only")
    record_bits(lab, m, "bits_read_only", 2)


@scenario("dirty_reads_page_tables", area=AREA, needs=NEEDS)
def dirty_reads_page_tables(lab: Lab) -> None:
    """A page of page tables is dirty when the processor walks it, which is a write to KVM."""
    m, table = lab.machine(), anonymous(PAGE)
    m.slot(1, 0x20000000, PAGE, table, _LOG)
    m.slot(2, TEST, _SIZE, _written())
    layout.map_small_pages(m.memory, TEST, 0x20000000, table)
    m.at(code.READ8, TEST + PAGE)
    m.run("walk")
    record_bits(lab, m, "bits_walk")
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("walk_again")
    record_bits(lab, m, "bits_walk_again")


@scenario("dirty_reads_modes", area=AREA, needs=NEEDS)
def dirty_reads_modes(lab: Lab) -> None:
    """With KVM_CLEAR_DIRTY_LOG, and with a log that begins full, reads are as with a plain one."""
    for value in (1, 3):
        m, host = lab.machine(), _written()
        lab.step("enable", attempt(m.vm.enable_cap, c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value))
        m.slot(1, TEST, _SIZE, host, _LOG)
        _read(lab, m, "read")
        _read(lab, m, "again")


@scenario("dirty_reads_ring", area=AREA, needs=("dirty_ring",))
def dirty_reads_ring(lab: Lab) -> None:
    """A read that maps a page writable is an entry of the ring; after the reset only a write is."""
    m, host = lab.machine(prepare=lambda vm: vm.enable_dirty_ring(4096)), _written()
    ring = DirtyRing(m.vcpu)
    m.slot(1, TEST, _SIZE, host, _LOG)

    def harvest(step: str) -> None:
        lab.note(step, pages=[list(page) for page in ring.harvest()])

    for step, guest in (("read", code.READ8), ("read_again", code.READ8), ("write", code.WRITE8)):
        m.at(guest, TEST)
        m.run(step)
        harvest(f"ring_{step}")
        lab.step("RESET", attempt(m.vm.ioctl, n.KVM_RESET_DIRTY_RINGS))
    m.at(code.READ8, TEST + PAGE)
    m.run("read_other")
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_other")
    harvest("ring_other")
