"""Ioctls that fail with EFAULT in the middle of writing: what is before the refusing page is written, nothing else is.

Sources: copy_to_user() goes upwards and stops; several copies of one ioctl have the order of x86.c and kvm_main.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from anykvm import abi
from anykvm.backends.soft import SoftBackend
from anykvm.host import libc
from soft_helpers import PAGE, Guest, error_of

RW = libc.PROT_READ | libc.PROT_WRITE
ANONYMOUS = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
FILL = 0xA5
SLOT_PAGES = 16384


class Case(NamedTuple):
    """An ioctl that writes."""

    request: int
    scope: str
    argument: bytes
    """What is at its argument."""
    reads: int
    """How much of that it reads before it writes."""
    writes: list[tuple[int, int]]
    """Offset and size of each copy, in order."""
    boundaries: list[int]
    """Where fields begin."""
    indirect: bool = False
    """The argument is a kvm_dirty_log, whose pointer is what is tested."""


def _fields(kind: type[ctypes.Structure]) -> list[int]:
    return [getattr(kind, field[0]).offset for field in kind._fields_]


def _plain(request: int, kind: type[ctypes.Structure], argument: bytes = b"") -> Case:
    return Case(request, "vcpu", argument, len(argument), [(0, ctypes.sizeof(kind))], _fields(kind))


def _array(request: int, scope: str, header: ctypes.Structure, entry: int, writes: list[str], entries: bytes) -> Case:
    """``writes``: the order of "header" and "entries"."""
    size = ctypes.sizeof(header)
    where = {"header": (0, size), "entries": (size, len(entries))}
    edges = [0, 4, size, size + entry - 4, size + entry, size + len(entries) - entry]
    reads = size + len(entries) if request in (abi.KVM_GET_MSRS, abi.KVM_GET_EMULATED_CPUID) else size
    return Case(request, scope, bytes(header) + entries, reads, [where[name] for name in writes], edges)


def _cases() -> dict[str, Case]:
    backend = SoftBackend()
    kvm = backend.open()

    def length(request: int, kind: type[ctypes.Structure], field: str) -> int:
        buffer = (ctypes.c_uint8 * 65536)()
        header = kind.from_buffer(buffer)
        setattr(header, field, 1000)
        backend.ioctl(kvm, request, ctypes.addressof(buffer))
        return int(getattr(header, field))

    cpuids = length(abi.KVM_GET_SUPPORTED_CPUID, abi.kvm_cpuid2, "nent")
    emulated = length(abi.KVM_GET_EMULATED_CPUID, abi.kvm_cpuid2, "nent")
    msrs = length(abi.KVM_GET_MSR_INDEX_LIST, abi.kvm_msr_list, "nmsrs")
    features = length(abi.KVM_GET_MSR_FEATURE_INDEX_LIST, abi.kvm_msr_list, "nmsrs")
    backend.close(kvm)
    entry = ctypes.sizeof(abi.kvm_cpuid_entry2)
    some = b"".join(bytes(abi.kvm_msr_entry(index=index)) for index in (0x174, 0x175, 0x277, 0xC0000081))
    one = bytes(abi.kvm_msr_entry(index=0x8B))
    pre_fault = abi.kvm_pre_fault_memory(gpa=0, size=PAGE)
    cases = {
        "KVM_GET_SUPPORTED_CPUID": _array(
            abi.KVM_GET_SUPPORTED_CPUID,
            "kvm",
            abi.kvm_cpuid2(cpuids),
            entry,
            ["entries", "header"],
            bytes(entry * cpuids),
        ),
        "KVM_GET_EMULATED_CPUID": _array(
            abi.KVM_GET_EMULATED_CPUID,
            "kvm",
            abi.kvm_cpuid2(emulated),
            entry,
            ["entries", "header"],
            bytes(entry * emulated),
        ),
        "KVM_GET_MSR_INDEX_LIST": _array(
            abi.KVM_GET_MSR_INDEX_LIST, "kvm", abi.kvm_msr_list(msrs), 4, ["header", "entries"], bytes(4 * msrs)
        ),
        "KVM_GET_MSR_FEATURE_INDEX_LIST": _array(
            abi.KVM_GET_MSR_FEATURE_INDEX_LIST,
            "kvm",
            abi.kvm_msr_list(features),
            4,
            ["header", "entries"],
            bytes(4 * features),
        ),
        "KVM_GET_MSRS of the system": _array(abi.KVM_GET_MSRS, "kvm", abi.kvm_msrs(1), 16, ["entries"], one),
        "KVM_GET_MSRS": _array(abi.KVM_GET_MSRS, "vcpu", abi.kvm_msrs(4), 16, ["entries"], some),
        "KVM_GET_CPUID2": _array(
            abi.KVM_GET_CPUID2, "vcpu", abi.kvm_cpuid2(cpuids), entry, ["entries", "header"], bytes(entry * cpuids)
        ),
        "KVM_GET_DIRTY_LOG": Case(abi.KVM_GET_DIRTY_LOG, "vm", b"", 0, [(0, SLOT_PAGES // 8)], [0, 8, 64, 1024], True),
        "KVM_TRANSLATE": _plain(
            abi.KVM_TRANSLATE, abi.kvm_translation, bytes(abi.kvm_translation(linear_address=0x1234))
        ),
        "KVM_PRE_FAULT_MEMORY": _plain(abi.KVM_PRE_FAULT_MEMORY, abi.kvm_pre_fault_memory, bytes(pre_fault)),
    }
    for name, kind in {
        "REGS": abi.kvm_regs,
        "SREGS": abi.kvm_sregs,
        "SREGS2": abi.kvm_sregs2,
        "FPU": abi.kvm_fpu,
        "XSAVE": abi.kvm_xsave,
        "XSAVE2": abi.kvm_xsave,
        "XCRS": abi.kvm_xcrs,
        "DEBUGREGS": abi.kvm_debugregs,
        "VCPU_EVENTS": abi.kvm_vcpu_events,
        "MP_STATE": abi.kvm_mp_state,
    }.items():
        cases[f"KVM_GET_{name}"] = _plain(getattr(abi, f"KVM_GET_{name}"), kind)
    return cases


CASES = _cases()


class Area:
    """Two pages, one after the other, of which one refuses."""

    def __init__(self) -> None:
        self.at = libc.mmap(0, 2 * PAGE, 0, ANONYMOUS)
        self.file = os.memfd_create("short")  # of no bytes

    def map(self, page: int, prot: int, file: int = -1) -> None:
        kind = libc.MAP_FIXED | (ANONYMOUS if file < 0 else libc.MAP_SHARED)
        libc.mmap(self.at + page * PAGE, PAGE, prot, kind, file)

    def close(self) -> None:
        libc.mmap(self.at, 2 * PAGE, 0, ANONYMOUS | libc.MAP_FIXED)
        libc.munmap(self.at, 2 * PAGE)
        os.close(self.file)


REFUSALS: dict[str, Callable[[Area, int], None]] = {
    "PROT_NONE": lambda area, page: libc.mprotect(area.at + page * PAGE, PAGE, libc.PROT_NONE),
    "PROT_READ": lambda area, page: libc.mprotect(area.at + page * PAGE, PAGE, libc.PROT_READ),
    "unmapped": lambda area, page: libc.munmap(area.at + page * PAGE, PAGE),
    "beyond the file": lambda area, page: area.map(page, RW, area.file),
}


class World:
    def __init__(self) -> None:
        self.guest = Guest(SoftBackend())
        self.memory = libc.mmap(0, SLOT_PAGES * PAGE, RW, ANONYMOUS | libc.MAP_NORESERVE)
        cap = abi.kvm_enable_cap(cap=abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(3,))  # reading changes nothing
        self.guest.backend.ioctl(self.guest.vm, abi.KVM_ENABLE_CAP, ctypes.addressof(cap))
        assert self.guest.slot(0, 0, SLOT_PAGES * PAGE, self.memory, abi.KVM_MEM_LOG_DIRTY_PAGES) == 0
        table = (ctypes.c_uint8 * 65536)()
        abi.kvm_cpuid2.from_buffer(table).nent = 1000
        self.guest.backend.ioctl(self.guest.kvm, abi.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(table))
        self.guest.backend.ioctl(self.guest.vcpu, abi.KVM_SET_CPUID2, ctypes.addressof(table))
        events = abi.kvm_vcpu_events()
        self.guest.backend.ioctl(self.guest.vcpu, abi.KVM_GET_VCPU_EVENTS, ctypes.addressof(events))

    def do(self, case: Case, address: int) -> int:
        fd = {"kvm": self.guest.kvm, "vm": self.guest.vm, "vcpu": self.guest.vcpu}[case.scope]
        log = abi.kvm_dirty_log(slot=0)
        log.dirty_bitmap = address
        return error_of(self.guest.backend, fd, case.request, ctypes.addressof(log) if case.indirect else address)

    def close(self) -> None:
        self.guest.close()
        libc.munmap(self.memory, SLOT_PAGES * PAGE)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    yield made
    made.close()


def written(world: World, case: Case) -> bytes:
    """All that it writes when nothing refuses, over FILL."""
    buffer = ctypes.create_string_buffer(bytes([FILL]) * (3 * PAGE), 3 * PAGE)
    ctypes.memmove(buffer, case.argument, len(case.argument))
    assert world.do(case, ctypes.addressof(buffer)) == 0
    end = max(offset + size for offset, size in case.writes)
    assert set(buffer.raw[max(end, len(case.argument)) :]) == {FILL}
    return buffer.raw[:end]


def expected(case: Case, before: bytes, answer: bytes, split: int, page: int, readable: bool) -> bytes:
    """What is there afterwards. ``split``: where in the argument the second page begins; ``page``: which refuses."""

    def refuses(at: int) -> bool:
        return (at >= split) == bool(page)

    after = bytearray(before)
    if not readable and any(refuses(at) for at in range(case.reads)):
        return before
    for offset, size in case.writes:
        for at in range(offset, offset + size):
            if refuses(at):
                return bytes(after)
            after[at] = answer[at]
    raise AssertionError("nothing refuses")


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_behind_the_page_that_refuses(world: World, area: Area, name: str, refusal: str) -> None:
    case = CASES[name]
    answer = written(world, case)
    size = max(len(answer), len(case.argument))
    splits = {*case.boundaries, *(at + 1 for at in case.boundaries), size // 2, size - 1}
    for split in sorted(at for at in splits if 0 < at < size):
        for page in (0, 1):
            if not any(((at >= split) == bool(page)) for offset, n in case.writes for at in (offset, offset + n - 1)):
                continue  # it writes nothing there
            area.map(0, RW)
            area.map(1, RW)
            start = area.at + PAGE - split
            before = case.argument + bytes([FILL]) * (size - len(case.argument))
            ctypes.memset(area.at, FILL, 2 * PAGE)
            ctypes.memmove(start, before, len(before))
            REFUSALS[refusal](area, page)
            assert world.do(case, start) == errno.EFAULT
            good = 1 - page  # of the other page everything can be looked at
            whole = bytearray(bytes([FILL]) * (2 * PAGE))
            whole[PAGE - split : PAGE - split + size] = expected(
                case, before, answer + before[len(answer) :], split, page, refusal == "PROT_READ"
            )
            found = ctypes.string_at(area.at + good * PAGE, PAGE)
            assert found == bytes(whole[good * PAGE : (good + 1) * PAGE]), (split, page)


@pytest.mark.parametrize("name", CASES)
def test_no_page_at_all(world: World, name: str) -> None:
    for address in (0, 8, (1 << 47) - PAGE, 1 << 47, 1 << 63, (1 << 64) - 8):
        assert world.do(CASES[name], address) == errno.EFAULT


@pytest.mark.parametrize("name", [name for name in CASES if "CPUID" in name or "LIST" in name])
def test_too_short_an_array(world: World, area: Area, name: str) -> None:
    """E2BIG: the lists of MSRs say how many there are, the CPUID tables nothing; no entry is written."""
    case = CASES[name]
    answer = written(world, case)
    area.map(0, RW)
    area.map(1, libc.PROT_NONE)
    header = 4 if "LIST" in name else 8
    start = area.at + PAGE - header
    ctypes.memset(area.at, FILL, PAGE)
    ctypes.memset(start, 0, header)
    assert world.do(case, start) == errno.E2BIG
    assert ctypes.string_at(start, 4) == (answer[:4] if "LIST" in name else bytes(4))
    assert ctypes.string_at(area.at, PAGE - header) == bytes([FILL]) * (PAGE - header)


def test_a_header_that_is_only_read(world: World, area: Area) -> None:
    """msr_io() writes the entries: the page of nmsrs may be read-only."""
    case = CASES["KVM_GET_MSRS"]
    answer = written(world, case)
    area.map(0, RW)
    area.map(1, RW)
    start = area.at + PAGE - ctypes.sizeof(abi.kvm_msrs)
    ctypes.memmove(start, case.argument, len(case.argument))
    libc.mprotect(area.at, PAGE, libc.PROT_READ)
    assert world.do(case, start) == 0
    assert ctypes.string_at(start, len(answer)) == answer


@pytest.mark.parametrize("refusal", [name for name in REFUSALS if name != "PROT_READ"])
@pytest.mark.parametrize(
    "name", ["REGS", "SREGS", "SREGS2", "FPU", "XSAVE", "XCRS", "DEBUGREGS", "VCPU_EVENTS", "MSRS", "CPUID2"]
)
def test_what_cannot_be_read_changes_nothing(world: World, area: Area, name: str, refusal: str) -> None:
    """Setters read all of their argument first: of a change whose last or first bytes refuse nothing is taken over."""
    case, request = CASES[f"KVM_GET_{name}"], getattr(abi, f"KVM_SET_{name}")
    before = written(world, case)
    other = bytearray(before)
    at = {"MSRS": 16, "CPUID2": 8 + 12, "VCPU_EVENTS": 8, "XCRS": 16, "SREGS": 0, "SREGS2": 0}.get(name, 24)
    other[at] ^= 2
    for split in {1, 8, len(before) // 2, len(before) - 1}:
        for page in (0, 1):
            area.map(0, RW)
            area.map(1, RW)
            start = area.at + PAGE - split
            ctypes.memmove(start, bytes(other), len(other))
            REFUSALS[refusal](area, page)
            assert error_of(world.guest.backend, world.guest.vcpu, request, start) == errno.EFAULT
            assert written(world, case) == before


def test_a_bitmap_that_cannot_be_read_clears_nothing(world: World, area: Area) -> None:
    case = CASES["KVM_GET_DIRTY_LOG"]
    before = written(world, case)
    area.map(0, RW)
    area.map(1, libc.PROT_NONE)
    ctypes.memset(area.at, 0xFF, PAGE)
    log = abi.kvm_clear_dirty_log(slot=0, num_pages=SLOT_PAGES)
    for split in (0, 1, 8, 100, SLOT_PAGES // 8 - 1):
        log.dirty_bitmap = area.at + PAGE - split
        args = world.guest.vm, abi.KVM_CLEAR_DIRTY_LOG, ctypes.addressof(log)
        assert error_of(world.guest.backend, *args) == errno.EFAULT
        assert written(world, case) == before
