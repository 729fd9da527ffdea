"""Slots of an ordinary VM whose only memory is a guest_memfd that can be mapped: ABI.md 4.4, 2.1."""

from __future__ import annotations

import fcntl
import os
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi.ioctls import KVM_CREATE_GUEST_MEMFD
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous, fallocate, file_mapping
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.guest_memfd import KEEP_SIZE, PUNCH
from anykvm.conformance.scenarios.pre_fault import pre_fault
from anykvm.host.libc import PROT_NONE

AREA = "guest_memfd_only"
NEEDS: Final = ("guest_memfd",)
_SIZE: Final = 8 * PAGE
_GMEM: Final = c.KVM_MEM_GUEST_MEMFD
_FLAGS: Final = c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED
_OTHER: Final = TEST + 0x100000


def _file(lab: Lab, m: Machine, size: int = _SIZE, flags: int = _FLAGS) -> int | None:
    """Make a guest_memfd, or record the failure and return None."""
    made = lab.step("create", m.guest_memfd(size, flags))
    return None if made.failed else made.ret


def _bound(lab: Lab, m: Machine) -> tuple[int, Host] | None:
    """Make a guest_memfd, map it, and bind all of it at TEST."""
    fd = _file(lab, m)
    if fd is None:
        return None
    host = file_mapping(fd, _SIZE)
    lab.step("bind", m.slot2(1, TEST, _SIZE, host, _GMEM, fd))
    return fd, host


@scenario("gmem_only_faults", area=AREA, needs=NEEDS)
def gmem_only_faults(lab: Lab) -> None:
    """When the file is closed every access is an annotated fault; it has no completion, and immediate_exit keeps it."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    fd, host = made
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    host.unmap()
    os.close(fd)
    for step, guest, address in (
        ("read", code.READ8, TEST + 0x123),
        ("write", code.WRITE8, TEST + PAGE + 0x456),
        ("exec", code.JUMP, TEST + 2 * PAGE),
        ("crossing", code.WRITE8, TEST + 4 * PAGE - 4),
        ("lock_add", code.LOCK_ADD, TEST + 5 * PAGE),
    ):
        m.at(guest, address)
        m.run(f"{step}_closed")
    m.run("again")
    m.run_page.immediate_exit = 1
    m.run_as_is("kept_by_immediate_exit")
    m.run_page.immediate_exit = 0


@scenario("gmem_only_refused_after_fault", area=AREA, needs=NEEDS)
def gmem_only_refused_after_fault(lab: Lab) -> None:
    """A KVM_RUN that is refused leaves the annotation where it was, with another errno (T2): it is stale."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    made[1].unmap()
    os.close(made[0])
    m.at(code.READ8, TEST)
    m.run("fault")
    m.run_page.kvm_dirty_regs = 1 << 20
    m.run_as_is("bad_dirty_regs")
    m.run_page.kvm_dirty_regs = 0
    m.run_as_is("argument", arg=1)
    lab.step("deleted", m.delete_slot(1))
    m.run("device_now")


