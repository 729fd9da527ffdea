"""Every call of the waist is atomic: a signal handler, or an exception out of nowhere, comes before it or after it.

A trace function stands for the handler: it is called between any two bytecodes of the caller's thread, at each in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import anykvm
from anykvm import abi
from anykvm.backends.soft import SoftBackend, guest_memfd, memslots, system, vcpu, vcpu_state, vm
from anykvm.backends.soft.files import FILES
from anykvm.host import atomic
from anykvm.layers.annotate import Annotate
from soft_helpers import PAGE

Tracer = Callable[[FrameType, str, Any], Any]
SOURCE = os.path.dirname(anykvm.__file__)
SLOT_GPA = 1 << 30


class Stop(BaseException):
    """What a signal handler raises: like KeyboardInterrupt, no Exception."""


class At:
    """Within the block do something before the n-th bytecode that this thread executes in anykvm's source."""

    def __init__(self, n: int, do: Callable[[], None]) -> None:
        self.left = n
        self.do = do

    @property
    def reached(self) -> bool:
        return self.left < 0

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == -1:
                self.do()
        return self._trace

    def __enter__(self) -> At:
        self.old = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.old)


def stop() -> None:
    raise Stop


def at_each(call: Callable[[], object], do: Callable[[], None]) -> Iterator[object]:
    """Do ``call`` again and again, with ``do`` at its first bytecode, its second, ...: what it gives, or raises."""
    for n in range(10_000):
        with At(n, do) as at:
            try:
                result: object = call()
            except (OSError, Stop) as error:
                result = error
        yield result
        if not at.reached:
            return
    raise AssertionError("it never ends")


def soft_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(("/memfd:kvm", "/memfd:guest_memfd")):
                found.add(int(name))
    return found - {file.hidden_fd for file in FILES._files.values()}


def mappings() -> int:
    gc.collect()  # a frame in a traceback may hold a vCPU, as an ioctl under way does
    with open("/proc/self/maps") as maps:
        return sum("memfd:kvm" in line or "rwxp" in line for line in maps)


def vcpu_mappings() -> set[int]:
    """Addresses."""
    with open("/proc/self/maps") as maps:
        return {int(line.split("-")[0], 16) for line in maps if "memfd:kvm-vcpu" in line}


class World:
    """A VM, its vCPU, and two pages for slots, on the waist."""

    def __init__(self) -> None:
        self.backend = SoftBackend()
        self.pages = anykvm.GuestMemory(4 * PAGE)
        self.kvm = self.backend.open()
        self.vm = self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM, abi.KVM_X86_SW_PROTECTED_VM)
        self.vcpu = self.backend.ioctl(self.vm, abi.KVM_CREATE_VCPU)
        self.argument = ctypes.create_string_buffer(16384)  # zeros, and large enough for all

    def close(self) -> None:
        for fd in (self.vcpu, self.vm, self.kvm):
            self.backend.close(fd)
        self.pages.close()

    def slot(self, number: int, size: int) -> int:
        region = abi.kvm_userspace_memory_region(
            slot=number,
            guest_phys_addr=SLOT_GPA + number * PAGE,
            memory_size=size,
            userspace_addr=self.pages.address,
            flags=abi.KVM_MEM_LOG_DIRTY_PAGES if size else 0,
        )
        return self.backend.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))

    def use(self) -> None:
        """What a handler does: ioctls of the same system file, VM and vCPU, none of which may fail."""
        self.slot(2, PAGE)
        self.slot(2, 0)
        self.backend.ioctl(self.vcpu, abi.KVM_GET_MP_STATE, ctypes.addressof(ctypes.create_string_buffer(8)))
        self.backend.close(self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM))

    def check(self) -> None:
        """Slots are what the table says, and every file has its descriptor."""
        with contextlib.suppress(OSError):
            self.slot(1, 0)  # EINVAL: it is not there
        self.slot(1, PAGE)
        self.slot(1, 0)
        assert len(FILES) == len(soft_descriptors())


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def fields(request: int, world: World) -> bytes:
    """An argument with which an ioctl does something, where zeros are refused at once."""
    address = world.pages.address
    made: dict[int, ctypes.Structure] = {
        abi.KVM_SET_USER_MEMORY_REGION: abi.kvm_userspace_memory_region(
            slot=1, guest_phys_addr=SLOT_GPA, memory_size=PAGE, userspace_addr=address
        ),
        abi.KVM_SET_USER_MEMORY_REGION2: abi.kvm_userspace_memory_region2(
            slot=1, guest_phys_addr=SLOT_GPA, memory_size=PAGE, userspace_addr=address
        ),
        abi.KVM_SET_MEMORY_ATTRIBUTES: abi.kvm_memory_attributes(address=0, size=PAGE, attributes=8),
        abi.KVM_CREATE_GUEST_MEMFD: abi.kvm_create_guest_memfd(size=PAGE),
        abi.KVM_GET_DIRTY_LOG: abi.kvm_dirty_log(slot=3, dirty_bitmap=address),
        abi.KVM_CLEAR_DIRTY_LOG: abi.kvm_clear_dirty_log(slot=3, num_pages=1, dirty_bitmap=address),
        abi.KVM_ENABLE_CAP: abi.kvm_enable_cap(cap=abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(1, 0, 0, 0)),
        abi.KVM_PRE_FAULT_MEMORY: abi.kvm_pre_fault_memory(gpa=SLOT_GPA + 3 * PAGE, size=PAGE),
    }
    return bytes(made.get(request, b""))


