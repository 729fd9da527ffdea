"""Memory that cannot be had: ENOMEM from the ioctl, everything as before, and it works when there is memory again."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, InternalError, Kvm, Vm, abi
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.engine.library import library
from anykvm.testing.assembler import assemble

_testcapi = pytest.importorskip("_testcapi", reason="NOT TESTED: this Python cannot make its own allocations fail")
PAGE = 4096
Undo = Callable[[], Any]


@pytest.fixture(autouse=True)
def no_failures_left() -> Iterator[None]:
    yield
    library().ak_fail_allocation(0)
    library().ak_fail_engine_allocation(0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Bench:
    """A VM of the waist, and each ioctl that needs memory as a function that does it and one that undoes it."""

    def __init__(self, profile: str) -> None:
        self.backend = SoftBackend(profile)
        self.kvm = self.backend.open()
        self.vm = self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM, abi.KVM_X86_SW_PROTECTED_VM)
        self.vcpu = self.backend.ioctl(self.vm, abi.KVM_CREATE_VCPU)
        self.memory = GuestMemory(16 * PAGE)
        self.slot(1, 0x100000)
        self.vcpus = self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM)
        self.ids = 0
        self.made = -1
        self.undo = self.close_made

    def fewer_vcpus(self) -> None:
        """A vCPU lives as long as its VM."""
        if self.ids > 40:
            self.backend.close(self.vcpus)
            self.vcpus, self.ids = self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM), 0

    def close_made(self) -> None:
        if self.made >= 0:
            self.backend.close(self.made)
        self.made = -1

    def close(self) -> None:
        for fd in (self.vcpus, self.vcpu, self.vm, self.kvm):
            self.backend.close(fd)
        self.memory.close()

    def slot(self, slot: int, gpa: int, size: int = PAGE, flags: int = 0) -> None:
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, self.memory.address)
        self.backend.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))

    def create(self, fd: int, request: int, arg: int = 0) -> Undo:
        self.made = self.backend.ioctl(fd, request, arg)
        return self.undo  # there may be no memory for a function

    def create_vm(self) -> Undo:
        return self.create(self.kvm, abi.KVM_CREATE_VM)

    def create_vcpu(self) -> Undo:
        self.ids += 1
        return self.create(self.vcpus, abi.KVM_CREATE_VCPU, self.ids)

    def guest_memfd(self) -> Undo:
        request = abi.kvm_create_guest_memfd(size=16 * PAGE)
        return self.create(self.vm, abi.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(request))

    def new_slot(self) -> Undo:
        self.slot(2, 0x200000)
        return lambda: self.slot(2, 0x200000, 0)

    def far_slot(self) -> Undo:
        self.slot(3000, 0x300000)
        return lambda: self.slot(3000, 0x300000, 0)

    def move_slot(self) -> Undo:
        self.slot(1, 0x400000)
        return lambda: self.slot(1, 0x100000)

    def log_slot(self) -> Undo:
        self.slot(1, 0x100000, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        return lambda: self.slot(1, 0x100000)

    def dirty_log(self) -> Undo:
        self.slot(1, 0x100000, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        bitmap = ctypes.c_uint64()
        log = abi.kvm_dirty_log(slot=1)
        log.dirty_bitmap = ctypes.addressof(bitmap)
        self.backend.ioctl(self.vm, abi.KVM_GET_DIRTY_LOG, ctypes.addressof(log))
        return lambda: self.slot(1, 0x100000)

    def attributes(self) -> Undo:
        def change(value: int) -> None:
            request = abi.kvm_memory_attributes(0x100000, PAGE, value, 0)
            self.backend.ioctl(self.vm, abi.KVM_SET_MEMORY_ATTRIBUTES, ctypes.addressof(request))

        change(abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        return lambda: change(0)

    def cpuid(self) -> Undo:
        table = (ctypes.c_uint32 * 12)(1)
        self.backend.ioctl(self.vcpu, abi.KVM_SET_CPUID2, ctypes.addressof(table))
        return lambda: None


_CREATE = ("create_vm", "create_vcpu", "guest_memfd")
NEEDS_MEMORY = (*_CREATE, "new_slot", "far_slot", "move_slot", "dirty_log", "attributes", "cpuid")
NEEDS_PYTHONS = (*NEEDS_MEMORY, "log_slot")


@pytest.fixture(params=["documented", "linux-7.3"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("name", NEEDS_MEMORY)
def test_each_allocation_of_each_ioctl_fails_in_turn(bench: Bench, name: str) -> None:
    do: Callable[[], Undo] = getattr(bench, name)
    if name == "guest_memfd":
        do()()  # its hooks in the C library are put in once
    before = descriptors()
    for nth in range(1, 100):
        library().ak_fail_allocation(nth)
        try:
            undo = do()
        except OSError as error:
            assert errno.errorcode[error.errno or 0] == "ENOMEM"
            assert any(what in str(error) for what in ("Cannot allocate", "no memory", "cannot be mapped")), error
            library().ak_fail_allocation(0)
            assert descriptors() == before
            do()()  # as if nothing had been
            continue
        library().ak_fail_allocation(0)
        undo()
        break
    assert nth > 1, "it needs no memory"
    assert descriptors() == before


def memory_error(nth: int, do: Callable[[], Undo]) -> Undo | None:
    """Do it while the nth allocation of Python's fails, and no other; None: it was ENOMEM."""
    try:
        _testcapi.set_nomemory(nth, nth + 1)
        try:
            return do()
        finally:
            _testcapi.remove_mem_hooks()
    except OSError as error:
        assert error.errno == errno.ENOMEM, error
    except MemoryError:
        pass  # not in the ioctl: in this test, or while the error was made
    return None