@scenario("gmem_only_punched", area=AREA, needs=NEEDS)
def gmem_only_punched(lab: Lab) -> None:
    """A punched page reads as zeros, for guest and host; the host's mapping stays the guest's memory."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    fd, host = made
    host.put64(PAGE, 0x1234)
    m.at(code.READ8, TEST + PAGE)
    m.run("read")
    lab.step("punch", lambda: fallocate(fd, PUNCH, PAGE, PAGE))
    m.at(code.READ_WRITE_READ, TEST + PAGE)
    m.run("read_punched")
    m.run("write")
    lab.note("host", value=hex(host.get64(PAGE)))
    lab.step("allocate", lambda: fallocate(fd, KEEP_SIZE, 0, _SIZE))
    lab.note("blocks", blocks=os.fstat(fd).st_blocks)


@scenario("gmem_only_offset", area=AREA, needs=NEEDS)
def gmem_only_offset(lab: Lab) -> None:
    """A slot may show any part of the file; no two show the same page; deleted, its part is free again."""
    m = lab.machine()
    fd = _file(lab, m)
    if fd is None:
        return
    host = file_mapping(fd, _SIZE)
    host.put64(3 * PAGE, 0x33)
    lab.step("bind_at_3", m.slot2(1, TEST, PAGE, host, _GMEM, fd, 3 * PAGE))
    m.at(code.READ8, TEST)
    m.run("read")
    for step, size, offset in (
        ("same_page", PAGE, 3 * PAGE),
        ("overlapping", 2 * PAGE, 2 * PAGE),
        ("around", 4 * PAGE, PAGE),
        ("before", 3 * PAGE, 0),
    ):
        lab.step(step, m.slot2(2, _OTHER, size, host, _GMEM, fd, offset))
    lab.step("delete", m.slot2(1, TEST, 0, 0))
    lab.step("bind_again", m.slot2(3, TEST, PAGE, host, _GMEM, fd, 3 * PAGE))
    m.at(code.READ8, TEST)
    m.run("read_again")


@scenario("gmem_only_immutable", area=AREA, needs=NEEDS)
def gmem_only_immutable(lab: Lab) -> None:
    """A slot with a guest_memfd can only be deleted: not the same again, not moved, not logged."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    fd, host = made
    for step, gpa, size, flags in (
        ("same", TEST, _SIZE, _GMEM),
        ("moved", _OTHER, _SIZE, _GMEM),
        ("without_flag", TEST, _SIZE, 0),
        ("logged", TEST, _SIZE, _GMEM | c.KVM_MEM_LOG_DIRTY_PAGES),
        ("read_only", TEST, _SIZE, _GMEM | c.KVM_MEM_READONLY),
        ("smaller", TEST, PAGE, _GMEM),
    ):
        lab.step(step, m.slot2(1, gpa, size, host, flags, fd))
    lab.step("delete_by_v1", m.delete_slot(1))


@scenario("gmem_only_host_mapping", area=AREA, needs=NEEDS)
def gmem_only_host_mapping(lab: Lab) -> None:
    """The host's mapping decides nothing for the guest; for KVM's emulator it is all there is."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    _, host = made
    host.put64(0, 0x77)
    host.protect(PROT_NONE)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read_protected")
    m.run("write_protected")
    m.string(code.REP_OUTSB, 0, TEST, 2)
    m.run("outs_protected")
    host.protect(READ_WRITE)
    m.string(code.REP_OUTSB, 0, TEST, 2)
    m.run("outs")


@scenario("gmem_only_descriptors", area=AREA, needs=NEEDS)
def gmem_only_descriptors(lab: Lab) -> None:
    """A duplicate of the descriptor keeps the memory; the file has no close-on-exec flag, and its own inode."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    fd, host = made
    second = _file(lab, m)
    lab.note(
        "descriptor",
        cloexec=fcntl.fcntl(fd, fcntl.F_GETFD),
        access=fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE,
        own_inode=second is not None and os.fstat(fd).st_ino != os.fstat(second).st_ino,
        block=os.fstat(fd).st_blksize,
    )
    copy = os.dup(fd)
    os.close(fd)
    host.unmap()
    m.at(code.READ8, TEST)
    m.run("read_while_duplicate")
    os.close(copy)
    m.run("next")
    m.at(code.READ8, TEST)
    m.run("read_without")


@scenario("gmem_default_arguments", area=AREA, needs=NEEDS)
def gmem_default_arguments(lab: Lab) -> None:
    """KVM_CREATE_GUEST_MEMFD in an ordinary VM: each flag, sizes around a page and the largest."""
    m = lab.machine()
    for flags in (0, 1, 2, 3, 4, 1 << 63):
        _try(lab, "flags", m.guest_memfd(PAGE, flags), flags=hex(flags))
    for size in (0, 1, PAGE - 1, PAGE, PAGE + 1, (1 << 63) - PAGE, 1 << 63, (1 << 64) - PAGE):
        _try(lab, "size", m.guest_memfd(size, 0), size=hex(size))
    lab.step("bad_pointer", attempt(m.vm.ioctl, KVM_CREATE_GUEST_MEMFD, 8))


def _try(lab: Lab, step: str, outcome: Outcome, **seen: str) -> None:
    """Record whether it was made; which descriptor it got is no fact about KVM."""
    if not outcome.failed:
        os.close(outcome.ret)
    lab.step(step, outcome if outcome.failed else Outcome(0, 0), **seen)


