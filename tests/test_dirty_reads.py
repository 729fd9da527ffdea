"""What a page's first read dirties under linux-7.3, also on a kernel that lacks PROCMAP_QUERY (before 6.11)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from collections.abc import Callable, Iterator
from typing import Final

import pytest

import anykvm
from anykvm import GuestMemory, Hlt
from anykvm.abi import KVM_MEM_LOG_DIRTY_PAGES as LOG
from anykvm.backends.soft.backend import SoftBackend
from anykvm.conformance import compare_scenario, load
from anykvm.conformance.record import record_scenario
from anykvm.conformance.records_of import kernel_records
from anykvm.host.ranges import PAGE_SIZE as PAGE
from anykvm.testing.machine import Machine

HIGH: Final = 0x1000000
NAME: Final = "dirty_reads_by_memory"
PROCMAP_QUERY: Final = 0xC0686611
IOCTL: Final = 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def without_procmap_query() -> SoftBackend:
    """From now on this process has a kernel that does not know the ioctl."""
    code = (
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_EQUAL, 0, 3, IOCTL),
        (_LOAD, 0, 0, 24),  # args[1]
        (_JUMP_EQUAL, 0, 1, PROCMAP_QUERY),
        (_RETURN, 0, 0, _ERRNO | errno.ENOTTY),
        (_RETURN, 0, 0, _ALLOW),
    )
    program = Filter(len(code), b"".join(struct.pack("<HBBI", *line) for line in code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0
    with open("/proc/self/maps") as maps, pytest.raises(OSError) as caught:
        fcntl.ioctl(maps, PROCMAP_QUERY, bytearray(104))
    assert caught.value.errno == errno.ENOTTY
    return SoftBackend("linux-7.3")


@pytest.mark.parametrize("make", [lambda: SoftBackend("linux-7.3"), without_procmap_query])
def test_as_the_kernel_did(make: Callable[[], SoftBackend]) -> None:
    expected = kernel_records("linux-7.3").scenarios[NAME]
    assert not compare_scenario(NAME, expected, record_scenario(load()[NAME], make))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(4 * PAGE) as memory:
        memory[0 : memory.size] = bytes(memory.size)
        yield memory


@pytest.mark.parametrize(("profile", "expected"), [("documented", b"\2"), ("linux-7.3", b"\3")])
def test_a_profile_says_whether_reads_count(memory: GuestMemory, profile: str, expected: bytes) -> None:
    with anykvm.open("soft", profile) as kvm, Machine(kvm) as machine:
        machine.vm.map(memory, HIGH, 1, LOG)
        machine.long_mode(f"mov {HIGH:#x}, %al; mov %al, {HIGH + PAGE:#x}; hlt")
        assert machine.vcpu.run() == Hlt()
        assert machine.vm.get_dirty_log(1).rstrip(b"\0") == expected
