"""KVM_SET_USER_MEMORY_REGION and REGION2: which arguments are refused, and with which errno."""

from __future__ import annotations

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_userspace_memory_region2
from anykvm.conformance.host import PAGE, Host, anonymous
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine, capability
from anykvm.conformance.scenario import Lab, scenario

AREA = "slot_arguments"
KERNEL_ADDRESS = 0xFFFF800000000000
BAD_POINTER = 8
LOW_ADDRESS = 0x100000
"""Where nothing is mapped; a slot may have it all the same."""
LAST_PAGE = (1 << 64) - PAGE


@scenario("memslot_args", area=AREA)
def memslot_args(lab: Lab) -> None:
    """Each field out of range, unaligned, overlapping; each change of an existing slot; deletion."""
    m, host = lab.machine(), anonymous(64 * PAGE)
    check = m.vm.check_extension
    slots = capability(check, c.KVM_CAP_NR_MEMSLOTS)
    lab.note(
        "caps",
        nr_memslots=slots,
        address_spaces=capability(check, c.KVM_CAP_MULTI_ADDRESS_SPACE),
        ro=capability(check, c.KVM_CAP_READONLY_MEM),
        mem2=capability(check, c.KVM_CAP_USER_MEMORY2),
    )
    _addresses(lab, m, host)
    _slot_ids(lab, m, host, slots)
    _changes(lab, m, host)
    _deletions(lab, m)
    _sizes(lab, m)
    _pointers_and_second_form(lab, m, host)
    if other := lab.irqchip_machine():
        lab.step("irqchip_vm_apic_base_slot", other.slot(12, 0xFEE00000, PAGE, host))


def try_slot(lab: Lab, m: Machine, step: str, slot: int, gpa: int, size: int, host: Host | int, flags: int = 0) -> None:
    """Make a slot and delete it again."""
    outcome = lab.step(step, m.slot(slot, gpa, size, host, flags))
    if not outcome.failed and size:
        m.delete_slot(slot)


def _addresses(lab: Lab, m: Machine, host: Host) -> None:
    size, hva = 4 * PAGE, host.address
    for step, gpa, length, address in (
        ("gpa_unaligned", TEST + 8, size, hva),
        ("size_unaligned", TEST, size + 8, hva),
        ("hva_unaligned", TEST, size, hva + 8),
        ("hva_kernel", TEST, size, KERNEL_ADDRESS),
        ("hva_noncanonical", TEST, size, 1 << 47),
        ("hva_top_straddle", TEST, size, (1 << 47) - PAGE),
        ("hva_tagged", TEST, size, hva | 1 << 60),
        ("gpa_wrap", LAST_PAGE, 2 * PAGE, hva),
        ("gpa_plus_size_eq_2^64", LAST_PAGE, PAGE, hva),
        ("gpa_above_maxphyaddr_2^52", 1 << 52, PAGE, hva),
        ("gpa_2^39", 1 << 39, PAGE, hva),
        ("gpa_2^40-1page", (1 << 40) - PAGE, PAGE, hva),
        ("gpa_2^40", 1 << 40, PAGE, hva),
        ("gpa_2^46", 1 << 46, PAGE, hva),
        ("size_0_nonexistent", TEST, 0, hva),
    ):
        try_slot(lab, m, step, 1, gpa, length, address)


def _slot_ids(lab: Lab, m: Machine, host: Host, slots: int) -> None:
    size = 4 * PAGE
    try_slot(lab, m, "bad_flag_bit3", 1, TEST, size, host, 8)
    try_slot(lab, m, "bad_flag_bit31", 1, TEST, size, host, 1 << 31)
    try_slot(lab, m, "slot_id_max", slots - 1, TEST + 0x1000000, PAGE, host)
    try_slot(lab, m, "slot_id_nr", slots, TEST + 0x2000000, PAGE, host)
    try_slot(lab, m, "slot_id_0xffff", 0xFFFF, TEST + 0x2000000, PAGE, host)
    lab.step("as_id_1", m.slot(0x10001, TEST, PAGE, host))
    try_slot(lab, m, "as_id_2", 0x20001, TEST, PAGE, host)
    lab.step("as_id_1_delete", m.slot(0x10001, TEST, 0, host))


