"""KVM_PRE_FAULT_MEMORY: how far it gets, what it refuses, and what it leaves in kvm_run."""

from __future__ import annotations

import os
from typing import Any

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine, capability
from anykvm.conformance.observe import POISON_BYTE, POISON_REASON, UNION, exit_name
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.dirty_log import dirty_log
from anykvm.host import libc
from anykvm.host.libc import PROT_NONE, PROT_READ

AREA = "pre_fault"
SIZE = 16 * PAGE
_HUGE = 0x200000
_MADV_HUGEPAGE = 14
_PRIVATE = c.KVM_MEMORY_ATTRIBUTE_PRIVATE
_POISONED = 64
_LAST = (1 << 64) - PAGE


def pre_fault(lab: Lab, m: Machine, step: str, gpa: int, size: int = PAGE, flags: int = 0) -> None:
    """KVM_PRE_FAULT_MEMORY with kvm_run poisoned, and record what is left and what it wrote there."""
    request = kvm_pre_fault_memory(gpa=gpa, size=size, flags=flags)
    run = m.run_page
    run.exit_reason = POISON_REASON
    m.vcpu.io_page[UNION : UNION + _POISONED] = bytes((POISON_BYTE,)) * _POISONED
    outcome = attempt(lambda: m.vcpu.ioctl(n.KVM_PRE_FAULT_MEMORY, request))
    reason = run.exit_reason
    seen: dict[str, Any] = {"gpa": hex(request.gpa), "size_left": request.size}
    seen.update({"exit_reason": reason, "er": exit_name(reason)})
    if reason == c.KVM_EXIT_MEMORY_FAULT:
        fault = run.memory_fault
        seen["memory_fault"] = {"flags": fault.flags, "gpa": hex(fault.gpa), "size": fault.size}
    lab.step(step, outcome, **seen)


@scenario("prefault", area=AREA, needs=("pre_fault", "guest_memfd", "attributes", "irqchip", "dirty_log", "smp"))
def prefault(lab: Lab) -> None:
    """Plain memory, then private memory, then vCPUs in other states."""
    m = lab.machine()
    number = c.KVM_CAP_PRE_FAULT_MEMORY
    lab.note("cap", sys=capability(m.kvm.check_extension, number), vm=capability(m.vm.check_extension, number))
    host = anonymous(SIZE)
    m.slot(1, TEST, SIZE, host)
    _arguments(lab, m, host)
    _mappings(lab, m, host)
    _private(lab)
    _other_states(lab)


def _arguments(lab: Lab, m: Machine, host: Host) -> None:
    for step, gpa, size, flags in (
        ("ok_1page", TEST, PAGE, 0),
        ("ok_again", TEST, PAGE, 0),
        ("ok_16p", TEST, SIZE, 0),
        ("past_slot_end_partial", TEST + 8 * PAGE, SIZE, 0),
        ("no_slot", TEST + 0x100000, PAGE, 0),
        ("size_0", TEST, 0, 0),
        ("gpa_unaligned", TEST + 8, PAGE, 0),
        ("size_unaligned", TEST, 8, 0),
        ("flags_1", TEST, PAGE, 1),
        ("wrap", _LAST, 2 * PAGE, 0),
        ("end_eq_2^64", _LAST, PAGE, 0),
        ("above_maxphys", 1 << 52, PAGE, 0),
    ):
        pre_fault(lab, m, step, gpa, size, flags)
    lab.step("bad_ptr", lambda: m.vcpu.ioctl(n.KVM_PRE_FAULT_MEMORY, 8))
    lab.step("on_vm_fd", lambda: m.vm.ioctl(n.KVM_PRE_FAULT_MEMORY, host.address))


