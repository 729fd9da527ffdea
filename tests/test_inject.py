"""The inject layer: each site and errno, what it leaves in kvm_run; and the line that replays it."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable

import pytest

import anykvm
from anykvm import GuestMemory, Hlt, Intr, Io, Kvm, MemoryFault, Mmio, Vcpu, abi
from anykvm.abi.names import errno_name, ioctl_name
from anykvm.backends.base import Backend
from anykvm.layers.inject import Inject, Rule
from anykvm.layers.inject.errnos import IOCTLS, LATE
from anykvm.layers.inject.sites import FAULTS, REQUESTS, legal
from anykvm.testing import Machine
from anykvm.testing.private import AREA, PrivateGuest

OUT = bytes.fromhex("b001 e610 fec0 ebfa")  # mov al, 1; next: out 0x10, al; inc al; jmp next
HALT = b"\xf4"


def real_mode(kvm: Kvm, code: bytes, memory: GuestMemory, vcpu_id: int = 0) -> Vcpu:
    memory[0 : len(code)] = code
    vm = kvm.create_vm()
    vm.map(memory, 0)
    vcpu = vm.create_vcpu(vcpu_id)
    vcpu.set_real_mode(0)
    return vcpu


def fails(action: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno or 0


# -- every ioctl, every errno -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_number", sorted(IOCTLS), ids=ioctl_name)
def test_every_ioctl_gives_each_of_its_errnos(request_number: int) -> None:
    soft = anykvm.backend("soft")
    site = ioctl_name(request_number)
    for number in sorted(legal(request_number)):
        fault = ",memory_fault=0x1000" if site == "KVM_RUN" and errno_name(number) == "EHWPOISON" else ""
        inject = Inject(soft, [f"{site}:errno={errno_name(number)}{fault}"])
        fd = inject.open()
        try:
            if site == "KVM_RUN":
                continue  # below: it needs a vCPU
            with pytest.raises(OSError, match=f"{site}: injected {errno_name(number)}; replay: {site}:") as caught:
                inject.ioctl(fd, request_number, 0)
            assert caught.value.errno == number
            assert [one.nth for one in inject.fired] == [1]
        finally:
            inject.close(fd)


def test_every_ioctl_of_x86_is_in_the_table() -> None:
    foreign = ("KVM_ARM_", "KVM_PPC_", "KVM_S390_")
    named = {name for name in abi.names.IOCTL_NAMES.values() if not name.startswith(foreign)}
    # KVM_DIRTY_TLB is PowerPC's; KVM_GET_NR_MMU_PAGES has no handler (ABI.md 5.1)
    assert named - set(REQUESTS) == {"KVM_DIRTY_TLB", "KVM_GET_NR_MMU_PAGES"}
    assert all(row.source for row in IOCTLS.values())


@pytest.mark.parametrize("site", ["open", "mmap"])
def test_open_and_mmap_fail(site: str) -> None:
    inject = Inject(anykvm.backend("soft"), [f"{site}:errno=ENOMEM"])

    def use() -> None:
        with anykvm.open(inject) as kvm, kvm.create_vm() as vm:
            vm.create_vcpu()

    assert fails(use) == errno.ENOMEM
    use()
    assert [str(one.rule) for one in inject.fired] == [f"{site}:errno=ENOMEM"]


# -- KVM_RUN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("name", ["EFAULT", "EINTR", "EAGAIN", "EIO", "ENOMEM", "EINVAL", "ENOSPC"])
def test_kvm_run_fails_early_and_late_and_the_guest_loses_nothing(backend: Backend, name: str, when: str) -> None:
    """After the failure the guest goes on where it was: every byte comes once."""
    if when == "early" and name == "ENOSPC" or when == "late" and name == "EAGAIN":
        with pytest.raises(ValueError, match="errno: KVM_RUN"):
            Rule(site="KVM_RUN", errno=name, when=when)
        return
    inject = Inject(backend, [f"KVM_RUN:errno={name},when={when},nth=3"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, OUT, memory)
        seen = [vcpu.run(), vcpu.run()]
        if name == "EINTR":
            assert isinstance(vcpu.run(), Intr)
        else:
            assert fails(vcpu.run) == getattr(errno, name)
        reason = abi.KVM_EXIT_INTR if name == "EINTR" else abi.KVM_EXIT_UNKNOWN
        assert vcpu.kvm_run.exit_reason == (abi.KVM_EXIT_IO if when == "early" else reason)
        assert vcpu.kvm_run.immediate_exit == 0
        seen += [vcpu.run(), vcpu.run()]
        assert [exit.data for exit in seen if isinstance(exit, Io)] == [b"\x01", b"\x02", b"\x03", b"\x04"]
    assert len(inject.fired) == 1


def test_an_early_failure_leaves_the_completion_pending_and_a_late_one_does_it() -> None:
    for when, rip in (("early", 2), ("late", 4)):  # in al, 0x10 at 0..2, from rip 2 on
        inject = Inject(anykvm.backend("soft"), [f"KVM_RUN:errno=EIO,when={when},nth=2"])
        with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
            vcpu = real_mode(kvm, bytes.fromhex("9090 e410 f4"), memory)
            exit = vcpu.run()
            assert isinstance(exit, Io)
            exit.respond(7)
            assert fails(vcpu.run) == errno.EIO
            assert vcpu.get_regs().rip == rip
            assert vcpu.run() == Hlt()
            assert vcpu.get_regs().rax & 0xFF == 7


def test_a_late_failure_waits_for_the_exits_that_come_first() -> None:
    """Row 15: the completion makes another exit (the second half of a device access), and that is not lost."""
    inject = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EFAULT,nth=2"])
    with anykvm.open(inject) as kvm, Machine(kvm) as m:
        m.long_mode("movups %xmm0, 0x800000; hlt")
        first, second = m.vcpu.run(), m.vcpu.run()
        assert [type(exit) for exit in (first, second)] == [Mmio, Mmio] and not inject.fired
        assert fails(m.vcpu.run) == errno.EFAULT
        assert [one.nth for one in inject.fired] == [3]
        assert m.vcpu.run() == Hlt()


def test_late_leaves_immediate_exit_and_its_eintr_to_who_asked_for_it() -> None:
    inject = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EFAULT"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, HALT, memory)
        vcpu.immediate_exit = True
        assert isinstance(vcpu.run(), Intr) and vcpu.immediate_exit and not inject.fired
        vcpu.immediate_exit = False
        assert fails(vcpu.run) == errno.EFAULT


def test_an_injected_annotation_is_valid_and_its_flags_and_size_are_the_rules() -> None:
    rules = [
        "KVM_RUN:errno=EFAULT,memory_fault=0x7000,size=0x2000,flags=8",
        "KVM_RUN:errno=EHWPOISON,memory_fault=0x9000",
    ]
    inject = Inject(anykvm.backend("soft", "linux-7.3"), rules)
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, HALT, memory)
        assert vcpu.run() == MemoryFault(0x7000, 0x2000, 8, errno.EFAULT)
        assert vcpu.run() == Hlt()
    inject = Inject(anykvm.backend("soft"), rules[1:])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, HALT, memory)
        assert vcpu.run() == MemoryFault(0x9000, 0x1000, 0, abi.validity.EHWPOISON)


@pytest.mark.parametrize("reason", ["keep", "KVM_EXIT_MMIO", "KVM_EXIT_MEMORY_FAULT"])
def test_stale_exit_reasons(reason: str) -> None:
    inject = Inject(anykvm.backend("soft"), [f"KVM_RUN:errno=EFAULT,when=late,reason={reason},nth=2"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, OUT, memory)
        vcpu.run()
        if reason == "KVM_EXIT_MEMORY_FAULT":
            assert isinstance(vcpu.run(), MemoryFault)  # what is misread: the union is the I/O exit's
        else:
            assert fails(vcpu.run) == errno.EFAULT
        assert vcpu.kvm_run.exit_reason == (abi.KVM_EXIT_IO if reason == "keep" else getattr(abi, reason))


def test_immediate_exit_races() -> None:
    """A kick comes just before KVM_RUN: the answer is taken, the guest is not entered, nothing is lost."""
    inject = Inject(anykvm.backend("soft"), ["KVM_RUN:race=immediate_exit,nth=2"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, bytes.fromhex("e410 f4"), memory)
        exit = vcpu.run()
        assert isinstance(exit, Io)
        exit.respond(9)
        assert vcpu.run() == Intr(abi.KVM_EXIT_IO)
        assert vcpu.get_regs().rip == 2 and vcpu.get_regs().rax & 0xFF == 9
        assert not vcpu.immediate_exit
        assert vcpu.run() == Hlt()


def test_success_that_was_none_needs_unlawful() -> None:
    with pytest.raises(ValueError, match="errno: KVM_SET_REGS gives .* not 0; unlawful"):
        Rule(site="KVM_SET_REGS", errno="0")
    inject = Inject(anykvm.backend("soft"), ["KVM_SET_REGS:errno=0,unlawful,nth=2"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, HALT, memory)
        regs = vcpu.get_regs()
        regs.rax = 5
        vcpu.set_regs(regs)
        assert vcpu.get_regs().rax == 0


def test_a_delay_delays_and_does_not_fail() -> None:
    inject = Inject(anykvm.backend("soft"), ["KVM_GET_API_VERSION:delay=0.05", "KVM_CREATE_VM:delay=0.05,errno=EMFILE"])
    with anykvm.open(inject) as kvm:
        start = time.monotonic()
        assert kvm.get_api_version() == 12
        assert fails(kvm.create_vm) == errno.EMFILE
        assert time.monotonic() - start >= 0.1
    assert len(inject.fired) == 2


def test_run_on_a_duplicate_fails_early_only() -> None:
    import os

    inject = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EIO,times=0"])
    with anykvm.open(inject) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, OUT, memory)
        duplicate = os.dup(vcpu.fileno())
        assert inject.ioctl(duplicate, abi.KVM_RUN) == 0  # not known: it goes on, and the failure waits
        assert not inject.fired
        inject.close(duplicate)
    early = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EIO,when=early"])
    with anykvm.open(early) as kvm, GuestMemory(4096) as memory:
        vcpu = real_mode(kvm, OUT, memory)
        duplicate = os.dup(vcpu.fileno())
        assert fails(lambda: early.ioctl(duplicate, abi.KVM_RUN)) == errno.EIO
        early.close(duplicate)


# -- selection --------------------------------------------------------------------------------------------------------


def calls(rule: str, count: int = 8) -> list[int]:
    """Which of the first calls fail."""
    inject = Inject(anykvm.backend("soft"), [rule])
    with anykvm.open(inject) as kvm:
        found = []
        for number in range(1, count + 1):
            try:
                kvm.get_api_version()
            except OSError:
                found.append(number)
    assert [one.nth for one in inject.fired] == found
    return found


def test_nth_and_times() -> None:
    name = "KVM_GET_API_VERSION:errno=EINVAL"
    assert calls(name) == [1]
    assert calls(f"{name},nth=3") == [3]
    assert calls(f"{name},nth=3,times=2") == [3, 4]
    assert calls(f"{name},nth=6,times=0") == [6, 7, 8]


def test_probability_is_the_seeds_and_each_firing_replays_alone() -> None:
    name = "KVM_GET_API_VERSION:errno=EINVAL,probability=0.4"
    first = calls(f"{name},seed=1", 40)
    assert 5 < len(first) < 30 and calls(f"{name},seed=1", 40) == first
    assert calls(f"{name},seed=2", 40) != first
    assert calls(f"{name},seed=1,times=2", 40) == first[:2]
    inject = Inject(anykvm.backend("soft"), [f"{name},seed=1"])
    with anykvm.open(inject) as kvm:
        while not inject.fired:
            try:
                kvm.get_api_version()
            except OSError as error:
                assert f"replay: {inject.fired[0].replay}" in str(error)
    assert calls(inject.fired[0].replay, 40) == first[:1]


def test_any_ioctl() -> None:
    inject = Inject(anykvm.backend("soft"), ["ioctl:errno=EIO,nth=3"])
    with anykvm.open(inject) as kvm:
        kvm.get_api_version()
        vm = kvm.create_vm()
        assert fails(vm.create_vcpu) == errno.EIO
    assert inject.fired[0].call == "KVM_GET_VCPU_MMAP_SIZE" and "by ioctl" in str(inject.fired[0])


def test_by_vcpu() -> None:
    inject = Inject(anykvm.backend("soft"), ["KVM_RUN:errno=EIO,vcpu=1,times=0"])
    with anykvm.open(inject) as kvm, kvm.create_vm() as vm, GuestMemory(4096) as memory:
        memory[0] = HALT[0]
        vm.map(memory, 0)
        vcpus = [vm.create_vcpu(number) for number in range(3)]
        for vcpu in vcpus:
            vcpu.set_real_mode(0)
        assert vcpus[0].run() == Hlt() == vcpus[2].run()
        assert fails(vcpus[1].run) == errno.EIO
    assert [one.vcpu for one in inject.fired] == [1]


def test_by_address_of_ioctls() -> None:
    """A slot, attributes, a range to populate: every ioctl that has a guest-physical range."""
    rule = "gpa=0x2000-0x3000,times=0"
    sites = ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2", "KVM_SET_MEMORY_ATTRIBUTES")
    inject = Inject(
        anykvm.backend("soft"), [f"{site}:errno=ENOMEM,{rule}" for site in (*sites, "KVM_PRE_FAULT_MEMORY")]
    )
    with anykvm.open(inject) as kvm, GuestMemory(0x4000) as memory:
        vm = kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM)
        vm.set_user_memory_region(0, 0, 0x2000, memory.address)
        assert fails(lambda: vm.set_user_memory_region(1, 0x2000, 0x1000, memory.address)) == errno.ENOMEM
        vm.set_user_memory_region2(1, 0x3000, 0x1000, memory.address)
        assert fails(lambda: vm.set_user_memory_region2(2, 0x2000, 0x1000, memory.address)) == errno.ENOMEM
        vm.set_memory_attributes(0x3000, 0x1000, 0)
        assert fails(lambda: vm.set_memory_attributes(0x1000, 0x2000, 0)) == errno.ENOMEM
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(0x3000, 0x1000)
        assert fails(lambda: vcpu.pre_fault_memory(0x2000, 0x1000)) == errno.ENOMEM
        # an argument that cannot be read selects nothing, and is the backend's to refuse
        assert fails(lambda: vm.ioctl(abi.KVM_SET_MEMORY_ATTRIBUTES, 8)) == errno.EFAULT
    assert len(inject.fired) == 4


# -- page look-ups of the soft backend --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["documented", "linux-7.3"])
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "poisoned"])
def test_look_ups_fail(fault: str, profile: str) -> None:
    inject = Inject(anykvm.backend("soft", profile), [f"hva_to_pfn:fault={fault},gpa=0x60000"])
    with anykvm.open(inject) as kvm, Machine(kvm) as m:
        m.long_mode("movb $5, 0x60000; mov 0x60000, %al; hlt")
        if fault == "interrupted":
            assert m.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        elif profile == "documented":
            assert m.vcpu.run() == MemoryFault(0x60000, 0x1000, 0, errno.EFAULT)
        else:
            assert fails(m.vcpu.run) == errno.EFAULT and m.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN
        assert m.vcpu.get_regs().rip == 0x1000  # the store was not done
        m.run_to_halt()
        assert m.vcpu.get_regs().rax & 0xFF == 5
    fired = inject.fired[0]
    assert (fired.gpa, fired.vcpu, fired.call) == (0x60000, 0, "hva_to_pfn")


def test_a_poisoned_look_up_sends_sigbus(sigbus: list[int]) -> None:
    inject = Inject(anykvm.backend("soft"), ["hva_to_pfn:fault=poisoned,gpa=0x60000"])
    with anykvm.open(inject) as kvm, Machine(kvm) as m:
        m.long_mode("movb $5, 0x60000; hlt")
        assert m.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        assert sigbus == [signal.SIGBUS]
        m.run_to_halt()


def test_denied_is_about_writes_and_persistent_rules_persist() -> None:
    inject = Inject(anykvm.backend("soft"), ["hva_to_pfn:fault=denied,gpa=0x60000,times=0"])
    with anykvm.open(inject) as kvm, Machine(kvm) as m:
        m.long_mode("mov 0x60000, %al; movb $5, 0x60000; hlt")
        for _ in range(3):
            assert isinstance(m.vcpu.run(), MemoryFault)
        assert m.vcpu.get_regs().rip > 0x1000  # the load was


def test_page_tables_and_code_are_looked_up_too() -> None:
    for gpa in (0x10000, 0x1000):  # the page table, the code
        inject = Inject(anykvm.backend("soft"), [f"hva_to_pfn:fault=no_vma,gpa={gpa:#x}"])
        with anykvm.open(inject) as kvm, Machine(kvm) as m:
            m.long_mode("hlt")
            assert m.vcpu.run() == MemoryFault(gpa, 0x1000, 0, errno.EFAULT)
            m.run_to_halt()


def test_an_emulated_access_that_is_refused_is_a_device_access() -> None:
    """ABI.md 0.9: to KVM's emulator what cannot be touched is a device."""
    inject = Inject(anykvm.backend("soft"), ["hva_to_pfn:fault=no_vma,gpa=0x60000"])
    with anykvm.open(inject) as kvm, Machine(kvm) as m:
        m.long_mode("mov $0x800000, %esi; mov $0x60000, %edi; movsb; hlt")
        exit = m.vcpu.run()
        assert isinstance(exit, Mmio) and exit.phys_addr == 0x800000
        exit.respond(1)
        exit = m.vcpu.run()
        assert exit == MemoryFault(0x60000, 0x1000, 0, errno.EFAULT) or isinstance(exit, Mmio), exit


