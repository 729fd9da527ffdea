"""Sweeps over the package's own API and examples: no crash, no hang, no leak, no wrong success, whatever fails."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Io, abi
from anykvm.backends import soft_backend
from anykvm.backends.base import Backend
from anykvm.layers.annotate import Annotate
from anykvm.layers.inject import Inject, Outcome, Rule, sweep
from anykvm.testing import Machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import convert  # noqa: E402
import poison  # noqa: E402
import vepc  # noqa: E402


def hello(backend: Backend) -> bytes:
    """A guest that says two letters."""
    seen = b""
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm, GuestMemory(4096) as memory:
        memory[0:9] = bytes.fromhex("b068 e6e9 b069 e6e9 f4")
        vm.map(memory, 0)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(0)
        while (exit := vcpu.run()) != Hlt():
            if isinstance(exit, Io):
                seen += exit.data
            elif not isinstance(exit, anykvm.Intr):
                raise OSError(getattr(exit, "errno", errno.EPROTO), str(exit))
    return seen


def everything(backend: Backend) -> object:
    """Every ioctl of the API that the soft backend has, once."""
    with anykvm.open(backend) as kvm, kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as vm, GuestMemory(0x8000) as memory:
        cpuid = kvm.get_supported_cpuid()
        indices = kvm.get_msr_index_list()
        slot = vm.map(memory, 0, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        gmem = vm.create_guest_memfd(0x1000)
        try:
            vm.set_user_memory_region2(9, 0x10000, 0x1000, memory.address, abi.KVM_MEM_GUEST_MEMFD, gmem)
            vm.set_memory_attributes(0x10000, 0x1000, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid2(cpuid)
            vcpu.get_cpuid2()
            vcpu.set_sregs(vcpu.get_sregs())
            vcpu.set_sregs2(vcpu.get_sregs2())
            vcpu.set_regs(vcpu.get_regs())
            vcpu.set_fpu(vcpu.get_fpu())
            vcpu.set_xsave(vcpu.get_xsave())
            vcpu.set_xcrs(vcpu.get_xcrs())
            vcpu.set_debugregs(vcpu.get_debugregs())
            vcpu.set_vcpu_events(vcpu.get_vcpu_events())
            vcpu.set_mp_state(vcpu.get_mp_state())
            vcpu.get_msrs([0x10])
            vcpu.set_signal_mask(())
            vcpu.translate(0x1000)
            vcpu.pre_fault_memory(0, 0x2000)
            log = vm.get_dirty_log(slot)
        finally:
            backend.close(gmem)
        return len(cpuid), len(indices), bytes(log)


def annotated(backend: Backend) -> str:
    """A bare EFAULT, explained; through the layer under test."""
    with anykvm.open(Annotate(backend)) as kvm, Machine(kvm) as m:
        m.long_mode("movb $5, 0x60000; hlt")
        m.memory.protect(0x60000, 0x1000, 0)
        try:
            while isinstance(exit := m.vcpu.run(), anykvm.Intr):
                pass
        except OSError as error:
            if not (cause := getattr(error, "cause", None)):
                raise
            return f"{cause.gpa:#x}"
    raise OSError(getattr(exit, "errno", errno.EPROTO), str(exit))


def example(main: Callable[[anykvm.Kvm], None]) -> Callable[[Backend], str]:
    def scenario(backend: Backend) -> str:
        out = io.StringIO()
        with redirect_stdout(out), anykvm.open(backend) as kvm:
            try:
                main(kvm)
            except (AssertionError, SystemExit) as end:  # how the examples give up on an exit
                raise GaveUp(str(end)) from None
        return out.getvalue().splitlines()[-1].partition(",")[0]

    return scenario


class GaveUp(Exception):
    """An example says that it got an exit that it does not know."""


def complain(failures: tuple[Outcome, ...]) -> str:
    return "\n".join(str(one) for one in failures)


def test_the_api_says_every_failure() -> None:
    result = sweep(hello)
    assert not result.failures, result.text()
    told = {str(one.rule) for one in result.outcomes if one.verdict == "told"}
    assert {"KVM_SET_SREGS:errno=EINVAL", "mmap:errno=ENOMEM", "KVM_RUN:errno=EFAULT,nth=2"} <= told
    recovered = {str(one.rule) for one in result.outcomes if one.verdict == "recovered"}
    assert {"KVM_RUN:errno=EINTR,nth=3", "KVM_RUN:race=immediate_exit,nth=3"} <= recovered
    last = [one for one in result.outcomes if one.rule.site == "KVM_RUN" and one.verdict == "not fired"]
    assert last and all(one.rule.nth > 3 for one in last)  # each sweep ran to its end


def test_every_method_says_every_failure() -> None:
    result = sweep(everything)
    assert not result.failures, result.text()
    assert len({one.rule.site for one in result.outcomes}) > 30


def test_annotate_says_every_failure() -> None:
    result = sweep(annotated, lambda: soft_backend("linux-7.3"))
    bare = "no valid memory_fault"  # what is left where the vCPU cannot be asked
    wrong = [one for one in result.failures if bare not in one.detail]
    assert not wrong, complain(tuple(wrong))


@pytest.mark.parametrize("name", ["vepc", "convert", "poison"])
def test_the_examples_say_every_failure(name: str) -> None:
    main = {"vepc": vepc, "convert": convert, "poison": poison}[name].main
    result = sweep(example(main), expected=(GaveUp,))
    assert not result.failures, result.text()


def test_page_look_ups() -> None:
    rules = [Rule(site="hva_to_pfn", fault=fault) for fault in ("no_vma", "interrupted")]
    result = sweep(hello, at=rules)
    assert not result.failures, result.text()
    assert sum(one.verdict == "told" for one in result.outcomes) >= 1


# -- the sweep itself finds what is wrong -----------------------------------------------------------------------------


def _wrong(scenario: Callable[[Backend], Any], **options: Any) -> dict[str, str]:
    result = sweep(scenario, at=["KVM_GET_API_VERSION"], **options)
    return {str(one.rule): one.verdict for one in result.outcomes if one.verdict != "not fired"}


def test_it_finds_wrong_success_crash_hang_and_leak() -> None:
    kept: list[int] = []

    def use(backend: Backend, wrong: Callable[[], object]) -> object:
        with anykvm.open(backend) as kvm:
            try:
                return kvm.get_api_version()
            except OSError:
                return wrong()

    def crash() -> object:
        raise KeyError("lost")

    def other_errno() -> object:
        raise OSError(errno.EBADF, "another")

    def leak() -> object:
        kept.append(os.dup(0))
        return 12

    found = {}
    for name, wrong in (("wrong", lambda: 11), ("crash", crash), ("errno", other_errno), ("leak", leak)):
        verdicts = _wrong(lambda backend, wrong=wrong: use(backend, wrong))  # type: ignore[misc]
        assert set(verdicts) == {"KVM_GET_API_VERSION:errno=EINVAL"}
        found[name] = verdicts.popitem()[1]
    for fd in kept:
        os.close(fd)
    assert found == {"wrong": "wrong success", "crash": "crash", "errno": "crash", "leak": "leak"}
    hang = _wrong(lambda backend: use(backend, threading.Event().wait), timeout=0.2)
    assert set(hang.values()) == {"hang"}


def test_its_report_replays() -> None:
    def scenario(backend: Backend) -> int:
        with anykvm.open(backend) as kvm:
            try:
                return kvm.get_api_version()
            except OSError:
                return 11

    result = sweep(scenario)
    (failure,) = result.failures
    assert result.text().splitlines() == [
        "1 wrong success, 8 told",
        "wrong success: 11, not 12; replay: KVM_GET_API_VERSION:errno=EINVAL",
    ]
    assert scenario(Inject(soft_backend(), [str(failure).rpartition("replay: ")[2]])) == 11


def test_what_it_cannot_choose_is_refused() -> None:
    with pytest.raises(ValueError, match="ioctl: not one call's"):
        sweep(hello, at=["ioctl"])
    result = sweep(hello, at=[Rule(site="ioctl", errno="EIO")])
    assert not result.failures and len(result.outcomes) > 10


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Examples change the signal mask."""
    import signal

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