@pytest.mark.parametrize("name", NEEDS_PYTHONS)
def test_each_allocation_of_pythons_fails_in_turn(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps frames, and so files
    do: Callable[[], Undo] = getattr(bench, name)
    do()()
    before, thresholds = descriptors(), gc.get_threshold()
    in_a_row = 0
    for nth in range(1, 600):
        bench.fewer_vcpus()
        undo = memory_error(nth, do)
        if undo is not None:
            undo()
            in_a_row += 1
            if in_a_row == 20:
                break  # beyond its last one
            continue
        in_a_row = 0
        bench.close_made()
        try:
            do()()
        except OSError as error:
            raise AssertionError(f"{name} is not as before after its allocation {nth} failed: {error}") from error
        assert descriptors() == before, nth
    do()()
    assert gc.get_threshold() == thresholds


def test_an_engine_without_memory_is_not_made() -> None:
    """Whatever allocation of the engine's fails while it is made."""
    backend = SoftBackend()
    kvm = backend.open()
    vm = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    before = descriptors()
    nth, failures = 1, 0
    while True:
        library().ak_fail_engine_allocation(nth)
        try:
            backend.ioctl(vm, abi.KVM_CREATE_VCPU)
        except OSError as error:
            assert error.errno == errno.ENOMEM
            failures += 1
            assert descriptors() == before
            nth += 1 + nth // 16
            continue
        break
    assert failures > 30
    for fd in (vm, kvm):
        backend.close(fd)


def fresh(kvm: Kvm, memory: GuestMemory) -> tuple[Vm, anykvm.Vcpu]:
    vm = kvm.create_vm()
    vm.map(memory, guest_phys_addr=0)
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(rip=0)
    regs = vcpu.get_regs()
    regs.rsp = 0x7000
    vcpu.set_regs(regs)
    return vm, vcpu


def test_an_engine_that_fails_ends_its_vcpu_and_nothing_else() -> None:
    """No engine runs out of memory; if one did, or gave up for any other reason: KVM_EXIT_INTERNAL_ERROR, then EIO."""
    with anykvm.open("soft") as kvm, GuestMemory(0x8000) as memory:
        memory.write(0, assemble("call 1f; incw 0x7100; call 2f; hlt; 1: ret; .fill 5000, 1, 0x90; 2: ret", 0, 16))
        other_vm, other = fresh(kvm, memory)
        assert other.run() == Hlt()
        for nth in range(1, 200):
            vm, vcpu = fresh(kvm, memory)
            library().ak_fail_engine_allocation(nth)
            exit = vcpu.run()
            library().ak_fail_engine_allocation(0)
            if exit == Hlt():
                break
            assert isinstance(exit, InternalError)
            with pytest.raises(OSError, match="KVM_RUN") as caught:
                vcpu.run()
            assert caught.value.errno == errno.EIO
            vcpu.get_regs()
            vm.close()
        assert nth > 5
        other.set_real_mode(rip=0)
        regs = other.get_regs()
        regs.rsp = 0x7000
        other.set_regs(regs)
        assert other.run() == Hlt()
        other_vm.close()
