"""The contract layer: each rule is broken on purpose, by a KVM whose failures are injected or by a VMM that errs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable, Iterator

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Intr, Io, Mmio, Vcpu, Vm, abi
from anykvm.abi.ioctls import KVM_PRE_FAULT_MEMORY
from anykvm.abi.structures import kvm_pre_fault_memory
from anykvm.backends.base import Backend
from anykvm.layers.base import Layer
from anykvm.layers.contract import RULES, Contract, ContractError, ContractWarning
from anykvm.layers.inject import Inject
from anykvm.testing import Machine

OUT = bytes.fromhex("b001 e610 ebfc")  # mov al, 1; next: out 0x10, al; jmp next
READ = bytes.fromhex("8a1e 0080 f4")  # mov bl, [0x8000]; hlt: a device's, where no slot is


class Guest:
    """A real-mode guest under the contract, on a KVM whose failures are injected."""

    def __init__(self, inner: Backend, code: bytes, limit: int = 8) -> None:
        self.contract = Contract(inner, limit=limit)
        self.kvm = anykvm.open(self.contract)
        self.memory = GuestMemory(0x4000)
        self.memory[0 : len(code)] = code
        self.vm: Vm = self.kvm.create_vm()
        self.vm.map(self.memory, 0)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        self.vcpu.set_real_mode(0)

    def run(self, times: int = 1) -> None:
        """Run, whatever comes of it."""
        for _ in range(times):
            with contextlib.suppress(OSError):
                self.vcpu.run()

    def broken(self) -> list[str]:
        """What was broken, once each."""
        return sorted(self.contract.counts)

    def close(self) -> None:
        self.kvm.close()
        self.memory.close()


@contextlib.contextmanager
def guest(*rules: str, code: bytes = OUT, profile: str = "linux-7.3") -> Iterator[Guest]:
    made = Guest(Inject(anykvm.backend("soft", profile), rules), code)
    try:
        yield made
    finally:
        made.close()


# -- the kernel's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(
    ("reason", "name"), [("MEMORY_FAULT", "success-with-memory-fault"), ("INTR", "success-with-intr")]
)
def test_success_that_says_failure(reason: str, name: str, nth: int) -> None:
    with guest(f"KVM_RUN:errno=0,reason=KVM_EXIT_{reason},unlawful,nth={nth}") as g:
        g.run(3)
        assert g.broken() == [name] and g.contract.counts[name] == 1


@pytest.mark.parametrize("name", ["ENOMEM", "EIO", "EINVAL", "ENOSPC"])
def test_annotation_with_another_errno(name: str) -> None:
    with guest(f"KVM_RUN:errno={name},memory_fault=0x1000,nth=2") as g:
        g.run(3)
        assert g.broken() == ["errno-of-memory-fault"]
        assert name in g.contract.violations[0].text


@pytest.mark.parametrize("first", ["EFAULT", "EHWPOISON"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_early_efault_makes_a_stale_annotation_valid(first: str, nth: int) -> None:
    """ABI.md 7.3: P1 is sound as long as no EFAULT comes before exit_reason is reset."""
    rules = f"KVM_RUN:errno={first},memory_fault=0x1000,nth={nth}", f"KVM_RUN:errno=EFAULT,when=early,nth={nth + 1}"
    with guest(*rules) as g:
        g.run(nth + 2)
        assert g.broken() == ["stale-memory-fault"]
        assert g.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO


def test_a_failure_that_is_written_anew_is_not_stale() -> None:
    with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000,times=3") as g:
        g.run(5)
        assert g.broken() == []


def test_other_errnos_leave_a_stale_annotation_and_break_nothing() -> None:
    for name in ("EINVAL", "EIO", "EAGAIN", "ENOMEM"):
        with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000", f"KVM_RUN:errno={name},when=early,nth=2") as g:
            g.run(2)
            assert g.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT  # the mark was taken away
            assert g.broken() == []


@pytest.mark.parametrize("form", ["memory_fault=0x1001", "memory_fault=0x1000,size=0", "memory_fault=0x1000,size=0x10"])
def test_annotations_are_whole_pages(form: str) -> None:
    with guest(f"KVM_RUN:errno=EFAULT,{form}") as g:
        g.run(2)
        assert g.broken() == ["form-of-memory-fault"]


@pytest.mark.parametrize("code", [OUT, READ, bytes.fromhex("e410 f4"), bytes.fromhex("b90200 bf0010 f36c f4")])
def test_immediate_exit_before_the_completion(code: bytes) -> None:
    """Of a port's write and read, of a device's read, and of INS: something waits, and is completed first."""
    for rules in ((), ("KVM_RUN:errno=EINTR,when=early,nth=2",)):
        with guest(*rules, code=code) as g:
            g.run()
            g.vcpu.immediate_exit = True
            g.run()
            assert g.broken() == (["completion-before-immediate-exit"] if rules else [])
            g.run(2)  # nothing waits any more
            assert sum(g.contract.counts.values()) == len(rules)


def test_eintr_without_a_reason() -> None:
    with guest("KVM_RUN:errno=EINTR,when=early,nth=2", "KVM_RUN:errno=EINTR,nth=4") as g:
        g.run(5)
        assert dict(g.contract.counts) == {"reason-of-signal": 1}


def test_an_exit_reason_that_is_purged_early() -> None:
    """T9: an exit that the VMM put off is lost."""
    with guest("KVM_RUN:errno=EINTR,when=early,reason=KVM_EXIT_UNKNOWN,nth=2", code=bytes.fromhex("f4 f4")) as g:
        g.run()
        g.vcpu.immediate_exit = True
        g.run()
        assert g.broken() == ["reason-kept-by-immediate-exit"]


def test_pre_fault_progress() -> None:
    with guest("KVM_PRE_FAULT_MEMORY:errno=0,unlawful,nth=2") as g:
        g.vcpu.pre_fault_memory(0, 0x2000)
        assert g.broken() == []
        argument = kvm_pre_fault_memory(gpa=0, size=0x1000)
        g.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, argument)
        assert g.broken() == ["pre-fault-progress"]
        with pytest.raises(OSError):
            g.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, 8)  # an argument that cannot be read is looked at by KVM alone
        assert g.contract.counts["pre-fault-progress"] == 1


@pytest.mark.parametrize(("gpa", "size", "failed"), [(0x1000, 0x1000, 5), (0x1000, 0x2000, 0), (0x4000, 0, 0)])
def test_a_range_that_is_left_wrong(gpa: int, size: int, failed: int) -> None:
    class Wrong(Layer):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
            if request == KVM_PRE_FAULT_MEMORY:
                argument = kvm_pre_fault_memory.from_address(arg)
                argument.gpa, argument.size = gpa, size
                if failed:
                    raise OSError(failed, "KVM_PRE_FAULT_MEMORY")
                return 0
            return self.inner.ioctl(fd, request, arg)

    g = Guest(Wrong(anykvm.backend("soft")), OUT)
    with contextlib.suppress(OSError):
        g.vcpu.ioctl(KVM_PRE_FAULT_MEMORY, kvm_pre_fault_memory(gpa=0, size=0x2000))
    assert g.broken() == ["pre-fault-progress"]
    g.close()


def test_a_capability_that_is_enabled_and_one_that_is_asked_for() -> None:
    for rules, names in (
        ((), ["enables-informational-capability"]),
        (("KVM_ENABLE_CAP:errno=0,unlawful",), ["enables-informational-capability", "informational-capability"]),
    ):
        with guest(*rules) as g, contextlib.suppress(OSError):
            g.vm.enable_cap(abi.KVM_CAP_MEMORY_FAULT_INFO)
        assert g.broken() == names
    with guest() as g, contextlib.suppress(OSError):
        g.vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 9)
        g.vm.ioctl(abi.KVM_ENABLE_CAP, 8)
    assert g.broken() == []


@pytest.mark.parametrize("site", ["KVM_GET_REGS", "KVM_RUN", "KVM_SET_MEMORY_ATTRIBUTES", "KVM_PRE_FAULT_MEMORY"])
def test_an_errno_that_no_kernel_gives(site: str) -> None:
    with guest(f"{site}:errno=EROFS,unlawful") as g:
        calls: dict[str, Callable[[], object]] = {
            "KVM_GET_REGS": g.vcpu.get_regs,
            "KVM_RUN": g.vcpu.run,
            "KVM_SET_MEMORY_ATTRIBUTES": lambda: g.vm.set_memory_attributes(0, 0x1000, 0),
            "KVM_PRE_FAULT_MEMORY": lambda: g.vcpu.pre_fault_memory(0, 0x1000),
        }
        with pytest.raises(OSError):
            calls[site]()
        assert g.broken() == ["errno"]
        with pytest.raises(OSError):
            g.vcpu.ioctl(0xAEFF)  # no such ioctl: not in the table
        assert g.contract.counts["errno"] == 1


# -- the VMM's mistakes -----------------------------------------------------------------------------------------------


def test_pre_fault_while_a_read_waits() -> None:
    """T13: memory_fault lies where the device's answer does."""
    with guest(code=READ) as g:
        g.vcpu.pre_fault_memory(0, 0x1000)
        exit = g.vcpu.run()
        assert isinstance(exit, Mmio) and g.broken() == []
        g.vcpu.pre_fault_memory(0, 0x1000)
        assert g.broken() == ["pre-fault-with-pending-completion"]
        exit.respond(1)
        assert g.vcpu.run() == Hlt()
        g.vcpu.pre_fault_memory(0, 0x1000)
        assert sum(g.contract.counts.values()) == 1