def _mappings(lab: Lab, m: Machine, host: Host) -> None:
    host.unmap(4 * PAGE, PAGE)
    pre_fault(lab, m, "partial_until_unmapped_page4", TEST, SIZE)
    pre_fault(lab, m, "start_on_unmapped", TEST + 4 * PAGE)
    host.protect(PROT_NONE, 6 * PAGE, PAGE)
    pre_fault(lab, m, "prot_none", TEST + 6 * PAGE, 4 * PAGE)
    host.protect(PROT_READ, 8 * PAGE, PAGE)
    pre_fault(lab, m, "prot_read_ok?", TEST + 8 * PAGE)
    m.slot(2, TEST + 0x200000, 4 * PAGE, anonymous(4 * PAGE), c.KVM_MEM_READONLY)
    pre_fault(lab, m, "ro_slot", TEST + 0x200000, 4 * PAGE)
    m.slot(3, TEST + 0x300000, 4 * PAGE, anonymous(4 * PAGE), c.KVM_MEM_LOG_DIRTY_PAGES)
    pre_fault(lab, m, "dirty_log_slot", TEST + 0x300000, 4 * PAGE)
    lab.note("dirty_after_prefault", bitmap=hex(dirty_log(m, 3)[1]))
    m.slot(4, TEST + 0x400000, 2 * _HUGE, _huge_pages())
    pre_fault(lab, m, "thp_from_middle", TEST + 0x400000 + 0x5000)
    pre_fault(lab, m, "thp_4MiB", TEST + 0x400000, 2 * _HUGE)
    m.at(code.READ8, TEST + 0x1000)
    m.run("run_after_prefault")


def _huge_pages() -> Host:
    """Map 4 MiB that may become transparent huge pages."""
    address = libc.mmap(0, 3 * _HUGE, READ_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    host = Host((address + _HUGE - 1) & ~(_HUGE - 1), 2 * _HUGE)
    attempt(lambda: host.advise(_MADV_HUGEPAGE))
    return host


def _private(lab: Lab) -> None:
    m = lab.protected_machine()
    if m is None:
        return
    gmem, host = m.guest_memfd(SIZE).ret, anonymous(SIZE)
    m.slot2(1, TEST, SIZE, host, c.KVM_MEM_GUEST_MEMFD, gmem)
    m.attributes(TEST, 8 * PAGE, _PRIVATE)
    pre_fault(lab, m, "swp_private8_shared8", TEST, SIZE)
    lab.note("gmem_blocks", blocks=os.fstat(gmem).st_blocks)
    host.unmap(12 * PAGE, PAGE)
    pre_fault(lab, m, "swp_shared_unmapped_at_12", TEST, SIZE)
    plain = TEST + 0x100000
    m.slot(2, plain, 4 * PAGE, anonymous(4 * PAGE))
    m.attributes(plain + 2 * PAGE, PAGE, _PRIVATE)
    pre_fault(lab, m, "swp_private_without_gmem_at_2", plain, 4 * PAGE)
    pre_fault(lab, m, "swp_private_without_gmem", plain + 2 * PAGE)
    m.attributes(TEST + 0x300000, PAGE, _PRIVATE)
    pre_fault(lab, m, "swp_private_no_slot", TEST + 0x300000)
    os.close(gmem)
    pre_fault(lab, m, "swp_gmem_fd_closed", TEST, 4 * PAGE)


def _other_states(lab: Lab) -> None:
    if other := lab.irqchip_machine():
        other.slot(1, TEST, PAGE, anonymous(PAGE))
        second = other.vm.create_vcpu(1)
        request = kvm_pre_fault_memory(gpa=TEST, size=PAGE)
        lab.step("uninitialized_AP", lambda: second.ioctl(n.KVM_PRE_FAULT_MEMORY, request))
        pre_fault(lab, other, "apic_page_irqchip_vm", 0xFEE00000)
    m = lab.machine()
    m.slot(1, TEST, PAGE, anonymous(PAGE))
    sregs = m.vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3 = 0x10, 0, 0, 0
    sregs.cs.l = sregs.cs.base = sregs.cs.selector = 0
    m.vcpu.set_sregs(sregs)
    pre_fault(lab, m, "paging_off", TEST)