NUMBERS = {abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_CHECK_EXTENSION, abi.KVM_SET_TSC_KHZ, abi.KVM_GET_TSC_KHZ}
NUMBERS |= {abi.KVM_GET_API_VERSION, abi.KVM_GET_VCPU_MMAP_SIZE, abi.KVM_SET_BOOT_CPU_ID, abi.KVM_SET_NR_MMU_PAGES}
CREATES = {abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_CREATE_GUEST_MEMFD}
ALL = [
    *(("kvm", request) for request in system._HANDLERS),
    *(("vm", request) for request in vm._HANDLERS),
    *(("vcpu", request) for request in vcpu_state.HANDLERS),
]
sweep = pytest.mark.parametrize(("kind", "request_"), ALL, ids=[f"{k}-{abi.ioctl_name(r)}" for k, r in ALL])


def prepared(world: World, kind: str, request: int) -> Callable[[], int]:
    """Do this ioctl; again and again."""
    fd = getattr(world, kind)
    world.slot(3, PAGE)
    data = fields(request, world)

    def call() -> int:
        ctypes.memset(world.argument, 0, len(world.argument))
        ctypes.memmove(world.argument, data, len(data))
        if request in NUMBERS:
            return world.backend.ioctl(fd, request, 7 if request == abi.KVM_CREATE_VCPU else 0)
        return world.backend.ioctl(fd, request, ctypes.addressof(world.argument))

    return call


def undo(world: World, request: int, result: object) -> None:
    """As before the call, so that it can be done again."""
    if request in (abi.KVM_SET_USER_MEMORY_REGION, abi.KVM_SET_USER_MEMORY_REGION2):
        with contextlib.suppress(OSError):
            world.slot(1, 0)


@sweep
def test_a_handler_that_uses_the_api_changes_nothing(world: World, kind: str, request_: int) -> None:
    call = prepared(world, kind, request_)
    before = soft_descriptors()
    try:
        expected: object = call()
    except OSError as error:
        expected = (error.errno, error.strerror)
    if request_ in CREATES and isinstance(expected, int):
        world.backend.close(expected)
        expected = "descriptor"
    used = 0

    def use() -> None:
        nonlocal used
        used += 1
        world.use()

    undo(world, request_, expected)
    for got in at_each(call, use):
        if isinstance(got, OSError):
            found: object = (got.errno, got.strerror)
        elif request_ in CREATES:
            world.backend.close(int(str(got)))
            found = "descriptor"
        else:
            found = got
        if request_ == abi.KVM_CREATE_VCPU:
            expected = (17, "KVM_CREATE_VCPU: this vcpu_id is in use: 7")  # a vCPU lives as long as its VM
        assert found == expected
        undo(world, request_, found)
    assert used > 10 and soft_descriptors() == before
    world.check()


@sweep
def test_a_handler_that_raises_leaves_all_or_nothing(world: World, kind: str, request_: int) -> None:
    call = prepared(world, kind, request_)
    with contextlib.suppress(OSError):
        made = call()  # what is made at the first use is there
        if request_ in CREATES:
            world.backend.close(made)
    undo(world, request_, None)
    before, maps, stopped = soft_descriptors(), mappings(), 0
    for got in at_each(call, stop):
        stopped += isinstance(got, Stop)
        if isinstance(got, int) and request_ in CREATES:
            world.backend.close(got)
        for fd in soft_descriptors() - before:  # its number was lost, as that of a system call is
            world.backend.close(fd)
        undo(world, request_, got)
        if kind == "vm":
            world.check()
    assert stopped > 10
    world.check()
    assert (soft_descriptors(), mappings()) == (before, maps)


