"""A device's fault handler is Python inside of KVM_RUN: what it raises is told, and what it asks cannot deadlock."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import anykvm
from anykvm import MemoryFault, abi
from anykvm.backends.soft import DeviceMapping, SoftBackend, poison, system, unpoison, vcpu_state, vm
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.guest_memfd import fail_page
from anykvm.testing.machine import Machine

pytestmark = pytest.mark.timeout(30, method="thread")  # a deadlock is in C: no signal handler would end it

PAGE = 4096
HIGH = 0x800000
READ = f"mov {HIGH:#x}, %eax; hlt"


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("device")
    os.ftruncate(fd, PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: seen.append((told.exc_type, str(told.exc_value))))
    return seen


def errno_of(backend: SoftBackend, fd: int, request: int, arg: int = 0) -> int:
    try:
        result = backend.ioctl(fd, request, arg)
    except OSError as error:
        return error.errno or -1
    if request in (abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_CREATE_GUEST_MEMFD):
        backend.close(result)
    return 0


def test_every_ioctl_from_inside_of_a_handler(machine: Machine, ram: int, told: list[Any]) -> None:
    """System ioctls do what they do elsewhere; those of the VM and its vCPU that would have to wait are EDEADLK."""
    backend = SoftBackend()
    buffer = ctypes.create_string_buffer(16384)
    tables: dict[str, Iterable[int]] = {"kvm": system._HANDLERS, "vm": vm._HANDLERS, "vcpu": vcpu_state.HANDLERS}
    asks = [(kind, request) for kind, table in tables.items() for request in (*table, abi.KVM_RUN)]
    asks += [("second", request) for request in (*vcpu_state.HANDLERS, abi.KVM_RUN)]
    second = machine.vm.create_vcpu(1)
    fds = {"kvm": machine.kvm.fileno(), "vm": machine.vm.fileno(), "vcpu": machine.vcpu.fileno()}
    fds["second"] = second.fileno()
    found: dict[tuple[str, int], int] = {}

    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        for kind, request in asks:
            ctypes.memset(buffer, 0, len(buffer))
            number = request in (abi.KVM_CHECK_EXTENSION, abi.KVM_CREATE_VM, abi.KVM_RUN)
            found[kind, request] = errno_of(backend, fds[kind], request, 0 if number else ctypes.addressof(buffer))
        mapping.insert(offset, ram)

    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        machine.run_to_halt()
    lockless = {abi.KVM_CHECK_EXTENSION, abi.KVM_GET_TSC_KHZ, abi.KVM_SET_TSC_KHZ, abi.KVM_ENABLE_CAP}
    wrong = {
        (kind, abi.ioctl_name(request)): errno.errorcode.get(code, code)
        for (kind, request), code in found.items()
        if kind != "kvm"
        and request not in lockless
        and code != errno.EDEADLK
        # what is wrong with the arguments may come first
        and not (kind in ("vcpu", "second") and code in (errno.EINVAL, errno.E2BIG))
        and not (kind == "vm" and request == abi.KVM_RUN)
    }
    assert not wrong and not told
    for asked in (("vcpu", abi.KVM_GET_REGS), ("vcpu", abi.KVM_RUN), ("second", abi.KVM_RUN)):
        assert found[asked] == errno.EDEADLK
    assert found["kvm", abi.KVM_CREATE_VM] == found["vm", abi.KVM_CHECK_EXTENSION] == 0
    assert errno_of(backend, fds["vcpu"], abi.KVM_GET_REGS, ctypes.addressof(buffer)) == 0  # and all is well afterwards


def test_the_rest_of_the_api_from_inside_of_a_handler(machine: Machine, ram: int) -> None:
    codes: dict[str, int | None] = {}
    memory = anykvm.GuestMemory(PAGE)
    with machine.kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as other:
        gmem = other.create_guest_memfd(PAGE)
        guest = Machine(machine.kvm)
        files = len(FILES)

        def attempt(name: str, call: Any) -> None:
            codes[name] = None
            try:
                call()
            except OSError as error:
                codes[name] = error.errno

        def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
            attempt("registers", machine.vcpu.get_regs)
            attempt("run", machine.vcpu.run)
            attempt("map", lambda: machine.vm.map(memory, 0x900000))
            attempt("vcpu", lambda: machine.vm.create_vcpu(5))
            attempt("poison", lambda: poison(machine.vm, machine.memory))
            attempt("unpoison", lambda: unpoison(machine.vm, machine.memory))
            attempt("open and close", lambda: anykvm.open(SoftBackend()).close())
            attempt("another's slots", lambda: other.map(memory, 0))
            attempt("another's memory", lambda: fail_page(gmem, 0, errno.ENOMEM))
            attempt("another's end", guest.vm.close)
            mapping.insert(offset, ram)

        with DeviceMapping(PAGE, handler) as device:
            machine.vm.map(device, HIGH)
            machine.long_mode(READ)
            machine.run_to_halt()
        os.close(gmem)
    refused = dict.fromkeys(("registers", "run", "map", "vcpu", "poison", "unpoison"), errno.EDEADLK)
    allowed = dict.fromkeys(("open and close", "another's slots", "another's memory", "another's end"))
    assert codes == refused | allowed
    assert len(FILES) < files  # what was closed in there has gone since


def test_the_vm_is_closed_inside_of_its_own_handler(machine: Machine, ram: int) -> None:
    before = len(FILES)
    with anykvm.open(SoftBackend()) as kvm:
        inner = Machine(kvm)

        def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
            mapping.insert(offset, ram)
            for one in (inner.vcpu, inner.vm):
                os.close(os.dup(one.fileno()))
                one.close()

        with DeviceMapping(PAGE, handler) as device:
            inner.vm.map(device, HIGH)
            inner.long_mode(READ)
            with contextlib.suppress(OSError):
                inner.vcpu.run()
        assert inner.vcpu.closed and inner.vm.closed
        inner.memory.close()
    assert len(FILES) == before


def test_two_handlers_that_want_each_others_vm(ram: int) -> None:
    """Whoever comes second is refused; neither waits for ever."""
    meet = threading.Barrier(2)
    codes: list[int | None] = []
    with anykvm.open(SoftBackend()) as kvm, Machine(kvm) as one, Machine(kvm) as two, contextlib.ExitStack() as stack:

        def body(mine: Machine, other: Machine) -> None:
            def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
                meet.wait(20)
                for call in (other.vcpu.get_regs, lambda: other.vm.map(other.memory, 0xA00000)):
                    try:
                        call()
                    except OSError as error:
                        codes.append(error.errno)
                meet.wait(20)
                mapping.insert(offset, ram)

            device = stack.enter_context(DeviceMapping(PAGE, handler))
            mine.vm.map(device, HIGH)
            mine.long_mode(READ)
            mine.run_to_halt()

        threads = [threading.Thread(target=body, args=pair) for pair in ((one, two), (two, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert codes == [errno.EDEADLK] * 4


# -- what a handler raises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("x"), TypeError(), OSError(errno.EDEADLK, "as asked")])
def test_a_bug_is_told_and_is_the_cause(
    machine: Machine, bug: Exception, told: list[Any], each_profile: str, profile: str | None
) -> None:
    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        raise bug

    with (
        anykvm.open("soft", each_profile) as kvm,
        Machine(kvm) as guest,
        DeviceMapping(PAGE, handler) as device,
    ):
        guest.vm.map(device, HIGH)
        guest.long_mode(READ)
        with pytest.raises(OSError) as caught:
            guest.vm.backend.ioctl(guest.vcpu.fileno(), abi.KVM_RUN)
        assert caught.value.errno == errno.EFAULT and caught.value.__cause__ is bug
        if each_profile == "documented":
            assert guest.vcpu.run() == MemoryFault(HIGH, PAGE, 0, errno.EFAULT)
        else:
            with pytest.raises(OSError) as caught:
                guest.vcpu.run()
            assert caught.value.errno == errno.EFAULT and caught.value.__cause__ is bug
    assert told == [(type(bug), str(bug))] * 2


def test_a_failing_device_is_no_bug(machine: Machine, told: list[Any]) -> None:
    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        raise OSError(errno.ENOMEM, "no page left")

    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        with pytest.raises(OSError) as caught:
            machine.vm.backend.ioctl(machine.vcpu.fileno(), abi.KVM_RUN)
        assert caught.value.errno == errno.EFAULT and caught.value.__cause__ is None
    assert not told


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_ends_the_run_as_a_signal(
    machine: Machine, ram: int, told: list[Any], kind: type[BaseException]
) -> None:
    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        if raising:
            raise kind
        mapping.insert(offset, ram)

    raising = True
    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        with pytest.raises(kind):
            machine.vcpu.run()
        assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_INTR
        raising = False
        machine.run_to_halt()  # the same instruction
    assert not told


def test_a_signal_handler_that_raises_within_the_handler(machine: Machine, ram: int) -> None:
    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        if not seen:
            seen.append(1)
            _thread.interrupt_main(signal.SIGUSR1)  # as if another thread had taken it for the main thread
        mapping.insert(offset, ram)

    def raises(*_: object) -> None:
        raise KeyboardInterrupt

    seen: list[int] = []
    old = signal.signal(signal.SIGUSR1, raises)
    try:
        with DeviceMapping(PAGE, handler) as device:
            machine.vm.map(device, HIGH)
            machine.long_mode(READ)
            with pytest.raises(KeyboardInterrupt):
                machine.vcpu.run()
            machine.run_to_halt()
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_the_process_s_own_accesses(told: list[Any]) -> None:
    def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
        raise kind("why")

    kind: type[BaseException] = ValueError
    with DeviceMapping(PAGE, handler) as device:
        with pytest.raises(OSError, match="fault handler failed at offset 0x0") as caught:
            device.read(0, 1)
        assert isinstance(caught.value.__cause__, ValueError)
        kind = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            device.write(0, b"x")
    assert not told
