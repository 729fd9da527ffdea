"""Which object a descriptor stands for, whatever happened to its number; and when an object is over."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from anykvm import abi
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.vcpu import VcpuFile
from anykvm.backends.soft.vm import Vm, VmFile
from anykvm.host import libc
from soft_helpers import PAGE, Guest, error_of

MARK = 0x123456789ABC
F_DUPFD_CLOEXEC = 1030
TARGETS = [
    "another vCPU",
    "another VM's vCPU",
    "its VM",
    "another VM",
    "/dev/kvm",
    "a guest_memfd",
    "an ordinary file",
]


class World:
    """Two VMs, three vCPUs, a guest_memfd, an ordinary file; `number` is a vCPU's, and KVM_RUN was done on it."""

    def __init__(self) -> None:
        self.backend = SoftBackend()
        self.one, self.two = Guest(self.backend), Guest(self.backend)
        sibling = self.backend.ioctl(self.one.vm, abi.KVM_CREATE_VCPU, 1)
        protected = self.backend.ioctl(self.one.kvm, abi.KVM_CREATE_VM, abi.KVM_X86_SW_PROTECTED_VM)
        request = abi.kvm_create_guest_memfd(size=PAGE)
        gmem = self.backend.ioctl(protected, abi.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(request))
        self.targets = {
            "another vCPU": sibling,
            "another VM's vCPU": self.two.vcpu,
            "its VM": self.one.vm,
            "another VM": self.two.vm,
            "/dev/kvm": self.one.kvm,
            "a guest_memfd": gmem,
            "an ordinary file": os.open("/dev/null", os.O_RDWR),
        }
        assert list(self.targets) == TARGETS
        self.extra = [protected, gmem, sibling, self.targets["an ordinary file"]]
        self.number = self.one.vcpu
        for index, fd in enumerate((self.number, sibling, self.two.vcpu)):
            regs = self.regs(fd)
            regs.rbx = MARK + index
            self.backend.ioctl(fd, abi.KVM_SET_REGS, ctypes.addressof(regs))
            assert error_of(self.backend, fd, abi.KVM_RUN) == 0  # at the reset vector: nothing is there

    def regs(self, fd: int) -> abi.kvm_regs:
        regs = abi.kvm_regs()
        self.backend.ioctl(fd, abi.KVM_GET_REGS, ctypes.addressof(regs))
        return regs

    def close(self) -> None:
        for fd in (*self.extra, *(fd for g in (self.one, self.two) for fd in (g.vcpu, g.vm, g.kvm))):
            with suppress(OSError):
                self.backend.close(fd)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def by_dup2(world: World, target: int) -> None:
    os.dup2(target, world.number)


def by_dup3(world: World, target: int) -> None:
    os.dup2(target, world.number, inheritable=False)


def by_close_and_dupfd(world: World, target: int) -> None:
    os.close(world.number)
    assert fcntl.fcntl(target, fcntl.F_DUPFD, world.number) == world.number


def by_close_range_and_dupfd(world: World, target: int) -> None:
    os.closerange(world.number, world.number + 1)
    assert fcntl.fcntl(target, F_DUPFD_CLOEXEC, world.number) == world.number


def by_backend_close_and_dupfd(world: World, target: int) -> None:
    world.backend.close(world.number)
    assert fcntl.fcntl(target, fcntl.F_DUPFD, world.number) == world.number


def by_scm_rights(world: World, target: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [target]))])
        fillers = []  # so that the number is the lowest free one
        while (filler := os.open("/dev/null", os.O_RDONLY)) < world.number:
            fillers.append(filler)
        os.close(filler)
        os.close(world.number)
        received = array.array("i")
        received.frombytes(theirs.recvmsg(1, 64)[1][0][2])
        for filler in fillers:
            os.close(filler)
    assert received[0] == world.number


HOW = [by_dup2, by_dup3, by_close_and_dupfd, by_close_range_and_dupfd, by_backend_close_and_dupfd, by_scm_rights]
ALL_REQUESTS = sorted(
    value
    for name, value in vars(abi).items()
    if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == 0xAE
)


