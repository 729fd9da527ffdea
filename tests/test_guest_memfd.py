"""guest_memfd on the soft backend: the file, its binding to slots, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from anykvm import GuestMemory, Hlt, abi
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.files import FILES
from anykvm.testing.private import AREA, FLAG, PAGE, SIZE, PrivateGuest, private_guest
from soft_helpers import refused

MMAP, INIT_SHARED = abi.GUEST_MEMFD_FLAG_MMAP, abi.GUEST_MEMFD_FLAG_INIT_SHARED
FAULT = abi.KVM_EXIT_MEMORY_FAULT
READ = "mov (%rbx), %rax; hlt"
GONE = (errno.EFAULT, FAULT, AREA, PAGE, FLAG)


@pytest.fixture
def backend(each_profile: str) -> SoftBackend:
    return SoftBackend(each_profile)


@pytest.fixture
def mapping_backend(mapping_profile: str) -> SoftBackend:
    return SoftBackend(mapping_profile)


@pytest.fixture
def guest(backend: SoftBackend) -> Iterator[PrivateGuest]:
    with private_guest(backend) as made:
        yield made


@pytest.mark.parametrize(("type", "flags"), [(abi.KVM_X86_DEFAULT_VM, 3), (abi.KVM_X86_SW_PROTECTED_VM, 1)])
def test_flags_of_a_vm_type(mapping_backend: SoftBackend, type: int, flags: int) -> None:
    with private_guest(mapping_backend, type) as guest:
        assert guest.vm.check_extension(abi.KVM_CAP_GUEST_MEMFD_FLAGS) == flags
        assert guest.vm.check_extension(abi.KVM_CAP_GUEST_MEMFD) == 1
        assert guest.vm.check_extension(abi.KVM_CAP_MULTI_ADDRESS_SPACE) == (1 if type else 2)
        with refused(errno.EINVAL, "flags"):
            guest.vm.create_guest_memfd(PAGE, flags + 1)


def every_descriptor() -> Iterator[int]:
    """Take all that the limit leaves."""
    with contextlib.suppress(OSError):
        while True:
            yield os.dup(0)


@pytest.mark.parametrize("size", [0, PAGE + 1, -PAGE])
def test_sizes(guest: PrivateGuest, size: int) -> None:
    with refused(errno.EINVAL, "size"):
        guest.vm.create_guest_memfd(size)


def test_no_descriptor_left(guest: PrivateGuest) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(os.listdir("/proc/self/fd"))
    try:
        for spare in (0, 1):  # one for the caller, one for the engine
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, used)) + 1, hard))
            taken = list(every_descriptor())
            for fd in taken[:spare]:
                os.close(fd)
            with refused(errno.EMFILE):
                guest.vm.create_guest_memfd(PAGE)
            for fd in taken[spare:]:
                os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(os.listdir("/proc/self/fd")) == used


def test_slots_are_bound_for_good(guest: PrivateGuest) -> None:
    with refused(errno.EINVAL, "can only be deleted"):
        guest.bind()
    with refused(errno.EINVAL):
        guest.vm.set_user_memory_region(1, AREA, SIZE, guest.shared.address)
    with refused(errno.EEXIST, "another slot"):
        guest.bind(slot=2, gpa=AREA * 2, size=PAGE, offset=SIZE - PAGE)
    with refused(errno.EINVAL, "beyond"):
        guest.bind(slot=2, gpa=AREA * 2, size=2 * PAGE, offset=SIZE - PAGE)
    guest.vm.unmap(1)
    for slot in range(4):  # neighbours in the file are no overlap
        guest.bind(slot=1 + slot, gpa=AREA + slot * 2 * PAGE, size=2 * PAGE, offset=slot * 2 * PAGE)
    with refused(errno.EEXIST):
        guest.bind(slot=5, gpa=AREA * 2, size=PAGE, offset=3 * PAGE)
    guest.vm.unmap(2)
    guest.bind(slot=5, gpa=AREA * 2, size=PAGE, offset=3 * PAGE)


def test_what_can_be_bound(guest: PrivateGuest) -> None:
    with private_guest(guest.kvm.backend) as other:  # type: ignore[arg-type]
        for fd, code in ((-1, errno.EBADF), (guest.vm.fileno(), errno.EINVAL), (other.gmem, errno.EINVAL)):
            with refused(code):
                guest.bind(slot=2, gpa=AREA * 2, fd=fd & 0xFFFFFFFF)
    read_end, write_end = os.pipe()
    with refused(errno.EINVAL):
        guest.bind(slot=2, gpa=AREA * 2, fd=read_end)
    os.close(read_end)
    os.close(write_end)


def test_a_slot_in_the_middle_of_the_file(guest: PrivateGuest) -> None:
    guest.vm.unmap(1)
    guest.bind(size=2 * PAGE, offset=4 * PAGE)
    guest.load("movq $0x55, 4096(%rbx); hlt")
    guest.private()
    assert guest.vcpu.run() == Hlt()
    guest.vm.unmap(1)
    guest.bind()
    guest.load("mov 5 * 4096(%rbx), %rax; hlt")
    assert guest.vcpu.run() == Hlt() and guest.rax() == 0x55


@pytest.mark.parametrize("close", ["backend", "close(2)"])
def test_the_last_descriptor(guest: PrivateGuest, close: str) -> None:
    """A duplicate keeps the file; without any, private accesses fail, and shared ones do not."""
    guest.load(READ)
    guest.private()
    assert guest.vcpu.run() == Hlt()
    duplicate, fd, guest.gmem = os.dup(guest.gmem), guest.gmem, -1
    end = guest.kvm.backend.close if close == "backend" else os.close
    end(fd)
    guest.load(READ)
    assert guest.vcpu.run() == Hlt()
    end(duplicate)
    guest.load(READ)
    assert guest.fails() == GONE
    guest.public()
    assert guest.vcpu.run() == Hlt()
    guest.vm.unmap(1)


def test_a_mapping_keeps_the_file(mapping_backend: SoftBackend) -> None:
    with private_guest(mapping_backend, flags=MMAP) as guest:
        guest.load(READ)
        guest.private()
        mapped = GuestMemory(PAGE, fd=guest.gmem)
        mapping_backend.close(guest.gmem)
        guest.gmem = -1
        assert guest.vcpu.run() == Hlt()
        mapped.close()
        guest.load(READ)
        assert guest.fails() == GONE


def test_closed_under_a_running_guest(guest: PrivateGuest) -> None:
    guest.load("1: mov (%rbx), %rax; jmp 1b")
    guest.private()
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(guest.fails()))
    thread.start()
    os.close(guest.gmem)
    guest.gmem = -1
    thread.join(30)
    assert found == [GONE]


def test_it_keeps_the_vm(backend: SoftBackend) -> None:
    before = len(FILES)
    guest = PrivateGuest(backend)
    fd, guest.gmem = guest.gmem, -1
    guest.close()
    assert len(FILES) == before + 1
    assert os.fstat(fd).st_size == SIZE
    backend.close(fd)
    assert len(FILES) == before


def test_every_page_is_given_back(backend: SoftBackend) -> None:
    """Neither descriptors nor mappings of the engine's are left."""

    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("guest_memfd")

    backend.close(backend.open())  # what other tests left behind goes when a KVM file is closed
    before = used()
    for _ in range(3):
        with private_guest(backend) as guest:
            backend.close(guest.gmem)
            guest.gmem = -1
    now = used()  # fewer, if something of an earlier test went meanwhile
    assert now[0] <= before[0] and now[1] <= before[1]


