"""The Python API on every usable backend: one method per ioctl, typed exits, errors that explain themselves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

import anykvm
from anykvm import Backend, GuestMemory, Hlt, Intr, Io, Mmio, StaleExit, Vcpu, Vm, abi

MEMORY_SIZE = 0x10000


@pytest.fixture
def vm(backend: Backend) -> Iterator[Vm]:
    """A VM with 64 KiB of memory at 0."""
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm, GuestMemory(MEMORY_SIZE) as memory:
        vm.map(memory, 0)
        vm.test_memory = memory  # type: ignore[attr-defined]
        yield vm


def guest(vm: Vm, code: str) -> Vcpu:
    """A vCPU about to run hex ``code`` in real mode at 0x1000."""
    raw = bytes.fromhex(code)
    vm.test_memory[0x1000 : 0x1000 + len(raw)] = raw  # type: ignore[attr-defined]
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(0x1000)
    return vcpu


# -- system ------------------------------------------------------------------------------------------------------


def test_system_ioctls(backend: Backend) -> None:
    with anykvm.open(backend) as kvm:
        assert kvm.get_api_version() == 12
        assert kvm.check_extension(abi.KVM_CAP_USER_MEMORY) == 1
        assert kvm.check_extension(0xFFFF) == 0
        assert kvm.get_vcpu_mmap_size() >= 4096
        leaves = kvm.get_supported_cpuid()
        assert {0, 1} <= {entry.function for entry in leaves}
        assert 0x10 in kvm.get_msr_index_list()  # the TSC


def test_unknown_ioctls(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    for handle, expected in ((vm.kvm, errno.EINVAL), (vm, errno.ENOTTY), (vcpu, errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            handle.ioctl(0xAEFE)
        assert caught.value.errno == expected
        assert "ioctl 0xaefe" in str(caught.value)


def test_generic_ioctl_takes_structures_and_addresses(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    regs = abi.kvm_regs()
    assert vcpu.ioctl(abi.KVM_GET_REGS, regs) == 0
    assert regs.rip == 0xFFF0
    regs.rip = 0
    assert vcpu.ioctl(abi.KVM_GET_REGS, ctypes.addressof(regs)) == 0
    assert regs.rip == 0xFFF0


def test_bad_pointer_is_efault(vm: Vm) -> None:
    with pytest.raises(OSError, match="KVM_GET_REGS: Bad address") as caught:
        vm.create_vcpu().ioctl(abi.KVM_GET_REGS, 8)
    assert caught.value.errno == errno.EFAULT


def test_wrong_descriptor(backend: Backend) -> None:
    for call in (lambda fd: backend.ioctl(fd, abi.KVM_GET_API_VERSION), backend.close):
        with pytest.raises(OSError) as caught:
            call(-1)
        assert caught.value.errno == errno.EBADF


# -- descriptors and lifetime --------------------------------------------------------------------------------------


def test_descriptors_are_real(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    for handle in (vm.kvm, vm, vcpu):
        select.select([handle], [], [], 0)  # poll accepts it
        copy = os.dup(handle.fileno())
        os.close(copy)
    copy = os.dup(vm.fileno())
    try:
        assert vm.backend.ioctl(copy, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_USER_MEMORY) == 1
    finally:
        os.close(copy)


def test_close_is_idempotent_and_takes_children_along(backend: Backend) -> None:
    kvm = anykvm.open(backend)
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu()
    fds = [handle.fileno() for handle in (kvm, vm, vcpu)]
    kvm.close()
    kvm.close()
    assert kvm.closed and vm.closed and vcpu.closed
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    calls = ((kvm.get_api_version, "Kvm"), (vm.create_irqchip, "Vm"), (vcpu.get_regs, "Vcpu"), (vcpu.run, "Vcpu"))
    for call, name in calls:
        with pytest.raises(OSError, match=f"this {name} is closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_kvm_run_structure_outlives_close(vm: Vm) -> None:
    vcpu = guest(vm, "f4")
    vcpu.run()
    page = vcpu.kvm_run
    vcpu.close()
    assert page.exit_reason == abi.KVM_EXIT_HLT
    with pytest.raises(OSError) as caught:
        vcpu.kvm_run  # noqa: B018
    assert caught.value.errno == errno.EBADF


def test_forgotten_objects_warn_and_close(backend: Backend) -> None:
    fd = -1
    with pytest.warns(ResourceWarning, match="unclosed <Kvm"):
        kvm = anykvm.open(backend)
        fd = kvm.fileno()
        del kvm
        gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


# -- memory slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected", "text"),
    [
        ({"guest_phys_addr": 0x20123}, errno.EINVAL, "guest_phys_addr is not page aligned"),
        ({"memory_size": 0x123}, errno.EINVAL, "memory_size is not page aligned"),
        ({"userspace_addr": 0x10001}, errno.EINVAL, "userspace_addr is not page aligned"),
        ({"userspace_addr": 1 << 63}, errno.EINVAL, "beyond the user address space"),
        ({"slot": 0x7FFC}, errno.EINVAL, "slot is not below 32764"),
        ({"slot": 5 << 16}, errno.EINVAL, "address space"),
        ({"flags": 0x80}, errno.EINVAL, "flags has unknown bits 0x80"),
        ({"guest_phys_addr": (1 << 64) - 4096, "memory_size": 8192}, errno.EINVAL, "wraps"),
        ({"memory_size": 0}, errno.EINVAL, "does not exist"),
        ({"guest_phys_addr": 0}, errno.EEXIST, "overlaps another slot"),
        ({"slot": 0, "guest_phys_addr": 0, "memory_size": 8192}, errno.EINVAL, "the slot exists"),
    ],
)
def test_region_errors_name_the_field(vm: Vm, change: dict[str, int], expected: int, text: str) -> None:
    fields = {"slot": 1, "guest_phys_addr": 0x20000, "memory_size": 0x1000, "userspace_addr": 0x7F0000000000, **change}
    with pytest.raises(OSError) as caught:
        vm.set_user_memory_region(**fields)
    assert caught.value.errno == expected
    message = caught.value.strerror or ""
    assert message.startswith("KVM_SET_USER_MEMORY_REGION(slot=")
    assert text in message


def test_slots_come_and_go(vm: Vm) -> None:
    with GuestMemory(0x2000) as memory:
        assert vm.map(memory, 0x20000) == 1
        assert vm.map(memory, 0x30000) == 2  # the same host memory twice
        vm.unmap(1)
        assert vm.map(memory, 0x20000) == 1
        with pytest.raises(OSError) as caught:
            vm.unmap(7)
        assert caught.value.errno == errno.EINVAL


def test_a_slot_keeps_its_memory_alive(vm: Vm) -> None:
    memory = GuestMemory(0x1000)
    memory[0:1] = b"\xf4"
    vm.map(memory, 0xF0000)
    del memory
    gc.collect()
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(0, selector=0xF000)
    assert vcpu.run() == Hlt()


def test_region2_and_its_errors(vm: Vm) -> None:
    if not vm.check_extension(abi.KVM_CAP_USER_MEMORY2):
        pytest.skip("no KVM_CAP_USER_MEMORY2")
    with GuestMemory(0x1000) as memory:
        vm.set_user_memory_region2(3, 0x40000, 0x1000, memory.address)
        with pytest.raises(OSError, match=r"REGION2\(slot=4, .*\): guest_phys_addr overlaps"):
            vm.set_user_memory_region2(4, 0x40000, 0x1000, memory.address)


def test_memory_fault_info_cannot_be_enabled(vm: Vm) -> None:
    for handle in (vm, vm.create_vcpu()):
        with pytest.raises(OSError, match=r"KVM_ENABLE_CAP\(cap=232, flags=0\)") as caught:
            handle.enable_cap(abi.KVM_CAP_MEMORY_FAULT_INFO)
        assert caught.value.errno == errno.EINVAL
    assert vm.check_extension(abi.KVM_CAP_MEMORY_FAULT_INFO) == 1


# -- vCPU state ----------------------------------------------------------------------------------------------------


def test_vcpu_ids(vm: Vm) -> None:
    vm.create_vcpu(0)
    with pytest.raises(OSError, match=r"KVM_CREATE_VCPU\(vcpu_id=0\): this vcpu_id is in use") as caught:
        vm.create_vcpu(0)
    assert caught.value.errno == errno.EEXIST


def test_register_state_round_trips(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid2(vm.kvm.get_supported_cpuid())
    assert vcpu.get_cpuid2()
    vcpu.set_regs(abi.kvm_regs(rax=1, r15=(1 << 64) - 1, rip=0x1234, rflags=2))
    regs = vcpu.get_regs()
    assert (regs.rax, regs.r15, regs.rip, regs.rflags) == (1, (1 << 64) - 1, 0x1234, 2)
    sregs = vcpu.get_sregs()
    assert (sregs.cs.base, sregs.cs.selector) == (0xFFFF0000, 0xF000)
    sregs.ds.base = 0x1230
    vcpu.set_sregs(sregs)
    assert vcpu.get_sregs().ds.base == 0x1230
    fpu = vcpu.get_fpu()
    fpu.fcw = 0x37F
    vcpu.set_fpu(fpu)
    assert vcpu.get_fpu().fcw == 0x37F
    assert vcpu.set_msrs({0x10: 0, 0x174: 0x10}) == 2
    assert vcpu.get_msrs([0x174]) == {0x174: 0x10}
    assert vcpu.get_msrs([0xDEAD0000, 0x174]) == {}  # stops at the first it does not know
    assert vcpu.get_mp_state() == abi.KVM_MP_STATE_RUNNABLE
    assert vcpu.translate(0x1234).physical_address == 0x1234


def test_impossible_sregs(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cr0 = 1 << 31  # paging without protection
    with pytest.raises(OSError, match="KVM_SET_SREGS: CR0") as caught:
        vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EINVAL


# -- run -----------------------------------------------------------------------------------------------------------


def test_port_output_and_halt(vm: Vm) -> None:
    vcpu = guest(vm, "b041 e6e9 b83412 e7ea f4")  # mov al,'A'; out 0xe9,al; mov ax,0x1234; out 0xea,ax; hlt
    assert vcpu.run() == Io(Io.OUT, 0xE9, 1, 1, b"A")
    assert vcpu.run() == Io(Io.OUT, 0xEA, 2, 1, b"\x34\x12")
    assert vcpu.run() == Hlt()


@pytest.mark.parametrize("answer", [0x2A, b"\x2a"])
def test_port_input_is_answered(vm: Vm, answer: int | bytes) -> None:
    vcpu = guest(vm, "e460 e6e9 f4")  # in al,0x60; out 0xe9,al; hlt
    exit = vcpu.run()
    assert isinstance(exit, Io)
    assert (exit.direction, exit.port, exit.data) == (Io.IN, 0x60, b"")
    exit.respond(answer)
    assert exit.data == b"\x2a"
    assert vcpu.run() == Io(Io.OUT, 0xE9, 1, 1, b"\x2a")


def test_mmio_read_and_write(vm: Vm) -> None:
    # mov ax,0x2000; mov ds,ax; mov al,[0x10]; mov [0x11],al; hlt
    vcpu = guest(vm, "b80020 8ed8 a01000 a21100 f4")
    exit = vcpu.run()
    assert exit == Mmio(0x20010, b"", 1, False)
    assert isinstance(exit, Mmio)
    exit.data = b"\x77"
    assert vcpu.run() == Mmio(0x20011, b"\x77", 1, True)
    assert vcpu.run() == Hlt()


def test_exits_match(vm: Vm) -> None:
    vcpu = guest(vm, "b041 e6e9 f4")
    seen = []
    while True:
        match vcpu.run():
            case Io(Io.OUT, 0xE9, data=data):
                seen.append(data)
            case Hlt():
                break
    assert seen == [b"A"]


def test_answers_are_checked(vm: Vm) -> None:
    vcpu = guest(vm, "e460 e6e9 f4")
    read = vcpu.run()
    assert isinstance(read, Io)
    for wrong in (256, -1, b"", b"ab"):
        with pytest.raises(ValueError):
            read.respond(wrong)
    read.respond(1)
    write = vcpu.run()
    assert isinstance(write, Io)
    with pytest.raises(ValueError, match="takes no answer"):
        write.respond(1)


def test_stale_exits_cannot_be_answered(vm: Vm) -> None:
    vcpu = guest(vm, "e460 e461 f4")
    first = vcpu.run()
    assert isinstance(first, Io)
    first.respond(1)
    second = vcpu.run()
    assert isinstance(second, Io)
    with pytest.raises(StaleExit, match="not its vCPU's latest exit"):
        first.respond(2)
    second.respond(3)
    assert first.data == b"\x01"  # a snapshot, as it was
    vcpu.close()
    with pytest.raises(StaleExit):
        second.respond(4)


def test_immediate_exit_keeps_the_old_reason(vm: Vm) -> None:
    vcpu = guest(vm, "e460 e6e9 f4")
    read = vcpu.run()
    assert isinstance(read, Io)
    read.respond(9)
    vcpu.immediate_exit = True
    exit = vcpu.run()
    assert isinstance(exit, Intr)
    assert exit.exit_reason == abi.KVM_EXIT_IO
    assert vcpu.get_regs().rax & 0xFF == 9  # the input was completed
    with pytest.raises(StaleExit):
        read.respond(1)
    assert vcpu.immediate_exit
    vcpu.immediate_exit = False
    assert vcpu.run() == Io(Io.OUT, 0xE9, 1, 1, b"\x09")


def test_a_signal_ends_run(vm: Vm) -> None:
    vcpu = guest(vm, "ebfe")  # jmp .
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    timer.start()
    try:
        assert vcpu.run() == Intr(abi.KVM_EXIT_INTR)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, old)


@pytest.mark.parametrize("owner", ["vcpu", "vm", "kvm"])
def test_a_handler_that_closes_what_runs(vm: Vm, owner: str) -> None:
    vcpu = guest(vm, "ebfe")  # jmp .
    owners: dict[str, anykvm.Kvm | Vm | Vcpu] = {"vcpu": vcpu, "vm": vm, "kvm": vm.kvm}
    old = signal.signal(signal.SIGALRM, lambda *_: owners[owner].close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert isinstance(vcpu.run(), Intr)  # it was interrupted, before it was closed
    finally:
        signal.signal(signal.SIGALRM, old)
    with pytest.raises(OSError, match="KVM_RUN: this Vcpu is closed") as caught:
        vcpu.run()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("code, kind", [("b021 e6e9 f4", Io), ("e4e9 f4", Io), ("f4", Hlt)])
def test_closed_before_the_exit_is_read(vm: Vm, code: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit is what KVM_RUN said; it cannot be answered any more."""
    vcpu = guest(vm, code)
    run = vcpu._run_ioctl

    def run_and_close(fd: int, request: int, arg: int) -> int:
        result = run(fd, request, arg)
        vcpu.close()
        return result

    monkeypatch.setattr(vcpu, "_run_ioctl", run_and_close)
    result = vcpu.run()
    assert isinstance(result, kind)
    if isinstance(result, Io) and result.direction == Io.OUT:
        assert (result.port, result.data) == (0xE9, b"!")
    elif isinstance(result, Io):
        with pytest.raises(StaleExit):
            result.data = b"\0"


def test_signal_mask(vm: Vm) -> None:
    vcpu = guest(vm, "f4")
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        vcpu.set_signal_mask([])  # nothing is blocked while the guest runs
        assert vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        vcpu.set_signal_mask(None)
        assert vcpu.run() == Hlt()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, old)
    with pytest.raises(ValueError):
        vcpu.set_signal_mask([65])


def test_run_in_a_forked_child_says_why(vm: Vm) -> None:
    vcpu = guest(vm, "f4")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            try:
                vcpu.run()
            except OSError as error:
                os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "KVM_RUN(vcpu=0): the VM belongs to another process" in pipe.read()