def answer(world: World, fd: int, request: int) -> tuple[int, bool]:
    """Errno and whether there is a result, of an ioctl whose argument is 0."""
    try:
        result = world.backend.ioctl(fd, request, 0)
    except OSError as error:
        return error.errno or -1, False
    if request in (abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU):
        world.backend.close(result)
    return 0, True


def mapped(world: World, fd: int) -> int:
    """Errno of mmap, 0 when it works."""
    try:
        world.backend.munmap(world.backend.mmap(fd, PAGE, 0), PAGE)
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", TARGETS)
def test_a_number_is_what_is_open_there(world: World, name: str, how: Callable[[World, int], None]) -> None:
    how(world, world.targets[name])
    check_same(world, world.targets[name])


def check_same(world: World, target: int) -> None:
    number = world.number
    assert mapped(world, number) == mapped(world, target)
    for request in ALL_REQUESTS:
        if request in (abi.KVM_CREATE_VCPU, abi.KVM_SET_TSC_KHZ, abi.KVM_SET_BOOT_CPU_ID):
            continue  # the first call would change what the second says
        assert answer(world, number, request) == answer(world, target, request), abi.ioctl_name(request)
    if answer(world, target, abi.KVM_RUN) == (0, True):
        assert world.regs(number).rbx == world.regs(target).rbx != MARK


CLOSING: list[Callable[[World], None]] = [
    lambda world: os.close(world.number),
    lambda world: os.closerange(world.number, world.number + 1),
    lambda world: world.backend.close(world.number),
]


@pytest.mark.parametrize("close", CLOSING, ids=["close", "close_range", "backend"])
def test_a_closed_number_is_nothing(world: World, close: Callable[[World], None]) -> None:
    close(world)
    for request in ALL_REQUESTS:
        assert answer(world, world.number, request) == (errno.EBADF, False), abi.ioctl_name(request)
    assert mapped(world, world.number) == errno.EBADF


@pytest.mark.parametrize("fd", [-1, -(1 << 31), 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 200, -(1 << 200)])
def test_numbers_that_no_descriptor_has(world: World, fd: int) -> None:
    for request in (abi.KVM_RUN, abi.KVM_GET_REGS, abi.KVM_CREATE_VCPU, abi.KVM_GET_API_VERSION):
        assert answer(world, fd, request) == (errno.EBADF, False)
    assert mapped(world, fd) == errno.EBADF
    with pytest.raises(OSError) as caught:
        world.backend.close(fd)
    assert caught.value.errno == errno.EBADF


def test_request_with_upper_bits(world: World) -> None:
    """An ioctl's number has 32 bits."""
    assert answer(world, world.number, abi.KVM_RUN | 1 << 32) == (0, True)
    assert answer(world, world.one.vm, abi.KVM_RUN | 1 << 32) == (errno.ENOTTY, False)


