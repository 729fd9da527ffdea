"""Decoding of kvm_run pages, without a KVM: the validity rule, payloads, closing order."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

import anykvm
from anykvm import (
    Debug,
    Exit,
    FailEntry,
    Hypercall,
    InternalError,
    Intr,
    MemoryFault,
    StaleExit,
    SystemEvent,
    Unknown,
    Vcpu,
    X86Rdmsr,
    X86Wrmsr,
    abi,
)
from anykvm.api.exits.decode import DECODERS, decode_failure
from fakes import FakeBackend

EFAULT, EHWPOISON = errno.EFAULT, abi.EHWPOISON


def page(reason: int, fill: Callable[[abi.kvm_run], None] = lambda run: None) -> memoryview:
    """A kvm_run page with an exit reason and whatever ``fill`` sets."""
    buffer = bytearray(12288)
    run = abi.kvm_run.from_buffer(buffer)
    run.exit_reason = reason
    fill(run)
    del run
    return memoryview(buffer)


def fault(run: abi.kvm_run) -> None:
    run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size = 8, 0x12345000, 0x1000


@pytest.mark.parametrize("number", [errno.EFAULT, EHWPOISON, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.EINVAL])
@pytest.mark.parametrize("reason", [0, abi.KVM_EXIT_IO, abi.KVM_EXIT_MMIO, abi.KVM_EXIT_MEMORY_FAULT])
def test_a_failure_is_a_memory_fault_only_if_both_say_so(number: int, reason: int) -> None:
    exit = decode_failure(page(reason, fault), number)
    if number in (EFAULT, EHWPOISON) and reason == abi.KVM_EXIT_MEMORY_FAULT:
        assert exit == MemoryFault(gpa=0x12345000, size=0x1000, flags=MemoryFault.PRIVATE, errno=number)
    else:
        assert exit is None


@pytest.mark.parametrize("reason", [0, abi.KVM_EXIT_INTR, abi.KVM_EXIT_MEMORY_FAULT])
def test_eintr_is_intr_whatever_the_page_says(reason: int) -> None:
    assert decode_failure(page(reason, fault), errno.EINTR) == Intr(reason)


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


def vcpu_on(fake: FakeBackend, run: Callable[[memoryview], None]) -> tuple[anykvm.Kvm, Vcpu]:
    fake.on_run = run
    kvm = anykvm.open(fake)
    return kvm, kvm.create_vm().create_vcpu()


def copying(source: memoryview, number: int = 0) -> Callable[[memoryview], None]:
    """A KVM_RUN that leaves ``source`` in the page and fails with ``number`` if it is not 0."""

    def run(target: memoryview) -> None:
        target[:] = source
        if number:
            raise abi.ioctl_error(number, abi.KVM_RUN)

    return run


def test_memory_fault_reason_with_success_is_not_a_memory_fault(fake: FakeBackend) -> None:
    kvm, vcpu = vcpu_on(fake, copying(page(abi.KVM_EXIT_MEMORY_FAULT, fault)))
    with kvm:
        exit = vcpu.run()
        assert isinstance(exit, Unknown)
        assert exit.exit_reason == abi.KVM_EXIT_MEMORY_FAULT


def test_bare_efault_raises_and_explains(fake: FakeBackend) -> None:
    kvm, vcpu = vcpu_on(fake, copying(page(abi.KVM_EXIT_UNKNOWN, fault), EFAULT))
    with kvm, pytest.raises(OSError, match=r"KVM_RUN\(vcpu=0\): .*no valid memory_fault") as caught:
        vcpu.run()
    assert caught.value.errno == EFAULT


def test_eagain_is_blocking_io_error(fake: FakeBackend) -> None:
    kvm, vcpu = vcpu_on(fake, copying(page(0), errno.EAGAIN))
    with kvm, pytest.raises(BlockingIOError, match="run again"):
        vcpu.run()


def test_a_backends_own_explanation_is_kept(fake: FakeBackend) -> None:
    def run(target: memoryview) -> None:
        raise abi.ioctl_error(errno.EINVAL, abi.KVM_RUN, "kvm_dirty_regs has unknown bits 0x8")

    kvm, vcpu = vcpu_on(fake, run)
    with kvm, pytest.raises(OSError, match=r"KVM_RUN\(vcpu=0\): kvm_dirty_regs has unknown bits 0x8"):
        vcpu.run()


def debug(run: abi.kvm_run) -> None:
    arch = run.debug.arch
    arch.exception, arch.pc, arch.dr6, arch.dr7 = 3, 0x7C00, 0x4000, 0x400


def fail_entry(run: abi.kvm_run) -> None:
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x80000021, 3


def internal(run: abi.kvm_run) -> None:
    run.internal.suberror, run.internal.ndata = abi.KVM_INTERNAL_ERROR_EMULATION, 3
    run.emulation_failure.flags = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    run.emulation_failure.insn_size = 2
    run.emulation_failure.insn_bytes[0:2] = [0x0F, 0x0B]


def system_event(run: abi.kvm_run) -> None:
    run.system_event.type, run.system_event.ndata = abi.KVM_SYSTEM_EVENT_RESET, 1
    run.system_event.data[0] = 5


def hypercall(run: abi.kvm_run) -> None:
    run.hypercall.nr, run.hypercall.args[1], run.hypercall.flags = 12, 0x1000, 1


def msr(run: abi.kvm_run) -> None:
    run.msr.reason, run.msr.index, run.msr.data = abi.KVM_MSR_EXIT_REASON_FILTER, 0x1234, 77


@pytest.mark.parametrize(
    ("reason", "fill", "expected"),
    [
        (abi.KVM_EXIT_DEBUG, debug, Debug(3, 0x7C00, 0x4000, 0x400)),
        (abi.KVM_EXIT_FAIL_ENTRY, fail_entry, FailEntry(0x80000021, 3)),
        (abi.KVM_EXIT_INTERNAL_ERROR, internal, InternalError(1, (1, 0x0B0F02, 0))),
        (abi.KVM_EXIT_SYSTEM_EVENT, system_event, SystemEvent(2, (5,))),
        (abi.KVM_EXIT_HYPERCALL, hypercall, Hypercall(12, (0, 0x1000, 0, 0, 0, 0), 1)),
        (abi.KVM_EXIT_X86_RDMSR, msr, X86Rdmsr(0x1234, 0, abi.KVM_MSR_EXIT_REASON_FILTER)),
        (abi.KVM_EXIT_X86_WRMSR, msr, X86Wrmsr(0x1234, 77, abi.KVM_MSR_EXIT_REASON_FILTER)),
        (abi.KVM_EXIT_SHUTDOWN, lambda run: None, anykvm.Shutdown()),
        (abi.KVM_EXIT_IRQ_WINDOW_OPEN, lambda run: None, anykvm.IrqWindowOpen()),
        (abi.KVM_EXIT_DIRTY_RING_FULL, lambda run: None, anykvm.DirtyRingFull()),
    ],
)
def test_payloads(fake: FakeBackend, reason: int, fill: Callable[[abi.kvm_run], None], expected: Exit) -> None:
    kvm, vcpu = vcpu_on(fake, copying(page(reason, fill)))
    with kvm:
        exit = vcpu.run()
        assert exit == expected
        assert exit.exit_reason == reason
        assert repr(exit) == repr(expected)
        if isinstance(exit, InternalError):
            assert exit.instruction == b"\x0f\x0b"


def test_every_exit_reason_decodes(fake: FakeBackend) -> None:
    for reason in (*range(64), 0xFFFFFFFF):
        kvm, vcpu = vcpu_on(fake, copying(page(reason)))
        with kvm:
            exit = vcpu.run()
        assert exit.exit_reason == reason
        known = reason in DECODERS or reason == abi.KVM_EXIT_IO
        assert isinstance(exit, Unknown) != known


def test_answers_land_where_the_kernel_reads_them(fake: FakeBackend) -> None:
    run = abi.kvm_run.from_buffer(fake.page)
    kvm, vcpu = vcpu_on(fake, copying(page(abi.KVM_EXIT_HYPERCALL, hypercall)))
    with kvm:
        call = vcpu.run()
        assert isinstance(call, Hypercall)
        call.respond(-1)
        assert run.hypercall.ret == (1 << 64) - 1
        fake.on_run = copying(page(abi.KVM_EXIT_X86_RDMSR, msr))
        read = vcpu.run()
        assert isinstance(read, X86Rdmsr)
        read.respond(5)
        assert (run.msr.error, run.msr.data) == (0, 5)
        read.fail()
        assert run.msr.error == 1
        with pytest.raises(StaleExit):
            call.respond(0)
    with pytest.raises(StaleExit):
        read.respond(1)


def test_string_io(fake: FakeBackend) -> None:
    def outs(run: abi.kvm_run) -> None:
        run.io.direction, run.io.size, run.io.port, run.io.count, run.io.data_offset = 1, 2, 0x1F0, 3, 4096

    source = page(abi.KVM_EXIT_IO, outs)
    source[4096:4102] = b"abcdef"
    kvm, vcpu = vcpu_on(fake, copying(source))
    with kvm:
        assert vcpu.run() == anykvm.Io(anykvm.Io.OUT, 0x1F0, 2, 3, b"abcdef")


def test_closing_order(fake: FakeBackend) -> None:
    kvm, _vcpu = vcpu_on(fake, copying(page(5)))
    kvm.close()
    assert fake.log == ["mmap", "munmap", "close vcpu", "close vm", "close kvm"]


def test_pages_stay_mapped_while_a_view_is_left(fake: FakeBackend) -> None:
    kvm, vcpu = vcpu_on(fake, copying(page(5)))
    view, run = vcpu.io_page, vcpu.kvm_run
    kvm.close()
    assert "munmap" not in fake.log
    del view
    assert "munmap" not in fake.log
    assert ctypes.sizeof(run) == 2352
    del run
    assert fake.log[-1] == "munmap"


def test_run_makes_one_call_of_the_waist(fake: FakeBackend) -> None:
    calls: list[tuple[int, int, int]] = []
    real = fake.ioctl

    def counting(fd: int, request: int, arg: int = 0) -> int:
        calls.append((fd, request, arg))
        return real(fd, request, arg)

    fake.ioctl = counting  # type: ignore[method-assign]
    kvm, vcpu = vcpu_on(fake, copying(page(abi.KVM_EXIT_HLT)))
    with kvm:
        calls.clear()
        vcpu.run()
        assert calls == [(vcpu.fileno(), abi.KVM_RUN, 0)]