def test_open_mmap_and_close_leave_all_or_nothing(world: World) -> None:
    backend = world.backend
    for got in at_each(backend.open, stop):
        for fd in soft_descriptors() - {world.kvm, world.vm, world.vcpu}:
            backend.close(fd)
        assert isinstance(got, int | Stop) and len(FILES) == 3
    mapped = vcpu_mappings()
    for got in at_each(lambda: backend.mmap(world.vcpu, PAGE, 0), stop):
        if isinstance(got, int):
            backend.munmap(got, PAGE)
        for address in vcpu_mappings() - mapped:  # lost on its way, as mmap(2)'s is; it would keep the vCPU
            backend.munmap(address, PAGE)
    fd = -1

    def again() -> None:
        nonlocal fd
        with contextlib.suppress(OSError):
            backend.close(fd)  # as after an error of close(2): is it open or not?
        assert len(FILES) == 3 == len(soft_descriptors())
        fd = backend.ioctl(world.kvm, abi.KVM_CREATE_VM)

    again()
    for _ in at_each(lambda: backend.close(fd), stop):
        again()
    backend.close(fd)
    world.check()


# -- the objects of the API --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [False, True], ids=["soft", "annotate"])
def test_objects_that_a_handler_interrupts_are_not_lost(layer: bool) -> None:
    backend = Annotate(SoftBackend()) if layer else SoftBackend()
    memory = anykvm.GuestMemory(PAGE)

    def whole() -> None:
        with anykvm.open(backend) as kvm, kvm.create_vm() as machine:
            machine.map(memory, 0)
            machine.create_vcpu()
            machine.unmap(0)

    whole()
    before = soft_descriptors(), mappings(), len(FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a Kvm that was made, and lost on its way back
        for n in range(5, 5000, 7):  # a quick walk through it; a prime, so that neighbours differ
            with At(n, stop) as at, contextlib.suppress(Stop):
                whole()
            if not at.reached:
                break
            assert (soft_descriptors(), mappings(), len(FILES)) == before
        else:
            raise AssertionError("it never ends")


def test_close_that_a_handler_interrupts_is_whole_and_can_be_done_again() -> None:
    for n in range(1000):
        kvm = anykvm.open("soft")
        machine = kvm.create_vm()
        vcpu = machine.create_vcpu()
        with At(n, stop) as at, contextlib.suppress(Stop):
            kvm.close()
        states = {kvm.closed, machine.closed, vcpu.closed}
        assert len(states) == 1
        kvm.close()
        assert kvm.closed and vcpu.closed and not soft_descriptors() and not len(FILES)
        if not at.reached:
            return


def test_an_object_that_is_dropped_executes_nothing_on_the_callers_thread() -> None:
    """So no handler can raise in its finalizer, where it would be swallowed."""
    lines: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(SOURCE):
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")

    for make in (lambda: anykvm.open("soft"), lambda: anykvm.GuestMemory(PAGE)):
        made = [make()]
        old = sys.gettrace()
        with contextlib.ExitStack() as expected:
            if isinstance(made[0], anykvm.Kvm):
                expected.enter_context(pytest.warns(ResourceWarning, match="unclosed <Kvm"))
            sys.settrace(trace)
            made.clear()
            sys.settrace(old)
    assert not lines and not soft_descriptors()


# -- what really happens -----------------------------------------------------------------------------------------------


INNER: list[tuple[object, str]] = [
    *((module, "copy_from_user") for module in (vm, guest_memfd)),
    (vm, "_create_vcpu"),
    (memslots, "check_region"),
    (memslots, "_for_engine"),
    (memslots.AddressSpace, "index"),
    (memslots.Memslots, "_commit"),
    (vcpu, "create_vcpu"),
    (FILES, "create"),
    (FILES, "map"),
    (FILES, "install"),
    (FILES, "reap"),
    (vm.Vm, "__init__"),
]
"""What an ioctl goes through on its way."""


def test_a_signal_in_the_middle_waits_until_the_ioctl_is_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def handler(*_: object) -> None:
        log.append("handler")
        raise Stop

    def interrupting(inner: Callable[..., object]) -> Callable[..., object]:
        def outer(*arguments: object, **named: object) -> object:
            log.append("inside")
            os.kill(os.getpid(), signal.SIGUSR1)
            try:
                return inner(*arguments, **named)
            finally:
                os.kill(os.getpid(), signal.SIGUSR1)
                log.append("inside")

        return outer

    for owner, name in INNER:
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    monkeypatch.setitem(vm._HANDLERS, abi.KVM_CREATE_VCPU, vm._create_vcpu)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        for call in (
            lambda: world.slot(1, PAGE),
            lambda: world.slot(1, 0),
            lambda: world.backend.ioctl(world.kvm, abi.KVM_CREATE_VM),
            lambda: world.backend.ioctl(world.vm, abi.KVM_CREATE_VCPU, 3),
            lambda: world.backend.close((soft_descriptors() - {world.kvm, world.vm, world.vcpu}).pop()),
        ):
            log.clear()
            with pytest.raises(Stop):
                call()
            assert log.count("inside") >= 2 and log.index("handler") == log.count("inside"), log
    finally:
        signal.signal(signal.SIGUSR1, old)
    monkeypatch.undo()
    for fd in soft_descriptors() - {world.kvm, world.vm, world.vcpu}:
        world.backend.close(fd)
    world.check()


def test_a_signal_handler_that_uses_the_api(world: World) -> None:
    """The real thing, for a second: a timer, whose handler has slot 2, interrupts a program that has slot 1."""
    handled = 0
    inside = False

    def handler(*_: object) -> None:
        nonlocal handled, inside
        if inside:
            return  # Python runs a handler within a handler
        inside = True
        handled += 1
        world.slot(2, PAGE)
        world.slot(2, 0)
        inside = False

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 3e-4)
    try:
        end = time.monotonic() + 30
        while handled < 300 and time.monotonic() < end:
            world.slot(1, PAGE)
            world.slot(1, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert handled == 300
    world.check()


def test_an_exception_thrown_at_a_thread(world: World) -> None:
    """PyThreadState_SetAsyncExc, as debuggers and test runners do it."""
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    throw.argtypes = (ctypes.c_ulong, ctypes.py_object)
    thrown = 0
    armed = False

    def body() -> None:
        nonlocal thrown, armed
        while thrown < 50:
            try:
                armed = True
                while True:
                    world.slot(1, PAGE)
                    world.slot(1, 0)
            except Stop:
                armed = False
                thrown += 1
            with contextlib.suppress(OSError):
                world.slot(1, 0)

    thread = threading.Thread(target=body)
    thread.start()
    while thread.is_alive():
        if armed:
            seen = thrown
            throw(thread.ident or 0, Stop)
            while thread.is_alive() and thrown == seen:
                time.sleep(0)
    thread.join()
    assert thrown == 50
    world.check()


# -- the worker and the rest of the process ----------------------------------------------------------------------------


class _Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, threads: set[int]) -> None:
        self.me = self
        weakref.finalize(self, lambda: threads.add(threading.get_native_id())).atexit = False


