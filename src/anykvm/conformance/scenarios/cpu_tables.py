"""The lists of CPUID entries and MSRs: how long they may be, and what a wrong entry does."""

from __future__ import annotations

import ctypes
from typing import Final

from anykvm.abi import ioctls as n
from anykvm.abi.structures import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_entry, kvm_msr_list, kvm_msrs
from anykvm.api.flexible import flexible, tail
from anykvm.api.handle import Handle
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "cpu_tables"
_MSR_TSC_AUX: Final = 0xC0000103
_MSR_LSTAR: Final = 0xC0000082
_MSR_STAR: Final = 0xC0000081
_MSR_EFER: Final = 0xC0000080
_MSR_PAT: Final = 0x277
_MSR_APIC_BASE: Final = 0x1B
_MSR_SYSENTER_EIP: Final = 0x176
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_MSR_MTRR_DEF_TYPE: Final = 0x2FF
_NO_MSR: Final = 0x12345678
_CPUID: Final = bytes.fromhex("0fa289df89d6e610f4")  # cpuid; mov edi, ebx; mov esi, edx; out 0x10, al; hlt
_RDMSR: Final = bytes.fromhex("0f32e610f4")  # rdmsr; out 0x10, al; hlt
_WRMSR: Final = bytes.fromhex("4889c248c1ea200f30e610f4")  # mov rdx, rax; shr rdx, 32; wrmsr; out 0x10, al; hlt


def _msrs(
    m: Machine, request: int, entries: list[tuple[int, int]], count: int | None = None
) -> tuple[Outcome, list[int]]:
    """KVM_GET_MSRS or KVM_SET_MSRS that says it has ``count`` entries (default: all), and the values afterwards."""
    buffer, header = flexible(kvm_msrs, kvm_msr_entry, len(entries))
    header.nmsrs = len(entries) if count is None else count
    array = tail(buffer, header, kvm_msr_entry, len(entries))
    for entry, (index, data) in zip(array, entries, strict=True):
        entry.index, entry.data = index, data
    outcome = attempt(lambda: m.vcpu.ioctl(request, buffer))
    return outcome, [entry.data for entry in array]


@scenario("msr_counts", area=AREA)
def msr_counts(lab: Lab) -> None:
    """0 to 255 entries; the first MSR that does not exist ends the list, and the result says how far it got."""
    m = lab.machine()
    entry = (_MSR_LSTAR, 0x1000)
    for count in (0, 1, 255, 256, 0xFFFFFFFF):
        lab.step("SET", _msrs(m, n.KVM_SET_MSRS, [entry] * min(count, 256), count)[0], nmsrs=count)
        lab.step("GET", _msrs(m, n.KVM_GET_MSRS, [entry] * min(count, 256), count)[0], nmsrs=count)
    for request, name in ((n.KVM_SET_MSRS, "SET"), (n.KVM_GET_MSRS, "GET")):
        for step, entries in (
            ("unknown_first", [(_NO_MSR, 1), (_MSR_LSTAR, 2)]),
            ("unknown_second", [(_MSR_LSTAR, 3), (_NO_MSR, 1), (_MSR_STAR, 4)]),
        ):
            outcome, values = _msrs(m, request, entries)
            lab.step(f"{name}_{step}", outcome, values=[hex(value) for value in values])


@scenario("msr_values", area=AREA)
def msr_values(lab: Lab) -> None:
    """Values that user space may set and may not: canonical addresses, reserved bits, types of memory."""
    m = lab.machine()
    for name, index, values in (
        ("LSTAR", _MSR_LSTAR, (0xFFFFFFFF81000000, 1 << 63)),
        ("SYSENTER_EIP", _MSR_SYSENTER_EIP, (0x1000, 1 << 60 | 0x2000)),
        ("KERNEL_GS_BASE", _MSR_KERNEL_GS_BASE, (0x7FFFFFFFF000, 1 << 60)),
        ("PAT", _MSR_PAT, (0x0007040600070406, 0x0002000000000000, 0x0800000000000000)),
        ("EFER", _MSR_EFER, (0xD00, 0xD01, 1 << 1, 1 << 63)),
        ("APIC_BASE", _MSR_APIC_BASE, (0xFEE00900, 0xFEE00901, 1 << 52)),
        ("MTRR_DEF_TYPE", _MSR_MTRR_DEF_TYPE, (0xC06, 0x2, 0x1000)),
        ("STAR", _MSR_STAR, (0xFFFFFFFFFFFFFFFF,)),
    ):
        for value in values:
            lab.step(name, _msrs(m, n.KVM_SET_MSRS, [(index, value)])[0], value=hex(value))
            outcome, got = _msrs(m, n.KVM_GET_MSRS, [(index, 0)])
            lab.step(f"{name}_read", outcome, value=hex(got[0]))


@scenario("msr_guest", area=AREA)
def msr_guest(lab: Lab) -> None:
    """RDMSR and WRMSR of the guest: values, and #GP for what does not exist or is reserved."""
    m = lab.machine()
    for step, guest, index, value in (
        ("write_LSTAR", _WRMSR, _MSR_LSTAR, 0x123456789000),
        ("read_LSTAR", _RDMSR, _MSR_LSTAR, 0),
        ("read_unknown", _RDMSR, _NO_MSR, 0),
        ("write_unknown", _WRMSR, _NO_MSR, 0),
        ("write_EFER_reserved", _WRMSR, _MSR_EFER, 0xD02),
        ("write_EFER_clear_LME", _WRMSR, _MSR_EFER, 0xC00),
        ("write_PAT_reserved_type", _WRMSR, _MSR_PAT, 0x0200),
    ):
        m.at(guest, rcx=index, rax=value)
        m.run(step)