def test_mapping_by_the_backend(mapping_backend: SoftBackend) -> None:
    backend = mapping_backend
    with private_guest(backend) as guest, refused(errno.ENODEV):
        backend.mmap(guest.gmem, PAGE, 0)
    with private_guest(backend, abi.KVM_X86_DEFAULT_VM, MMAP | INIT_SHARED) as guest:
        address = backend.mmap(guest.gmem, PAGE, PAGE)
        ctypes.memset(address, 0x5A, 8)
        guest.load("mov 4096(%rbx), %rax; hlt")
        assert guest.vcpu.run() == Hlt() and guest.rax() == 0x5A5A5A5A5A5A5A5A
        backend.munmap(address, PAGE)


def test_touching_private_memory_is_sigbus(mapping_backend: SoftBackend) -> None:
    backend = mapping_backend
    with private_guest(backend, flags=MMAP) as guest:
        address = backend.mmap(guest.gmem, PAGE, 0)
        child = os.fork()
        if not child:
            import signal

            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            ctypes.memset(address, 1, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -7
        backend.munmap(address, PAGE)


def test_slots_of_nothing_but_the_file(mapping_backend: SoftBackend) -> None:
    """With GUEST_MEMFD_FLAG_MMAP shared accesses use the file too, and user space sees what they write."""
    with private_guest(mapping_backend, abi.KVM_X86_DEFAULT_VM, MMAP | INIT_SHARED) as guest:
        guest.shared.unmap(0, SIZE)
        guest.load("movq $0x1234, (%rbx); hlt")
        assert guest.vcpu.run() == Hlt()
        with mmap.mmap(guest.gmem, PAGE) as mapped:
            assert mapped[:2] == b"\x34\x12"
        guest.vm.discard_guest_memfd(guest.gmem, 0, PAGE)
        guest.load(READ)
        assert guest.vcpu.run() == Hlt() and guest.rax() == 0
        os.close(guest.gmem)
        guest.gmem = -1
        guest.load(READ)
        assert guest.fails() == (errno.EFAULT, FAULT, AREA, PAGE, 0)


def test_punched_under_a_running_guest(guest: PrivateGuest) -> None:
    """The page is zero for a guest that is in the middle of using it."""
    guest.load("movq $1, (%rbx); movb $1, 0x60000; 1: cmpq $0, (%rbx); jne 1b; hlt")
    guest.private()
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(guest.vcpu.run()))
    thread.start()
    while not guest.memory[0x60000]:
        pass
    guest.vm.discard_guest_memfd(guest.gmem, 0, PAGE)
    thread.join(30)
    assert found == [Hlt()]