def test_child_of_fork(world: World) -> None:
    """EIO for what was its parent's VM's, by whichever number; EBADF and ENOTTY as in the parent."""
    twin = os.dup(world.number)
    pid = os.fork()
    if not pid:
        os.dup2(world.two.vcpu, twin)
        known = [world.number, world.one.vm, twin]
        right = [
            answer(world, fd, abi.KVM_RUN if fd != world.one.vm else abi.KVM_GET_TSC_KHZ)[0] == errno.EIO
            for fd in known
        ]
        os.close(world.number)
        right.append(answer(world, world.number, abi.KVM_RUN)[0] == errno.EBADF)
        os.dup2(world.targets["an ordinary file"], world.number)
        right.append(answer(world, world.number, abi.KVM_RUN)[0] == errno.ENOTTY)
        os._exit(0 if all(right) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert answer(world, world.number, abi.KVM_RUN) == (0, True)
    os.close(twin)


# -- when an object is over --------------------------------------------------------------------------------------------


def vm_of(fd: int) -> weakref.ref[Vm]:
    file = FILES.get(fd)
    assert isinstance(file, VmFile | VcpuFile)
    return weakref.ref(file.vm)


@pytest.fixture
def backend() -> SoftBackend:
    return SoftBackend()


@pytest.fixture
def kvm(backend: SoftBackend) -> Iterator[int]:
    fd = backend.open()
    yield fd
    backend.close(fd)


def touch(backend: SoftBackend) -> None:
    """Something made and closed, so that what was closed without a word is searched for."""
    backend.close(backend.open())


def test_duplicates_keep_it(backend: SoftBackend, kvm: int) -> None:
    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vm, twins = vm_of(fd), [os.dup(fd) for _ in range(3)]
    for one in (fd, *twins[:-1]):
        backend.close(one)
        touch(backend)
        assert vm() is not None
    assert backend.ioctl(twins[-1], abi.KVM_GET_TSC_KHZ) == 1_000_000
    backend.close(twins[-1])
    assert vm() is None


@pytest.mark.parametrize("by", ["backend", "close"])
def test_in_flight_keeps_it(backend: SoftBackend, kvm: int, by: str) -> None:
    """A descriptor that is in a socket alone: it comes out as what it was."""
    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vm = vm_of(fd)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        backend.close(fd) if by == "backend" else os.close(fd)
        for _ in range(3):
            touch(backend)
        assert vm() is not None
        (fd,) = socket.recv_fds(theirs, 1, 1)[1]
    assert backend.ioctl(fd, abi.KVM_GET_TSC_KHZ) == 1_000_000
    backend.close(fd)
    assert vm() is None


def test_lost_in_flight(backend: SoftBackend, kvm: int) -> None:
    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vm = vm_of(fd)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        backend.close(fd)
        assert vm() is not None
    touch(backend)
    assert vm() is None


@pytest.mark.parametrize("by", ["backend", "close"])
def test_a_mapping_keeps_it(backend: SoftBackend, kvm: int, by: str) -> None:
    vm_fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vcpu, vm = backend.ioctl(vm_fd, abi.KVM_CREATE_VCPU), vm_of(vm_fd)
    address = backend.mmap(vcpu, PAGE, 0)
    for fd in (vcpu, vm_fd):
        backend.close(fd) if by == "backend" else os.close(fd)
    touch(backend)
    assert vm() is not None
    backend.munmap(address, PAGE)
    touch(backend)
    assert vm() is None


def test_a_child_keeps_it(backend: SoftBackend, kvm: int) -> None:
    """As in the kernel: a child that has the descriptor keeps the VM, until it ends."""
    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vm = vm_of(fd)
    release, wait = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(wait)
        os.read(release, 1)
        os._exit(0)
    backend.close(fd)
    touch(backend)
    assert vm() is not None
    os.close(wait)
    os.waitpid(pid, 0)
    touch(backend)
    assert vm() is None
    os.close(release)


def test_a_child_closes(backend: SoftBackend, kvm: int) -> None:
    """What a child closes is its own."""
    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    pid = os.fork()
    if not pid:
        backend.close(fd)
        os._exit(0 if error_of(backend, fd, abi.KVM_GET_TSC_KHZ) == errno.EBADF else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert backend.ioctl(fd, abi.KVM_GET_TSC_KHZ) == 1_000_000
    backend.close(fd)


@pytest.mark.parametrize("descriptors", ["some", "none"])
@pytest.mark.parametrize("by", ["a VM", "a file", "another vCPU", "nothing"])
def test_a_number_that_changes_while_it_is_mapped(
    backend: SoftBackend, kvm: int, by: str, descriptors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dup2() or close() of another thread, between the look-up and mmap(2): never pages of another file."""
    import resource

    vm = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    number = backend.ioctl(vm, abi.KVM_CREATE_VCPU, 0)
    another = backend.ioctl(vm, abi.KVM_CREATE_VCPU, 1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd, mark in ((number, 1), (another, 2)):
        address = backend.mmap(fd, PAGE, 0)
        ctypes.c_uint8.from_address(address + PAGE - 1).value = mark
        backend.munmap(address, PAGE)
    targets = {"a VM": vm, "a file": null, "another vCPU": another}
    get = FILES.get
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def get_and_change(fd: int) -> object:
        file = get(fd)
        if by == "nothing":
            os.close(number)
        else:
            os.dup2(targets[by], number)
        return file

    monkeypatch.setattr(FILES, "get", get_and_change)
    fillers = []
    if descriptors == "none":
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(n) for n in os.listdir("/proc/self/fd")) + 4, hard))
        with suppress(OSError):
            while True:
                fillers.append(os.dup(null))
    try:
        address = backend.mmap(number, PAGE, 0)
        assert descriptors == "some" and ctypes.c_uint8.from_address(address + PAGE - 1).value == 1
        backend.munmap(address, PAGE)
    except OSError as error:
        assert descriptors == "none" and error.errno in (errno.EBADF, errno.ENODEV, errno.EACCES)
    finally:
        monkeypatch.undo()
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in {vm, another, null} | ({number} if by != "nothing" else set()):
            os.close(fd)


def test_no_descriptor_to_ask_with(backend: SoftBackend, kvm: int) -> None:
    """Closing with every number taken."""
    import resource

    fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    vm = vm_of(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(n) for n in os.listdir("/proc/self/fd")) + 4, hard))
    try:
        with pytest.raises(OSError):
            while True:
                fillers.append(os.dup(0))
        backend.close(fd)
        assert vm() is None
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_closed_behind_our_back(backend: SoftBackend, kvm: int) -> None:
    """They are found while others are made; nobody ever closes one by the backend."""
    before, seen = len(FILES), 0
    for _ in range(300):
        os.close(backend.ioctl(kvm, abi.KVM_CREATE_VM))
        seen = max(seen, len(FILES) - before)
    assert seen < 100
    touch(backend)
    assert len(FILES) == before


def test_closing_costs_the_same_among_many(backend: SoftBackend, kvm: int) -> None:
    """Among 400 VMs closing one costs no more than a few times what it does among 10; it was 30 times."""

    def cost(others: int) -> float:
        fds = [backend.ioctl(kvm, abi.KVM_CREATE_VM) for _ in range(others)]
        best = 1.0
        for _ in range(20):
            fd = backend.ioctl(kvm, abi.KVM_CREATE_VM)
            start = time.thread_time()
            backend.close(fd)
            best = min(best, time.thread_time() - start)
        for fd in fds:
            backend.close(fd)
        return best

    few = cost(10)
    assert cost(400) < 5 * few + 0.0001


@pytest.mark.parametrize("lose", [os.close, SoftBackend().close, lambda fd: os.close(os.dup2(0, fd))])
def test_held_while_it_runs(backend: SoftBackend, lose: Callable[[int], object]) -> None:
    """Every way to lose a running vCPU's last descriptor frees nothing under it."""
    page = libc.mmap(0, PAGE, libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    ctypes.memmove(page, b"\xff\x06\x00\x01\xeb\xfa", 6)  # incw 0x100; jmp 0
    counter = ctypes.c_uint16.from_address(page + 0x100)
    guest = Guest(backend)
    assert guest.slot(0, 0, PAGE, page) == 0
    sregs = abi.kvm_sregs()
    backend.ioctl(guest.vcpu, abi.KVM_GET_SREGS, ctypes.addressof(sregs))
    sregs.cs.base = sregs.cs.selector = sregs.ds.base = 0
    backend.ioctl(guest.vcpu, abi.KVM_SET_SREGS, ctypes.addressof(sregs))
    regs = abi.kvm_regs(rip=0, rflags=2)
    backend.ioctl(guest.vcpu, abi.KVM_SET_REGS, ctypes.addressof(regs))
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(error_of(backend, guest.vcpu, abi.KVM_RUN)))
    vm = vm_of(guest.vm)
    thread.start()
    _until(lambda: counter.value != 0)
    for fd in (guest.vcpu, guest.vm, guest.kvm):
        lose(fd)
    touch(backend)
    before = counter.value
    _until(lambda: counter.value != before)  # it runs on
    held = vm()
    assert held is not None
    held.kill()
    del held
    thread.join(10)
    assert results == [errno.EIO]
    gc.collect()
    touch(backend)
    assert vm() is None
    libc.munmap(page, PAGE)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