def _list(lab: Lab, handle: Handle, request: int, name: str, header: type[ctypes.Structure], field: str) -> None:
    """Ask for a list with room for nothing, for one less than there is, for all, and for far more."""
    size = 4096
    buffer, head = flexible(header, ctypes.c_uint64 * 5, size)
    known = 0
    for step, room in (("none", 0), ("plenty", size), ("one_less", -1), ("exact", -2)):
        room = room if room >= 0 else known + room + (0 if room == -1 else 2)
        setattr(head, field, room)
        outcome = lab.ioctl(f"{name}_{step}", handle, request, buffer)
        count = getattr(head, field)
        if not outcome.failed:
            known = count
        lab.note(f"{name}_{step}_count", kept=count == room, counted=count > 0)


@scenario("list_sizes", area=AREA)
def list_sizes(lab: Lab) -> None:
    """Lists that KVM gives: E2BIG for too little room, and whether the number that is needed is said."""
    m = lab.machine()
    _list(lab, m.kvm, n.KVM_GET_SUPPORTED_CPUID, "SUPPORTED_CPUID", kvm_cpuid2, "nent")
    _list(lab, m.kvm, n.KVM_GET_MSR_INDEX_LIST, "MSR_INDEX_LIST", kvm_msr_list, "nmsrs")
    _list(lab, m.vcpu, n.KVM_GET_CPUID2, "GET_CPUID2", kvm_cpuid2, "nent")


def _cpuid(count: int) -> ctypes.Array[ctypes.c_uint8]:
    buffer, header = flexible(kvm_cpuid2, kvm_cpuid_entry2, count)
    header.nent = count
    for number, entry in enumerate(tail(buffer, header, kvm_cpuid_entry2, count)):
        entry.function, entry.eax = 0x40000100 + number, number
    return buffer


@scenario("cpuid_counts", area=AREA)
def cpuid_counts(lab: Lab) -> None:
    """0 to 256 CPUID entries, once and again; also in the older form."""
    m = lab.machine()
    for count in (0, 1, 256, 257):
        lab.ioctl("SET_CPUID2", m.vcpu, n.KVM_SET_CPUID2, _cpuid(count), nent=count)
    buffer, header = flexible(kvm_cpuid2, kvm_cpuid_entry2, 257)
    header.nent = 257
    lab.ioctl("SET_CPUID_257", m.vcpu, n.KVM_SET_CPUID, buffer)


@scenario("cpuid_after_run", area=AREA)
def cpuid_after_run(lab: Lab) -> None:
    """Once the vCPU has run its table may be set again, but not changed."""
    m = lab.machine()
    table = m.vcpu.get_cpuid2()
    lab.step("before_run", attempt(lambda: m.vcpu.set_cpuid2(table)))
    m.at(bytes.fromhex("e610f4"))  # out 0x10, al; hlt
    m.run("run")
    lab.step("same", attempt(lambda: m.vcpu.set_cpuid2(m.vcpu.get_cpuid2())))
    lab.step("shorter", attempt(lambda: m.vcpu.set_cpuid2(table[:-1])))
    changed = m.vcpu.get_cpuid2()
    changed[0].ebx ^= 1
    lab.step("changed", attempt(lambda: m.vcpu.set_cpuid2(changed)))


@scenario("cpuid_guest", area=AREA)
def cpuid_guest(lab: Lab) -> None:
    """The guest reads the table it was given: entries, subleaves that count, and leaves beyond the last."""
    m = lab.machine()
    table = [
        kvm_cpuid_entry2(function=0, eax=7, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65),
        kvm_cpuid_entry2(function=7, index=0, flags=1, eax=1, ebx=0x111),
        kvm_cpuid_entry2(function=7, index=1, flags=1, eax=0x777, ebx=0x222),
        kvm_cpuid_entry2(function=0x40000000, eax=0x40000001, ebx=0x333),
        kvm_cpuid_entry2(function=0x40000001, eax=0x444),
        kvm_cpuid_entry2(function=0x80000000, eax=0x80000001, ebx=0x555),
        kvm_cpuid_entry2(function=0x80000001, eax=0x666, edx=1 << 29 | 1 << 20),
    ]
    m.vcpu.set_cpuid2(table)
    for step, leaf, subleaf in (
        ("leaf_0", 0, 0),
        ("leaf_0_subleaf_ignored", 0, 9),
        ("leaf_7_0", 7, 0),
        ("leaf_7_1", 7, 1),
        ("leaf_7_2_absent", 7, 2),
        ("leaf_3_absent", 3, 0),
        ("leaf_8_beyond", 8, 0),
        ("leaf_40000001", 0x40000001, 0),
        ("leaf_40000002_beyond", 0x40000002, 0),
        ("leaf_80000001", 0x80000001, 0),
        ("leaf_80000002_beyond", 0x80000002, 0),
    ):
        m.at(_CPUID, rax=leaf, rcx=subleaf)
        m.run(step)
