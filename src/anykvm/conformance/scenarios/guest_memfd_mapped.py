"""guest_memfd that user space can map: slots whose memory is only the file's."""

from __future__ import annotations

import ctypes
import os
import signal

from anykvm.abi import constants as c
from anykvm.abi.ioctls import KVM_PRE_FAULT_MEMORY
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.conformance import guest_code as code
from anykvm.conformance import sigbus
from anykvm.conformance.host import PAGE, READ_WRITE, Host, fallocate, file_mapping
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.observe import POISON_REASON
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.guest_memfd import PUNCH
from anykvm.host.libc import PROT_NONE

AREA = "guest_memfd_mapped"
SIZE = 8 * PAGE
_GMEM = c.KVM_MEM_GUEST_MEMFD
_MMAP = c.GUEST_MEMFD_FLAG_MMAP
_MMAP_SHARED = c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED
_MADV_HWPOISON = 100
_PRIVATE = c.KVM_MEMORY_ATTRIBUTE_PRIVATE


@scenario("gmem_mmap", area=AREA, needs=("guest_memfd", "poison", "pre_fault"))
def gmem_mmap(lab: Lab) -> None:
    """Guest accesses go to the file whatever the host mapping allows; poisoned pages, punched holes, a closed file."""
    m = lab.machine()
    check = m.vm.check_extension
    lab.note(
        "caps_default_vm",
        GUEST_MEMFD=check(c.KVM_CAP_GUEST_MEMFD),
        FLAGS=check(c.KVM_CAP_GUEST_MEMFD_FLAGS),
        ATTRS=check(c.KVM_CAP_MEMORY_ATTRIBUTES),
    )
    made = lab.step("create_mmap_initshared", m.guest_memfd(SIZE, _MMAP_SHARED))
    if made.failed:
        return
    gmem, host = made.ret, file_mapping(made.ret, SIZE)
    host.put64(0, 0xDADA)
    lab.step("mmap_MAP_PRIVATE", _map(gmem, shared=False))
    lab.step("bind_hva_is_gmem_mapping", m.slot2(1, TEST, SIZE, host, _GMEM, gmem))
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    m.run("write")
    lab.note("host_sees_write", h=hex(host.get64(0)))
    host.protect(PROT_NONE)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read_hva_PROT_NONE_gmem_only_ok")
    m.run("write_hva_PROT_NONE")
    host.protect(READ_WRITE)
    _emulator(m, host)
    host = file_mapping(gmem, SIZE)
    _poison(lab, m, host, gmem)
    _closed(lab, m, host, gmem)


def _emulator(m: Machine, host: Host) -> None:
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb")
    m.pio_data(4)[:] = b"\x44" * 4
    m.run("rep_insb_resume")
    host.unmap()
    m.at(code.READ8, TEST)
    m.run("read_hva_unmapped_gmem_only")
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb_hva_unmapped")
    m.run("rep_insb_hva_unmapped_resume")


def _poison(lab: Lab, m: Machine, host: Host, gmem: int) -> None:
    host.put64(PAGE, 7)
    with sigbus.caught(lab.signals):
        outcome = attempt(lambda: host.advise(_MADV_HWPOISON, PAGE, PAGE))
        lab.step("madvise_hwpoison_gmem", outcome, sigbus=len(lab.signals.bus_errors))
        for guest, address, step in (
            (code.READ8, TEST + PAGE + 8, "read_gmem_hwpoison"),
            (code.WRITE8, TEST + PAGE + 8, "write_gmem_hwpoison"),
            (code.JUMP, TEST + PAGE, "exec_gmem_hwpoison"),
            (code.READ8, TEST + PAGE - 4, "read_cross_into_gmem_hwpoison"),
        ):
            m.at(guest, address)
            m.run(step)
    lab.step("punch_hole_on_poison", lambda: fallocate(gmem, PUNCH, PAGE, PAGE))
    m.at(code.READ8, TEST + PAGE + 8)
    m.run("read_after_punch_of_poison")


def _closed(lab: Lab, m: Machine, host: Host, gmem: int) -> None:
    host.unmap()
    os.close(gmem)
    for guest, address, step in (
        (code.READ8, TEST, "read_gmem_fd_closed"),
        (code.WRITE8, TEST + 2 * PAGE, "write_gmem_fd_closed"),
        (code.JUMP, TEST, "exec_gmem_fd_closed"),
    ):
        m.at(guest, address)
        m.run(step)
    m.string(code.REP_INSB, TEST, 0, 4)
    m.run("rep_insb_fd_closed")
    m.run("rep_insb_fd_closed_resume")
    request = kvm_pre_fault_memory(gpa=TEST, size=4 * PAGE)
    m.run_page.exit_reason = POISON_REASON
    outcome = attempt(lambda: m.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, request))
    lab.step(
        "pre_fault_fd_closed", outcome, gpa=hex(request.gpa), left=request.size, exit_reason=m.run_page.exit_reason
    )


@scenario("gmem_mmap_swp", area=AREA, needs=("guest_memfd", "attributes"))
def gmem_mmap_swp(lab: Lab) -> None:
    """The same in a VM with private memory, where the file can be mapped but not touched."""
    m = lab.protected_machine()
    if m is None:
        return
    lab.step("swp_create_mmap_initshared", m.guest_memfd(SIZE, _MMAP_SHARED))
    made = lab.step("swp_create_mmap", m.guest_memfd(SIZE, _MMAP))
    if made.failed:
        return
    host = file_mapping(made.ret, SIZE)
    lab.note("host_write_to_mmap_of_private_gmem", status=hex(_write_in_child(host)))
    lab.step("bind", m.slot2(1, TEST, SIZE, host, _GMEM, made.ret))
    m.at(code.READ_WRITE_READ, TEST)
    m.run("shared_read")
    lab.step("attr_private", m.attributes(TEST, SIZE, _PRIVATE))
    m.run("private_write")
    m.run("private_readback")

    other = TEST + 0x100000
    second = lab.step("swp_create_mmap_only", m.guest_memfd(SIZE, _MMAP))
    lab.step("mmap_only_mmap", _map(second.ret))
    lab.step("bind2", m.slot2(2, other, SIZE, file_mapping(second.ret, SIZE), _GMEM, second.ret))
    m.at(code.READ_WRITE_READ, other)
    m.run("mmap_only_shared_attr_read")
    m.attributes(other, SIZE, _PRIVATE)
    m.at(code.READ_WRITE_READ, other)
    m.run("mmap_only_private_attr_read")
    m.run("mmap_only_private_attr_write")

    os.close(made.ret)
    host.unmap()
    m.attributes(TEST, SIZE, 0)
    m.at(code.READ8, TEST)
    m.run("fd_closed_shared_read")
    m.attributes(TEST, SIZE, _PRIVATE)
    m.at(code.READ8, TEST)
    m.run("fd_closed_private_read")


def _map(fd: int, shared: bool = True) -> Outcome:
    """Map a page of a file, and unmap it; the result is 0 if that can be done."""
    return attempt(lambda: file_mapping(fd, PAGE, shared=shared).unmap())


def _write_in_child(host: Host) -> int:
    """Write to the mapping in a forked child; returns its wait status, in which a SIGBUS shows."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        ctypes.memset(host.address, 0xDA, 8)
        os._exit(0)
    return os.waitpid(child, 0)[1]