@pytest.mark.parametrize("reason", ["X86_RDMSR", "X86_WRMSR"])
def test_pre_fault_while_an_msr_waits(reason: str) -> None:
    with guest() as g:
        g.run()
        g.vcpu.kvm_run.exit_reason = getattr(abi, f"KVM_EXIT_{reason}")
        g.vcpu.pre_fault_memory(0, 0x1000)
        assert g.broken() == ["pre-fault-with-pending-completion"]


def test_pre_fault_after_writes_and_failures_is_right() -> None:
    with guest("KVM_RUN:errno=EIO,nth=2", code=bytes.fromhex("881e 0080 f4")) as g:
        assert isinstance(g.vcpu.run(), Mmio)
        g.vcpu.pre_fault_memory(0, 0x1000)
        g.run()
        g.vcpu.pre_fault_memory(0, 0x1000)
        assert g.broken() == []


def waist_slot(g: Guest) -> int:
    """On this thread itself; the API's calls are done on a worker, where coverage sees nothing."""
    region = abi.kvm_userspace_memory_region(slot=5, memory_size=0x2000, userspace_addr=g.memory.address)
    return g.contract.ioctl(g.vm.fileno(), abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))


ACTS: dict[str, Callable[[Guest], object]] = {
    "attributes": lambda g: g.vm.set_memory_attributes(0x1000, 0x1000, 0),
    "slot": lambda g: g.vm.set_user_memory_region(5, 0, 0x2000, g.memory.address),
    "slot, at the waist": lambda g: waist_slot(g),
    "slot2": lambda g: g.vm.set_user_memory_region2(5, 0, 0x2000, g.memory.address),
    "pre-fault": lambda g: g.vcpu.pre_fault_memory(0x1000, 0x1000),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("then", ["EINTR", "EINVAL", "EIO", "EAGAIN"])
def test_acting_on_a_stale_annotation(then: str, act: str) -> None:
    """T1 to T4: what P1's rule forbids, and a rule by exit_reason alone does."""
    with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000,nth=2", f"KVM_RUN:errno={then},when=early,nth=3") as g:
        g.run(2)
        with contextlib.suppress(OSError):
            ACTS[act](g)  # this one is right: the annotation is valid
        assert g.broken() == []
        g.vcpu.immediate_exit = then == "EINTR"
        g.run()
        with contextlib.suppress(OSError):
            ACTS[act](g)
        assert g.broken() == ["acts-on-stale-memory-fault"]


def test_other_pages_other_ioctls_and_bad_pointers_are_not_acting() -> None:
    with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000", "KVM_RUN:errno=EINVAL,when=early,nth=2") as g:
        g.run(2)
        for wrong in (
            lambda: g.vm.set_memory_attributes(0x2000, 0x1000, 0),
            lambda: g.vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 9),
            lambda: g.vm.ioctl(abi.KVM_SET_MEMORY_ATTRIBUTES, 8),
        ):
            with contextlib.suppress(OSError):
                wrong()
        assert g.broken() == []


