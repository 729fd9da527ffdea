"""KVM_CREATE_GUEST_MEMFD, binding and the file itself: which arguments are refused, and with which errno."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_memory_attributes
from anykvm.conformance.host import PAGE, Host, anonymous, fallocate, file_mapping, memfd
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.guest_memfd import KEEP_SIZE, NEEDS, PUNCH

AREA = "guest_memfd_arguments"
_PUNCH_ONLY = 2
_ZERO_RANGE = 16 | KEEP_SIZE
_GMEM = c.KVM_MEM_GUEST_MEMFD


@scenario("gmem_args", area=AREA, needs=NEEDS)
def gmem_args(lab: Lab) -> None:
    """Sizes and flags of the file, its binding to slots, and the calls that work on it."""
    m, other = lab.protected_machine(), lab.protected_machine()
    if m is None or other is None:
        return
    offered = m.vm.check_extension(c.KVM_CAP_GUEST_MEMFD)
    for step, size, flags in (
        ("create_size_0", 0, 0),
        ("create_size_unaligned", PAGE + 1, 0),
        ("create_size_negative", 1 << 63, 0),
        ("create_bad_flag_bit1", PAGE, 2),
        ("create_flag_bit0_mmap", PAGE, 1),
        ("create_flag_3", PAGE, 3),
        ("create_flag_bit2", PAGE, 4),
        ("create_flag_bit63", PAGE, 1 << 63),
        ("create_huge_1TiB", 1 << 40, 0),
    ):
        seen = {"cap": offered} if size == 0 else {}
        lab.step(step, m.guest_memfd(size, flags), **seen)
    host = anonymous(16 * PAGE)
    gmem = m.guest_memfd(4 * PAGE).ret
    _bind(lab, m, host, gmem, other.guest_memfd(4 * PAGE).ret)
    _file(lab, gmem)
    default = lab.machine()
    for step, flags in (
        ("default_vm_create", 0),
        ("default_vm_create_mmap", 1),
        ("default_vm_create_mmap_initshared", 3),
        ("default_vm_create_initshared_only", 2),
    ):
        lab.step(step, default.guest_memfd(PAGE, flags))


def _bind(lab: Lab, m: Machine, host: Host, gmem: int, foreign: int) -> None:
    size, hva, high = 4 * PAGE, host.address, TEST + 0x100000

    def bind(step: str, slot: int, gpa: int, size: int, hva: int, flags: int, fd: int = gmem, offset: int = 0) -> None:
        lab.step(step, m.slot2(slot, gpa, size, hva, flags, fd, offset))

    lab.step("mmap_private_gmem", _mapped(gmem))
    bind("bind_fd_minus1", 1, TEST, size, hva, _GMEM, -1)
    bind("bind_memfd_not_gmem", 1, TEST, size, hva, _GMEM, memfd(size))
    bind("bind_other_vm_gmem", 1, TEST, size, hva, _GMEM, foreign)
    bind("bind_offset_unaligned", 1, TEST, PAGE, hva, _GMEM, offset=8)
    bind("bind_offset_wrap", 1, TEST, size, hva, _GMEM, offset=(1 << 64) - PAGE)
    bind("bind_past_end", 1, TEST, 8 * PAGE, hva, _GMEM)
    bind("bind_RO|GMEM", 1, TEST, size, hva, _GMEM | c.KVM_MEM_READONLY)
    bind("bind_LOG|GMEM", 1, TEST, size, hva, _GMEM | c.KVM_MEM_LOG_DIRTY_PAGES)
    lab.step("bind_GMEM_via_ioctl1", m.slot(1, TEST, size, host, _GMEM))
    bind("bind_unaligned_hva", 1, TEST, size, hva + 8, _GMEM)
    bind("bind_hva_0", 5, TEST + 0x900000, PAGE, 0, _GMEM, offset=3 * PAGE)
    bind("bind_ok", 1, TEST, 2 * PAGE, hva, _GMEM)
    bind("bind_overlap_gmem_range", 2, high, 2 * PAGE, hva, _GMEM, offset=PAGE)
    bind("bind_overlap_gpa", 2, TEST + PAGE, PAGE, hva, _GMEM, offset=2 * PAGE)
    bind("bind_disjoint_ok", 2, high, PAGE, hva, _GMEM, offset=2 * PAGE)
    bind("ioctl2_bad_flag_bit3", 3, TEST + 0x200000, PAGE, hva, 8)


def _file(lab: Lab, gmem: int) -> None:
    calls: tuple[tuple[str, Callable[[], int | None]], ...] = (
        ("fallocate_no_keep", lambda: fallocate(gmem, 0, 0, PAGE)),
        ("fallocate_keep", lambda: fallocate(gmem, KEEP_SIZE, 0, PAGE)),
        ("fallocate_beyond", lambda: fallocate(gmem, KEEP_SIZE, 4 * PAGE, PAGE)),
        ("punch_no_keep", lambda: fallocate(gmem, _PUNCH_ONLY, 0, PAGE)),
        ("punch_unaligned", lambda: fallocate(gmem, PUNCH, 8, PAGE)),
        ("punch_len_unaligned", lambda: fallocate(gmem, PUNCH, 0, 8)),
        ("punch_beyond", lambda: fallocate(gmem, PUNCH, 8 * PAGE, PAGE)),
        ("zero_range", lambda: fallocate(gmem, _ZERO_RANGE, 0, PAGE)),
        ("ftruncate", lambda: os.ftruncate(gmem, 8 * PAGE)),
        ("read", lambda: len(os.read(gmem, 1))),
        ("write", lambda: os.write(gmem, b"x")),
        ("pread", lambda: len(os.pread(gmem, 1, 0))),
    )
    for step, call in calls:
        lab.step(step, call)
    status = os.fstat(gmem)
    lab.step("fstat", lambda: 0, size=status.st_size, mode=f"0{status.st_mode:o}", blocks=status.st_blocks)
    lab.step("lseek_end", lambda: os.lseek(gmem, 0, os.SEEK_END))


def _mapped(fd: int) -> Callable[[], int]:
    """Give a call that maps a page of a file, and whose result is 0 if it can be mapped."""

    def call() -> int:
        file_mapping(fd, PAGE, mmap.PROT_READ)
        return 0

    return call


@scenario("attr_args", area=AREA, needs=("attributes",))
def attr_args(lab: Lab) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: ranges, attributes and flags that are refused."""
    private, last = c.KVM_MEMORY_ATTRIBUTE_PRIVATE, (1 << 64) - PAGE
    default = lab.machine()
    lab.step("default_vm_set_private", default.attributes(TEST, PAGE, private))
    lab.step("default_vm_set_0", default.attributes(TEST, PAGE, 0))
    m = lab.protected_machine()
    if m is None:
        return
    number = c.KVM_CAP_MEMORY_ATTRIBUTES
    lab.note("caps", cap=m.vm.check_extension(number), sys=m.kvm.check_extension(number))
    for step, address, size, attributes in (
        ("ok_private", TEST, PAGE, private),
        ("ok_again", TEST, PAGE, private),
        ("ok_clear", TEST, PAGE, 0),
        ("size_0", TEST, 0, private),
        ("addr_unaligned", TEST + 8, PAGE, private),
        ("size_unaligned", TEST, 8, private),
        ("wrap", last, 2 * PAGE, private),
        ("end_eq_2^64", last, PAGE, private),
        ("attr_READ_bit0", TEST, PAGE, 1),
        ("attr_bits_0_2", TEST, PAGE, 7),
        ("attr_PRIVATE|1", TEST, PAGE, 9),
        ("attr_bit63", TEST, PAGE, 1 << 63),
    ):
        lab.step(step, m.attributes(address, size, attributes))
    lab.step("flags_1", m.attributes(TEST, PAGE, private, flags=1))
    lab.step("bad_ptr", lambda: m.vm.ioctl(n.KVM_SET_MEMORY_ATTRIBUTES, 8))
    lab.step("whole_4GiB", m.attributes(0, 1 << 32, private))
    lab.step("whole_4GiB_clear", m.attributes(0, 1 << 32, 0))
    lab.step("above_maxphys", m.attributes(1 << 52, PAGE, private))
    request = kvm_memory_attributes(TEST, PAGE, private, 1)
    lab.step("on_vcpu_fd", lambda: m.vcpu.ioctl(n.KVM_SET_MEMORY_ATTRIBUTES, request))