def _changes(lab: Lab, m: Machine, host: Host) -> None:
    size, log, read_only = 4 * PAGE, c.KVM_MEM_LOG_DIRTY_PAGES, c.KVM_MEM_READONLY
    for step, slot, gpa, length, address, flags in (
        ("create_ok", 1, TEST, size, host.address, 0),
        ("identical_again", 1, TEST, size, host.address, 0),
        ("overlap_full", 2, TEST, size, host.address, 0),
        ("overlap_tail", 2, TEST + 3 * PAGE, size, host.address, 0),
        ("adjacent_ok", 2, TEST + size, size, host.address, 0),
        ("same_hva_two_slots_ok", 3, TEST + 0x100000, size, host.address, 0),
        ("resize_grow", 1, TEST, 5 * PAGE, host.address, 0),
        ("resize_shrink", 1, TEST, 2 * PAGE, host.address, 0),
        ("change_hva", 1, TEST, size, host.address + PAGE, 0),
        ("set_LOG_DIRTY", 1, TEST, size, host.address, log),
        ("clear_LOG_DIRTY", 1, TEST, size, host.address, 0),
        ("set_READONLY", 1, TEST, size, host.address, read_only),
        ("LOG|READONLY_new_slot", 4, TEST + 0x400000, size, host.address, log | read_only),
        ("clear_READONLY", 4, TEST + 0x400000, size, host.address, log),
        ("move_to_overlap", 1, TEST + 5 * PAGE, size, host.address, 0),
        ("move_ok", 1, TEST + 0x800000, size, host.address, 0),
        ("move_and_flags", 1, TEST + 0x900000, size, host.address, log),
        ("move_overlap_itself", 1, TEST + 0x901000, size, host.address, log),
    ):
        lab.step(step, m.slot(slot, gpa, length, address, flags))


def _deletions(lab: Lab, m: Machine) -> None:
    for step, slot, flags, gpa, address in (
        ("delete", 1, 0, 0, 0),
        ("delete_again", 1, 0, 0, 0),
        ("delete_unaligned_gpa", 2, 0, 8, 0),
        ("delete_bad_flags", 2, 8, 0, 0),
        ("delete_bad_hva", 2, 0, 0, 8),
        ("delete_kernel_hva", 2, 0, 0, KERNEL_ADDRESS),
        ("delete_RO_flag_diff", 2, c.KVM_MEM_READONLY, 0, 0),
    ):
        lab.step(step, m.slot(slot, gpa, 0, address, flags))


def _sizes(lab: Lab, m: Machine) -> None:
    try_slot(lab, m, "size_256GiB", 6, 1 << 38, 1 << 38, LOW_ADDRESS)
    try_slot(lab, m, "size_8TiB_minus_page", 6, 1 << 33, (1 << 43) - PAGE, LOW_ADDRESS)
    try_slot(lab, m, "size_8TiB", 6, 1 << 33, 1 << 43, LOW_ADDRESS)
    lab.step("size_2^63", m.slot(7, 0, 1 << 63, LOW_ADDRESS))


def _pointers_and_second_form(lab: Lab, m: Machine, host: Host) -> None:
    lab.step("bad_pointer", lambda: m.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION, BAD_POINTER))
    lab.step("bad_pointer2", lambda: m.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION2, BAD_POINTER))
    lab.step("ioctl2_plain_ok", m.slot2(9, TEST + 0x3000000, PAGE, host))
    lab.step("ioctl2_plain_offset_ignored", m.slot2(10, TEST + 0x3100000, PAGE, host, gmem=-1, offset=7))
    lab.step("tss_addr_overlap_private_slot", m.slot(11, 0xFFFBD000, PAGE, host))
    lab.step("apic_base", m.slot(12, 0xFEE00000, PAGE, host))
    padded = kvm_userspace_memory_region2(13, 0, TEST + 0x3200000, PAGE, host.address)
    padded.pad1 = 1
    lab.step("ioctl2_pad1_nonzero", lambda: m.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION2, padded))
    padded = kvm_userspace_memory_region2(14, 0, TEST + 0x3201000, PAGE, host.address)
    padded.pad2[3] = 1
    lab.step("ioctl2_pad2_nonzero", lambda: m.vm.ioctl(n.KVM_SET_USER_MEMORY_REGION2, padded))