@pytest.mark.parametrize("name", ["EFAULT", "EIO", "EINVAL", "ENOMEM"])
def test_the_same_failure_again_and_again(name: str) -> None:
    for fault in ("", ",memory_fault=0x1000") if name == "EFAULT" else ("",):
        with guest(f"KVM_RUN:errno={name}{fault},times=0") as g:
            g.run(7)
            assert g.broken() == []
            g.run(20)
            assert dict(g.contract.counts) == {"unbounded-retry": 1}


def test_failures_with_progress_or_signals_are_not_the_same() -> None:
    with anykvm.open(contract := Contract(anykvm.backend("soft"), limit=4)) as kvm, Machine(kvm) as m:
        m.long_mode("mov $0x60000, %edi; mov $8, %ecx; rep stosb; hlt")
        m.memory.protect(0x60000, 0x1000, 0)
        for left in range(8):  # the VMM does one byte itself each time, as an emulator of its own would
            assert isinstance(m.vcpu.run(), anykvm.MemoryFault)
            m.set_regs(rdi=0x60001 + left, rcx=7 - left)
    assert not contract.violations
    with guest("KVM_RUN:errno=EINTR,times=0") as g:
        g.run(20)
        assert g.broken() == []


def test_poison_that_is_ignored() -> None:
    with guest("KVM_RUN:errno=EHWPOISON,memory_fault=0x1000,times=4") as g:
        g.run()
        assert g.broken() == []
        g.run(3)
        assert dict(g.contract.counts) == {"ignores-ehwpoison": 1}