@scenario("gmem_default_bind_arguments", area=AREA, needs=NEEDS)
def gmem_default_bind_arguments(lab: Lab) -> None:
    """Binding: offsets and sizes at the file's end, what is no guest_memfd, another VM's."""
    m = lab.machine()
    fd = _file(lab, m)
    if fd is None:
        return
    host, other = file_mapping(fd, _SIZE), lab.machine()
    foreign = other.guest_memfd(_SIZE, _FLAGS).ret
    for step, size, number, offset in (
        ("beyond_by_a_page", 2 * PAGE, fd, 7 * PAGE),
        ("at_end", PAGE, fd, 8 * PAGE),
        ("unaligned", PAGE, fd, 8),
        ("wraps", 2 * PAGE, fd, (1 << 64) - PAGE),
        ("not_open", PAGE, 999, 0),
        ("a_pipe", PAGE, os.pipe()[0], 0),
        ("the_vm", PAGE, m.vm.fileno(), 0),
        ("of_another_vm", PAGE, foreign, 0),
        ("last_page", PAGE, fd, 7 * PAGE),
    ):
        lab.step(step, m.slot2(1, TEST, size, host, _GMEM, number, offset))
    lab.step("by_v1", m.slot(2, _OTHER, PAGE, host, _GMEM))


@scenario("gmem_default_bind_order", area=AREA, needs=NEEDS)
def gmem_default_bind_order(lab: Lab) -> None:
    """Two things wrong at once: first the offset (row 9), then overlaps (18), the file (19), and the addresses (20).

    And the first form of the ioctl refuses the flag (row 3), even if descriptor 0, which it implies, is a guest_memfd.
    """
    m = lab.machine()
    fd = _file(lab, m)
    if fd is None:
        return
    host = file_mapping(fd, _SIZE)
    m.slot(5, _OTHER, PAGE, anonymous(PAGE))
    for step, gpa, size, number, offset in (
        ("unaligned_and_not_open", TEST, PAGE, 999, 8),
        ("wraps_and_not_open", TEST, 2 * PAGE, 999, (1 << 64) - PAGE),
        ("overlapping_and_not_open", _OTHER, PAGE, 999, 0),
        ("beyond_physical_and_not_open", 1 << 52, PAGE, 999, 0),
    ):
        lab.step(step, m.slot2(1, gpa, size, host, _GMEM, number, offset))
    os.dup2(fd, 0)
    lab.step("by_v1_as_descriptor_0", m.slot(1, TEST, PAGE, host, _GMEM))
    lab.step("by_v2_as_descriptor_0", m.slot2(1, TEST, PAGE, host, _GMEM, 0, 0))


@scenario("gmem_plain", area=AREA, needs=NEEDS)
def gmem_plain(lab: Lab) -> None:
    """A guest_memfd that cannot be mapped, in an ordinary VM: nothing is private, so the host's is used."""
    m = lab.machine()
    fd = _file(lab, m, flags=0)
    if fd is None:
        return
    lab.step("map", attempt(_map, fd))
    host = anonymous(_SIZE)
    lab.step("bind", m.slot2(1, TEST, _SIZE, host, _GMEM, fd))
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    m.run("write")
    lab.note("host", value=hex(host.get64(0)))


def _map(fd: int) -> None:
    file_mapping(fd, PAGE)


@scenario("gmem_pre_fault", area=AREA, needs=(*NEEDS, "pre_fault"))
def gmem_pre_fault(lab: Lab) -> None:
    """Pre-faulting takes pages of the file; closed, it writes an annotation, even over the answer of a device (T13)."""
    m = lab.machine()
    made = _bound(lab, m)
    if made is None:
        return
    fd, host = made
    pre_fault(lab, m, "four_pages", TEST, 4 * PAGE)
    lab.note("blocks", blocks=os.fstat(fd).st_blocks)
    m.at(code.READ8, TEST + 0x1000000)
    m.run("device_read")
    m.answer_mmio(0x5555555555555555)
    host.unmap()
    os.close(fd)
    pre_fault(lab, m, "closed", TEST)
    m.run("completed_with_what_is_there", poisoned=False)