@pytest.mark.parametrize("name", ["ENOMEM", "EIO", "EFAULT", "EHWPOISON"])
@pytest.mark.parametrize("ioctl", ["KVM_RUN", "KVM_PRE_FAULT_MEMORY"])
def test_guest_memfd_look_ups_fail(name: str, ioctl: str) -> None:
    inject = Inject(anykvm.backend("soft"), [f"kvm_gmem_get_pfn:errno={name},gpa={AREA:#x}"])
    guest = PrivateGuest(inject)  # type: ignore[arg-type]
    try:
        guest.private()
        guest.load("mov (%rbx), %eax; hlt")
        if ioctl == "KVM_PRE_FAULT_MEMORY":
            failed = fails(lambda: guest.vcpu.pre_fault_memory(AREA, 0x1000))
        else:
            failed = guest.fails()[0]
        assert errno_name(failed) == name
        fault = guest.vcpu.kvm_run.memory_fault
        assert (guest.vcpu.kvm_run.exit_reason, fault.gpa, fault.flags) == (abi.KVM_EXIT_MEMORY_FAULT, AREA, 8)
        guest.run_to_halt()
    finally:
        guest.close()


def test_an_interrupted_guest_memfd_look_up() -> None:
    inject = Inject(anykvm.backend("soft"), [f"kvm_gmem_get_pfn:fault=interrupted,gpa={AREA:#x}"])
    guest = PrivateGuest(inject)  # type: ignore[arg-type]
    try:
        guest.private()
        guest.load("mov (%rbx), %eax; hlt")
        assert guest.vcpu.run() == Intr(abi.KVM_EXIT_INTR)
        guest.run_to_halt()
    finally:
        guest.close()


def test_look_ups_need_the_soft_backend() -> None:
    with pytest.raises(ValueError, match="only the soft backend"):
        Inject(anykvm.backend("device"), ["hva_to_pfn:fault=no_vma"])


def test_the_vm_may_outlive_the_layer() -> None:
    import gc

    kvm = anykvm.open(Inject(anykvm.backend("soft"), ["hva_to_pfn:fault=no_vma,gpa=0x60000,times=0"]))
    with kvm, Machine(kvm) as m:
        soft = m.vm.backend.inner  # type: ignore[attr-defined]
        m.kvm._backend = m.vm._backend = m.vcpu._backend = soft
        m.vcpu._run_ioctl = soft.ioctl
        gc.collect()
        m.long_mode("movb $5, 0x60000; hlt")
        assert isinstance(m.vcpu.run(), MemoryFault)


def test_lateness_is_where_the_errno_can_be() -> None:
    assert Rule(site="KVM_RUN", errno="EAGAIN").when == "early"
    assert all(Rule(site="KVM_RUN", errno=errno_name(n), memory_fault=0).when == "late" for n in LATE.errnos)