def test_flags_that_are_ignored() -> None:
    with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000,flags=0x10") as g:
        g.run()
        assert g.broken() == []
        g.run()
        assert g.broken() == ["ignores-unknown-flags"]
    with guest("KVM_RUN:errno=EFAULT,memory_fault=0x1000,flags=8") as g:
        g.run(2)
        assert g.broken() == []


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_every_rule_says_who_where_and_what() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.whose in ("kernel", "VMM") and rule.document and rule.text.endswith(".") and rule.__doc__


def test_reports() -> None:
    rules = ["KVM_RUN:errno=EFAULT,memory_fault=0x1001"]
    for report in ("raise", "warn"):
        contract = Contract(Inject(anykvm.backend("soft"), rules), report)
        with anykvm.open(contract) as kvm, kvm.create_vm() as vm:
            vcpu = vm.create_vcpu()
            if report == "raise":
                with pytest.raises(ContractError, match="kernel breaks form-of-memory-fault on vCPU 0: KVM_RUN gave"):
                    vcpu.run()
            else:
                with pytest.warns(ContractWarning, match="form-of-memory-fault"):
                    vcpu.run()
        assert contract.summary().startswith("1 x kernel breaks form-of-memory-fault on vCPU 0: KVM_RUN gave EFAULT")
        assert len(contract.violations) == 1
    for arguments in ({"report": "shout"}, {"limit": 2}):
        with pytest.raises(ValueError):
            Contract(anykvm.backend("soft"), **arguments)


def test_it_keeps_a_thousand_and_counts_all() -> None:
    with guest("KVM_GET_REGS:errno=EROFS,unlawful,times=0") as g:
        for _ in range(1010):
            with contextlib.suppress(OSError):
                g.vcpu.get_regs()
        assert g.contract.counts["errno"] == 1010 and len(g.contract.violations) == 1000


def test_descriptors_that_it_did_not_see_being_made_are_forwarded() -> None:
    import os

    with guest() as g:
        duplicate = os.dup(g.vcpu.fileno())
        assert g.contract.ioctl(duplicate, abi.KVM_RUN) == 0
        with pytest.raises(OSError) as caught:
            g.contract.ioctl(duplicate, abi.KVM_RUN, 1)
        assert caught.value.errno == errno.EINVAL and g.broken() == []
        g.contract.close(duplicate)


def test_a_vcpu_that_cannot_be_asked() -> None:
    with guest("KVM_RUN:errno=EFAULT,times=3", "KVM_GET_REGS:errno=ENOMEM,nth=2,times=0") as g:
        g.run(4)
        assert g.broken() == []


def test_a_descriptor_that_is_used_again_is_another_vcpu() -> None:
    import os

    with guest() as g:
        g.run()
        fd = g.vcpu.fileno()
        os.close(fd)  # not by the layer
        again = g.contract.ioctl(g.vm.fileno(), abi.KVM_CREATE_VCPU, 3)
        assert again == fd
        assert g.contract.ioctl(fd, abi.KVM_GET_REGS, ctypes.addressof(abi.structures.kvm_regs())) == 0


def test_a_guest_that_runs_well_breaks_nothing(backend: Backend) -> None:
    with guest() as g:
        for _ in range(20):
            assert isinstance(g.vcpu.run(), Io)
        g.vcpu.immediate_exit = True
        assert isinstance(g.vcpu.run(), Intr)
        assert g.broken() == []
    real = Guest(backend, OUT)
    assert all(isinstance(real.vcpu.run(), Io) for _ in range(20))
    assert real.broken() == []
    real.close()
