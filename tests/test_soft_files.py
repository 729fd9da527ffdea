"""Descriptors of the soft backend: real ones, with the kernel's lifetimes."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import threading
import weakref
from collections.abc import Iterator

import pytest

from anykvm import abi
from anykvm.backends.base import Backend
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.vcpu import VcpuFile
from anykvm.backends.soft.vm import Vm, VmFile
from soft_helpers import PAGE, Guest, error_of, refused


@pytest.fixture
def backend() -> SoftBackend:
    return SoftBackend()


@pytest.fixture
def guest(backend: SoftBackend) -> Iterator[Guest]:
    made = Guest(backend)
    yield made
    for fd in (made.vcpu, made.vm, made.kvm):
        try:
            backend.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


def vm_of(fd: int) -> Vm:
    file = FILES.get(fd)
    assert isinstance(file, VmFile | VcpuFile)
    return file.vm


def test_protocol(backend: SoftBackend) -> None:
    assert isinstance(backend, Backend)
    assert (backend.name, backend.profile, repr(backend)) == ("soft", "documented", "SoftBackend('documented')")
    assert SoftBackend("linux-7.3").profile == "linux-7.3"
    with pytest.raises(ValueError, match="no profile named 'xen'; there are documented, linux-7.3"):
        SoftBackend("xen")


def test_real_descriptors(guest: Guest) -> None:
    poll = select.poll()
    for fd in (guest.kvm, guest.vm, guest.vcpu):
        poll.register(fd)
        assert not os.get_inheritable(fd)  # O_CLOEXEC
        with pytest.raises(OSError):
            os.ftruncate(fd, PAGE)  # nobody takes the pages away
    assert {events for _, events in poll.poll(0)} == {select.POLLIN | select.POLLOUT}


def test_duplicates_are_the_same_file(guest: Guest) -> None:
    twin = os.dup(guest.vm)
    assert error_of(guest.backend, twin, abi.KVM_CREATE_VCPU, 0) == errno.EEXIST
    guest.backend.close(guest.vm)
    assert guest.backend.ioctl(twin, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_USER_MEMORY) == 1
    vcpu = os.dup(guest.vcpu)
    guest.backend.close(guest.vcpu)
    regs = abi.kvm_regs()
    assert guest.backend.ioctl(vcpu, abi.KVM_GET_REGS, ctypes.addressof(regs)) == 0
    assert regs.rip == 0xFFF0
    guest.backend.close(vcpu)
    guest.backend.close(twin)


@pytest.mark.parametrize("order", ["vm_first", "vcpu_first"])
def test_vm_lives_while_a_descriptor_of_it_does(guest: Guest, order: str) -> None:
    vm = weakref.ref(vm_of(guest.vm))
    first, last = (guest.vm, guest.vcpu) if order == "vm_first" else (guest.vcpu, guest.vm)
    guest.backend.close(first)
    gc.collect()
    assert vm() is not None
    if order == "vm_first":
        assert guest.backend.ioctl(guest.vcpu, abi.KVM_GET_TSC_KHZ) == 1_000_000
    else:  # the vCPU is its VM's: its number stays taken
        assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 0) == errno.EEXIST
    guest.backend.close(last)
    assert vm() is None  # at once, without the garbage collector


def test_descriptors_closed_behind_our_back(guest: Guest) -> None:
    vm = weakref.ref(vm_of(guest.vm))
    os.close(guest.vcpu)
    os.close(guest.vm)
    assert error_of(guest.backend, guest.vm, abi.KVM_CHECK_EXTENSION, 3) == errno.EBADF
    guest.backend.close(guest.kvm)
    assert vm() is None
    with refused(errno.EBADF):
        guest.backend.close(guest.kvm)


def test_number_reused_for_another_vcpu(guest: Guest) -> None:
    run_once(guest, guest.vcpu, b"\xf4")
    os.close(guest.vcpu)
    again = guest.backend.ioctl(guest.vm, abi.KVM_CREATE_VCPU, 1)
    assert again == guest.vcpu
    regs = abi.kvm_regs()
    guest.backend.ioctl(again, abi.KVM_GET_REGS, ctypes.addressof(regs))
    assert regs.rip == 0xFFF0
    assert guest.backend.ioctl(again, abi.KVM_RUN) == 0  # the new one: at its reset vector, where nothing is
    guest.backend.ioctl(again, abi.KVM_GET_REGS, ctypes.addressof(regs))
    assert regs.rip == 0xFFF0


def run_once(guest: Guest, vcpu: int, code: bytes) -> None:
    page = ctypes.create_string_buffer(2 * PAGE)
    start = -(-ctypes.addressof(page) // PAGE) * PAGE
    ctypes.memmove(start, code, len(code))
    assert guest.slot(0, 0, PAGE, start) == 0
    sregs = abi.kvm_sregs()
    guest.backend.ioctl(vcpu, abi.KVM_GET_SREGS, ctypes.addressof(sregs))
    sregs.cs.base = sregs.cs.selector = 0
    guest.backend.ioctl(vcpu, abi.KVM_SET_SREGS, ctypes.addressof(sregs))
    regs = abi.kvm_regs(rip=0, rflags=2)
    guest.backend.ioctl(vcpu, abi.KVM_SET_REGS, ctypes.addressof(regs))
    assert guest.backend.ioctl(vcpu, abi.KVM_RUN) == 0
    assert guest.slot(0, 0, 0, 0) == 0


def test_wrong_descriptors(guest: Guest) -> None:
    backend = guest.backend
    with open("/dev/null") as other:
        for request in (abi.KVM_GET_API_VERSION, abi.KVM_RUN):
            assert error_of(backend, other.fileno(), request) == errno.ENOTTY
            assert error_of(backend, 9999, request) == errno.EBADF
            assert error_of(backend, -1, request) == errno.EBADF
            assert error_of(backend, 1 << 40, request) == errno.EBADF
        with refused(errno.ENODEV):
            backend.mmap(other.fileno(), PAGE, 0)
    # an ioctl of another kind of file; KVM_RUN on what is no vCPU
    assert error_of(backend, guest.kvm, abi.KVM_RUN) == errno.EINVAL
    assert error_of(backend, guest.vm, abi.KVM_RUN) == errno.ENOTTY
    assert error_of(backend, guest.kvm, abi.KVM_GET_REGS) == errno.EINVAL
    assert error_of(backend, guest.vm, abi.KVM_GET_REGS) == errno.ENOTTY
    assert error_of(backend, guest.vcpu, abi.KVM_CREATE_VCPU) == errno.EINVAL
    for request in (0, 0x1234, 0xAEFF, 0xFFFFFFFF):
        assert error_of(backend, guest.kvm, request) == errno.EINVAL
        assert error_of(backend, guest.vm, request) == errno.ENOTTY
        assert error_of(backend, guest.vcpu, request) == errno.EINVAL


def test_mmap(guest: Guest) -> None:
    backend = guest.backend
    size = backend.ioctl(guest.kvm, abi.KVM_GET_VCPU_MMAP_SIZE)
    address = backend.mmap(guest.vcpu, size, 0)
    second = backend.mmap(guest.vcpu, PAGE, PAGE)
    ctypes.memset(address + PAGE, 0x5A, 1)
    assert ctypes.string_at(second, 1) == b"\x5a"
    backend.munmap(second, PAGE)
    for fd in (guest.vm, guest.kvm):
        with refused(errno.ENODEV):
            backend.mmap(fd, PAGE, 0)
    for length, offset in ((0, 0), (-1, 0), (size + 1, 0), (PAGE, 1), (PAGE, size), (PAGE, -PAGE)):
        with refused(errno.EINVAL):
            backend.mmap(guest.vcpu, length, offset)
    with refused(errno.EBADF):
        backend.mmap(9999, PAGE, 0)
    with refused(errno.EINVAL):
        backend.munmap(address + 1, PAGE)
    guest.backend.close(guest.vcpu)
    assert ctypes.string_at(address + PAGE, 1) == b"\x5a"  # a mapping outlives its descriptor
    backend.munmap(address, size)


def test_another_process(guest: Guest) -> None:
    """After fork: EIO for the VM and the vCPU, KVM_RUN included; /dev/kvm still works."""
    run_once(guest, guest.vcpu, b"\xf4")  # so that the descriptor is on the fast path
    pid = os.fork()
    if pid == 0:
        codes = [
            error_of(guest.backend, guest.vm, abi.KVM_CHECK_EXTENSION, 3) == errno.EIO,
            error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 1) == errno.EIO,
            error_of(guest.backend, guest.vcpu, abi.KVM_GET_REGS) == errno.EIO,
            error_of(guest.backend, guest.vcpu, abi.KVM_RUN) == errno.EIO,
            Guest(guest.backend).backend.ioctl(guest.kvm, abi.KVM_GET_API_VERSION) == 12,
        ]
        guest.backend.close(guest.vcpu)
        guest.backend.close(guest.vm)
        os._exit(0 if all(codes) else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 0) == errno.EEXIST  # nothing changed here


def test_dead_vm(guest: Guest) -> None:
    vm_of(guest.vm).kill()
    assert error_of(guest.backend, guest.vm, abi.KVM_CHECK_EXTENSION, 3) == errno.EIO
    assert error_of(guest.backend, guest.vcpu, abi.KVM_GET_REGS) == errno.EIO
    assert error_of(guest.backend, guest.vcpu, abi.KVM_RUN) == errno.EIO


def test_out_of_descriptors(guest: Guest) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        with pytest.raises(OSError):
            while True:
                fillers.append(os.dup(0))
        assert error_of(guest.backend, guest.vm, abi.KVM_CREATE_VCPU, 7) == errno.EMFILE
        assert error_of(guest.backend, guest.kvm, abi.KVM_CREATE_VM) == errno.EMFILE
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    guest.backend.close(guest.backend.ioctl(guest.vm, abi.KVM_CREATE_VCPU, 7))  # its number was not used up


def test_close_while_the_vcpu_runs(guest: Guest) -> None:
    """Whoever is in KVM_RUN holds the file: closing every descriptor frees nothing under it."""
    page = ctypes.create_string_buffer(2 * PAGE)
    start = -(-ctypes.addressof(page) // PAGE) * PAGE
    ctypes.memmove(start, b"\xeb\xfe", 2)  # jmp .
    assert guest.slot(0, 0, PAGE, start) == 0
    sregs = abi.kvm_sregs()
    guest.backend.ioctl(guest.vcpu, abi.KVM_GET_SREGS, ctypes.addressof(sregs))
    sregs.cs.base = sregs.cs.selector = 0
    guest.backend.ioctl(guest.vcpu, abi.KVM_SET_SREGS, ctypes.addressof(sregs))
    regs = abi.kvm_regs(rip=0, rflags=2)
    guest.backend.ioctl(guest.vcpu, abi.KVM_SET_REGS, ctypes.addressof(regs))
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(error_of(guest.backend, guest.vcpu, abi.KVM_RUN)))
    vm = vm_of(guest.vm)
    thread.start()
    threading.Event().wait(0.05)
    for fd in (guest.vcpu, guest.vm, guest.kvm):
        guest.backend.close(fd)
    vm.kill()  # the only way left to stop it
    gone = weakref.ref(vm)
    del vm
    thread.join(10)
    assert results == [errno.EIO]
    gc.collect()
    assert gone() is None