def test_the_garbage_collector_runs_nothing_on_a_worker(world: World) -> None:
    threads: set[int] = set()
    old = gc.get_threshold()
    gc.set_threshold(3, 50, 50)
    try:
        for _ in range(200):
            for _ in range(5):
                _Cycle(threads)
            world.slot(1, PAGE)
            world.slot(1, 0)
        assert gc.get_threshold()[:2] == (3, 50) and gc.isenabled()
    finally:
        gc.set_threshold(*old)
    assert threads == {threading.get_native_id()}


def test_the_collectors_settings_stay_the_programs() -> None:
    old = gc.get_threshold()
    atomic.atomically(gc.disable)
    assert not gc.isenabled()
    gc.enable()
    try:
        atomic.atomically(gc.set_threshold, 5, 6, 7)
        assert gc.get_threshold()[:2] == (5, 6)
        atomic.atomically(lambda: None)
        assert gc.get_threshold()[:2] == (5, 6)
    finally:
        gc.set_threshold(*old)


def test_calls_that_wait_hold_up_nobody_else() -> None:
    barrier = threading.Barrier(6)  # five calls at a time, each of which waits for the others
    threads = [threading.Thread(target=atomic.atomically, args=(barrier.wait, 20)) for _ in range(5)]
    for thread in threads:
        thread.start()
    barrier.wait(20)
    for thread in threads:
        thread.join()
    assert atomic.atomically(lambda: 7) == 7


def test_a_call_from_within_a_call_is_done_at_once() -> None:
    assert atomic.atomically(lambda: atomic.atomically(threading.get_ident) == threading.get_ident())
    assert atomic.atomically(atomic.client_thread) == threading.get_ident() == atomic.client_thread()


def test_objects_are_made_as_plain_ones_are() -> None:
    """Python refuses this for a type that makes its objects otherwise. Their attributes would be found more slowly."""

    class Kept(atomic.Dropped):
        pass

    assert type(object.__new__(Kept)) is Kept


def test_an_error_has_no_foreign_frames(world: World) -> None:
    with pytest.raises(OSError, match="^.Errno 22. KVM_SET_USER_MEMORY_REGION: memory_size 0 deletes") as caught:
        world.slot(9, 0)
    names = [entry.name for entry in caught.traceback]
    assert names == ["test_an_error_has_no_foreign_frames", "slot", "ioctl"]
    assert caught.value.__suppress_context__


def test_signals_of_the_process_are_not_taken_by_a_worker(world: World) -> None:
    """SIGBUS, which a worker opens to read the caller's memory, blocked and waited for by the program."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS, signal.SIGUSR1})
    try:
        for number in (signal.SIGBUS, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            world.slot(1, PAGE)
            world.slot(1, 0)
            assert signal.sigtimedwait({number}, 5) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
