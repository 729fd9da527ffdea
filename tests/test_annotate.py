"""The annotate layer: what it says of a bare EFAULT, that it says nothing else, and that it agrees with the truth."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

import anykvm
from annotate_bed import run
from annotate_fuzz import run as run_opcodes
from annotate_modes import MODES
from anykvm import GuestMemory, MemoryFault, abi
from anykvm.layers.annotate import Access, Annotate, Cause, UnresolvedAccess
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.finder import Finder
from anykvm.layers.annotate.hostmap import HostMap
from anykvm.layers.annotate.memory import GuestPhysical, Slot
from anykvm.testing.machine import CODE, DATA, IDT, PML4, STACK, Machine
from fakes import FakeBackend

PAGE = 4096


@pytest.fixture
def machine() -> Iterator[Machine]:
    with anykvm.open(Annotate(anykvm.backend("soft", "linux-7.3"))) as kvm, Machine(kvm) as made:
        yield made


def cause_of(machine: Machine) -> Cause:
    """Run into a bare EFAULT, and give its cause."""
    with pytest.raises(OSError) as caught:
        machine.vcpu.run()
    assert caught.value.errno == errno.EFAULT
    cause = caught.value.cause  # type: ignore[attr-defined]
    assert isinstance(cause, Cause)
    assert isinstance(machine.kvm.backend, Annotate)
    assert machine.kvm.backend.last_cause(machine.vcpu.fileno()) is cause
    assert cause.reason in str(caught.value)
    assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN  # strict: untouched
    return cause


def test_read_only_mapping_of_a_file() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * PAGE)
    with (
        anykvm.open(Annotate(anykvm.backend("soft", "linux-7.3"))) as kvm,
        kvm.create_vm() as vm,
        GuestMemory(16 * PAGE, fd=fd) as memory,
    ):
        os.close(fd)
        vm.map(memory, 0, slot=3)
        memory[0:3] = bytes.fromhex("a20070")  # mov [0x7000], al
        memory.protect(0x7000, PAGE, 1)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(0)
        with pytest.raises(OSError) as caught:
            vcpu.run()
        cause = caught.value.cause  # type: ignore[attr-defined]
        assert cause.reason == (
            f"write to gpa 0x7000: memslot 3 maps it to {memory.address + 0x7000:#x}, "
            "which is mapped read-only (memfd:ram)"
        )
        assert (cause.size, cause.access, cause.slot, cause.vma.perms) == (1, Access.WRITE, 3, "r--s")
        assert cause.plain()["candidates"][0]["gpa"] == 0x7000


@pytest.mark.parametrize(
    ("how", "words"),
    [("none", "without any access, PROT_NONE"), ("unmapped", "nothing is mapped"), ("beyond", "beyond the end")],
)
def test_what_the_host_says(machine: Machine, how: str, words: str) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 2 * PAGE)
    with GuestMemory(2 * PAGE, fd=fd) as memory:
        machine.vm.map(memory, 0x800000)
        machine.long_mode("mov $0x801008, %esi; mov (%rsi), %rax; hlt")
        if how == "none":
            memory.protect(PAGE, PAGE, 0)
        elif how == "unmapped":
            memory.unmap(PAGE, PAGE)
        else:
            os.ftruncate(fd, PAGE)
        os.close(fd)
        cause = cause_of(machine)
        assert words in cause.reason
        assert (cause.gpa, cause.page, cause.size, cause.access) == (0x801008, 0x801000, 8, Access.READ)
        assert cause.hva == memory.address + PAGE + 8 and not cause.ambiguous
        assert (cause.vma is None) == (how == "unmapped")
        assert cause.instruction == "mov rax, qword ptr [rsi]"


def test_the_second_page_of_an_access(machine: Machine) -> None:
    machine.long_mode("mov $0x60ffd, %esi; mov %rax, (%rsi); hlt")
    machine.memory.protect(0x61000, PAGE, 0)
    cause = cause_of(machine)
    assert (cause.gpa, cause.size, cause.access, cause.linear) == (0x61000, 5, Access.WRITE, 0x61000)


def test_an_instruction_across_pages(machine: Machine) -> None:
    machine.long_mode("mov $0x60ffd, %eax; jmp *%rax")
    machine.memory.write(0x60FFD, bytes.fromhex("48b81122334455667788"))  # movabs
    machine.memory.unmap(0x61000, PAGE)
    cause = cause_of(machine)
    assert (cause.gpa, cause.access, cause.role) == (0x61000, Access.EXEC, "instruction")


def test_a_page_table(machine: Machine) -> None:
    machine.long_mode("mov (%rsi), %rax; hlt")
    machine.memory.protect(PML4 + 0x1000, PAGE, 1)
    cause = cause_of(machine)
    assert (cause.page, cause.access, cause.role) == (PML4 + 0x1000, Access.WRITE, "page table")
    assert f"page table of {CODE:#x}" in cause.reason


@pytest.mark.parametrize(
    ("page", "role", "access"),
    [(IDT, "idt", Access.READ), (0x4000, "descriptor", Access.READ), (STACK - PAGE, "stack", Access.WRITE)],
)
def test_delivery_of_an_exception(machine: Machine, page: int, role: str, access: Access) -> None:
    machine.long_mode("ud2")
    machine.memory.protect(page, PAGE, 0)
    cause = cause_of(machine)
    assert (cause.page, cause.role, cause.access) == (page, role, access)
    assert cause.instruction == "delivery of exception 6"


def test_two_reads_without_an_order_are_ambiguous(machine: Machine) -> None:
    machine.long_mode("mov $0x60000, %esi; mov $0x62000, %edi; cmpsq")
    machine.memory.protect(DATA, PAGE, 0)
    machine.memory.protect(0x62000, PAGE, 0)
    cause = cause_of(machine)
    assert cause.ambiguous and cause.reason.startswith("ambiguous, one of 2: ")
    assert {suspect.page for suspect in cause.candidates} == {DATA, 0x62000}


def test_fill_makes_the_documented_exit() -> None:
    backend = Annotate(anykvm.backend("soft", "linux-7.3"), mode="fill")
    with anykvm.open(backend=backend) as kvm, Machine(kvm) as machine:
        machine.long_mode("mov $0x61008, %esi; mov (%rsi), %rax; hlt")
        machine.memory.protect(0x61000, PAGE, 0)
        assert machine.vcpu.run() == MemoryFault(0x61000, PAGE, 0, errno.EFAULT)
        assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT
        machine.memory.protect(0x61000, PAGE, 3)
        machine.run_to_halt()


def test_fill_does_not_guess() -> None:
    with anykvm.open(Annotate(anykvm.backend("soft", "linux-7.3"), mode="fill")) as kvm, Machine(kvm) as machine:
        machine.long_mode("mov $0x60000, %esi; mov $0x62000, %edi; cmpsq")
        machine.memory.protect(DATA, PAGE, 0)
        machine.memory.protect(0x62000, PAGE, 0)
        with pytest.raises(OSError, match="ambiguous"):
            machine.vcpu.run()
        assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN


def test_a_valid_annotation_is_left_alone() -> None:
    backend = Annotate(anykvm.backend("soft", "documented"))
    with anykvm.open(backend) as kvm, Machine(kvm) as machine:
        machine.long_mode("mov $0x61000, %esi; mov (%rsi), %rax; hlt")
        machine.memory.protect(0x61000, PAGE, 0)
        assert machine.vcpu.run() == MemoryFault(0x61000, PAGE, 0, errno.EFAULT)
        assert backend.last_cause(machine.vcpu.fileno()) is None


def test_slots_follow_the_ioctls(machine: Machine) -> None:
    machine.long_mode("mov $0x800000, %esi; mov %eax, (%rsi); hlt")
    with GuestMemory(PAGE) as memory:
        memory.protect(0, PAGE, 0)
        machine.vm.map(memory, 0x900000, slot=7)
        machine.vm.set_user_memory_region(7, 0x800000, PAGE, memory.address)  # moved
        assert (cause_of(machine).slot, cause_of(machine).hva) == (7, memory.address)
        machine.vm.unmap(7)
        assert isinstance(machine.vcpu.run(), anykvm.Mmio)


def test_protected_mode_and_sixteen_bits(machine: Machine) -> None:
    """Segment bases count, and addresses wrap at the address size."""
    machine.memory.write(CODE, bytes.fromhex("678b06"))  # mov eax, [esi] in 16-bit code
    machine.vcpu.set_real_mode(CODE)
    sregs = machine.vcpu.get_sregs()
    sregs.ds.base, sregs.ds.selector = 0x60000, 0x6000
    machine.vcpu.set_sregs(sregs)
    machine.set_regs(rsi=0x1010)
    machine.memory.protect(0x61000, PAGE, 0)
    cause = cause_of(machine)
    assert (cause.gpa, cause.size) == (0x61010, 2)


def test_other_errors_pass(machine: Machine) -> None:
    with pytest.raises(OSError) as caught:
        machine.kvm.backend.ioctl(machine.vcpu.fileno(), abi.KVM_RUN, 1)
    assert caught.value.errno == errno.EINVAL and not isinstance(caught.value, UnresolvedAccess)


def test_a_vcpu_it_never_saw_goes_unexplained(machine: Machine) -> None:
    machine.long_mode("mov $0x61000, %esi; mov (%rsi), %rax; hlt")
    machine.memory.protect(0x61000, PAGE, 0)
    stranger = Annotate(anykvm.backend("soft", "linux-7.3"))
    with pytest.raises(OSError) as caught:
        stranger.ioctl(machine.vcpu.fileno(), abi.KVM_RUN)
    assert not isinstance(caught.value, UnresolvedAccess)
    assert stranger.last_cause(machine.vcpu.fileno()) is None


def test_it_is_a_backend_and_forwards() -> None:
    inner = FakeBackend()
    layer = Annotate(inner)
    assert isinstance(layer, anykvm.Backend)
    assert (layer.name, layer.profile) == ("soft", "fake")
    with pytest.raises(ValueError, match="strict, fill"):
        Annotate(inner, mode="loud")  # type: ignore[arg-type]
    with anykvm.open(layer) as kvm, kvm.create_vm() as vm:
        vm.create_vcpu().close()
    assert inner.log.count("mmap") == inner.log.count("munmap") == 2  # the API's mapping, and the layer's own
    assert not inner.fds


def test_looking_at_host_memory_never_crashes() -> None:
    with GuestMemory(2 * PAGE) as memory:
        memory[0:4] = b"abcd"
        memory.protect(0, PAGE, 0)
        memory.unmap(PAGE, PAGE)
        host = HostMap()
        assert host.peek(memory.address, 4) == b"abcd"
        assert host.peek(memory.address + PAGE, 4) is None
        assert host.peek(1 << 62, 4) is None and host.peek(0, 1) is None
        host.close()


@pytest.mark.parametrize(("mode", "count"), [(mode, 1000 if mode == "long" else 300) for mode in MODES])
def test_faults_are_explained_as_they_were(mode: str, count: int) -> None:
    """`make annotate` does ten thousand."""
    result = run(count, 1, mode)
    assert not result.wrong, "\n".join([str(result), *result.wrong[:20]])
    assert result.ambiguous <= result.faults // 50
    roles = {"operand", "stack", "instruction", "idt"}
    roles |= {"descriptor", "tss"} if MODES[mode].protected else set()
    roles |= {"page table"} if MODES[mode].levels else set()
    assert roles <= set(result.roles)


@pytest.mark.parametrize("mode", MODES)
def test_generated_opcodes_are_explained_as_they_were(mode: str) -> None:
    """A part of them; `make annotate` runs all."""
    result = run_opcodes(600, 1, mode)
    assert not result.wrong, "\n".join([str(result), *result.wrong[:20]])
    assert result.faults > 60 and {"operand", "stack"} <= set(result.roles)


def test_unresolved_access_is_what_run_raises(machine: Machine) -> None:
    machine.long_mode("mov $0x61000, %esi; mov (%rsi), %rax; hlt")
    machine.memory.protect(0x61000, PAGE, 0)
    with pytest.raises(UnresolvedAccess, match=r"^\[Errno 14\] KVM_RUN\(vcpu=0\): read from gpa 0x61000") as caught:
        machine.vcpu.run()
    assert caught.value.errno == errno.EFAULT and caught.value.cause.gpa == 0x61000
    with pytest.raises(UnresolvedAccess):
        machine.vcpu.ioctl(abi.KVM_RUN)


def test_what_cannot_be_decoded_is_said(machine: Machine) -> None:
    """The engine runs 8F /1 as a POP, which it is not; the layer does not guess what is touched."""
    machine.long_mode(".byte 0x8f, 0x0e")
    machine.memory.protect(STACK, PAGE, 0)
    with pytest.raises(OSError) as caught:
        machine.vcpu.run()
    assert not isinstance(caught.value, UnresolvedAccess)
    assert isinstance(machine.kvm.backend, Annotate)
    why = machine.kvm.backend.last_unexplained(machine.vcpu.fileno())
    assert why.startswith("the instruction 8f 0e") and why.endswith("could not be decoded")
    assert caught.value.__notes__ == [f"annotate: {why}"]


def test_what_is_not_known_makes_a_refused_page_table_ambiguous(machine: Machine) -> None:
    """It may have been cached: then it was what could not be decoded."""
    machine.long_mode(".byte 0x8f, 0x0e")
    machine.memory.protect(PML4 + 0x1000, PAGE, 0)
    cause = cause_of(machine)
    assert cause.ambiguous and cause.role == "page table" and "could not be decoded" in cause.reason


@pytest.mark.parametrize("source", ["clflush (%rdi)", "clwb (%rdi)", "monitor"])
def test_a_flush_is_checked_like_a_load_on_hardware(machine: Machine, source: str) -> None:
    """The engine's never fault; so the search is asked, without a failure."""
    machine.long_mode(source)
    machine.set_regs(rdi=0x61000, rax=0x61000)
    machine.memory.protect(0x61000, PAGE, 0)
    slots = (Slot(0, 0, 0, 4 << 20, machine.memory.address),)
    causes = []
    for hardware in (True, False):
        with contextlib.closing(HostMap()) as host:
            cpu = Cpu(machine.kvm.backend, machine.vcpu.fileno())
            causes.append(Finder(cpu, GuestPhysical(slots, host), hardware=hardware).find())
    assert causes[1] is None and causes[0] is not None
    assert (causes[0].gpa, causes[0].access, causes[0].ambiguous) == (0x61000, Access.READ, False)
    assert causes[0].looks[-1].outcome == "refused, if the access is made"


@pytest.mark.parametrize(
    ("source", "gpa", "access"),
    [
        ("fs xlat", 0x71008, Access.READ),
        ("pextrq $1, %xmm0, (%rdi)", 0x61000, Access.WRITE),
        ("pextrb $1, %xmm0, (%rdi)", 0x61000, Access.WRITE),
        ("xsave -0x200(%rdi)", 0x61000, Access.WRITE),
        ("xrstor -0x200(%rdi)", 0x61000, Access.READ),
        (".byte 0x67, 0x63, 0x07", 0x61000, Access.READ),
        (".byte 0xf2, 0x0f, 0xbc, 0x07", 0x61000, Access.READ),
    ],
)
def test_what_capstone_has_wrong(machine: Machine, source: str, gpa: int, access: Access) -> None:
    machine.long_mode(f"{source}; hlt")
    sregs = machine.vcpu.get_sregs()
    sregs.fs.base, sregs.cr4 = 0x10000, sregs.cr4 | 1 << 18
    machine.vcpu.set_sregs(sregs)
    machine.set_regs(rbx=0x61000, rdi=0x61000, rax=8 if "xlat" in source else 3, rdx=0)
    machine.memory.protect(gpa & -PAGE, PAGE, 1 if access is Access.WRITE else 0)
    cause = cause_of(machine)
    assert (cause.gpa, cause.access, cause.ambiguous) == (gpa, access, False)


def test_every_level_of_page_tables(machine: Machine) -> None:
    """Each table page, refused alone: the entry, and the level it is of."""
    for depth, level in enumerate(("PML4E", "PDPTE", "PDE")):
        machine.long_mode("mov (%rsi), %rax; hlt")
        machine.memory.protect(PML4 + 0x1000 * depth, PAGE, 0)
        cause = cause_of(machine)
        assert (cause.page, cause.role, cause.candidates[0].walk[-1].level) == (
            PML4 + 0x1000 * depth,
            "page table",
            level,
        )
        machine.memory.protect(PML4 + 0x1000 * depth, PAGE, 3)


def test_what_an_explanation_rests_on(machine: Machine) -> None:
    machine.long_mode("mov $0x60ffc, %esi; mov $0x62000, %edi; movsq")
    machine.memory.protect(0x61000, PAGE, 0)
    cause = cause_of(machine)
    assert [(look.role, look.linear, look.size, look.outcome) for look in cause.looks] == [
        ("instruction", 0x100A, 2, "granted"),
        ("operand", 0x60FFC, 4, "granted"),
        ("operand", 0x61000, 4, "refused"),
    ]
    assert cause.code == bytes.fromhex("48a5") and cause.vcpu.regs.rsi == 0x60FFC
    assert cause.vcpu.mode() == "64-bit code in long mode, ring 0, 4 levels of page tables"
    (suspect,) = cause.candidates
    assert suspect.touch.startswith("MADV_POPULATE_READ: E") and suspect.memslot.gpa == 0
    assert [entry.level for entry in suspect.walk] == ["PML4E", "PDPTE", "PDE"]


def test_a_selector_from_memory(machine: Machine) -> None:
    """POP FS needs the descriptor that the stack names; a fresh one is written, to mark it accessed."""
    for prot, access in ((0, Access.READ), (1, Access.WRITE)):
        machine.long_mode("pop %fs; hlt")
        machine.quads(0x4000 + 0x30, 0x00CF92000000FFFF)
        machine.quads(STACK, 0x30)
        machine.memory.protect(0x4000, PAGE, prot)
        cause = cause_of(machine)
        assert (cause.role, cause.access, cause.gpa & -8) == ("descriptor", access, 0x4030)
        machine.memory.protect(0x4000, PAGE, 3)


def test_ports_of_ring_3_are_in_the_tss(machine: Machine) -> None:
    machine.long_mode("in $0x60, %al", cpl=3)
    machine.memory.protect(0x6000, PAGE, 0)
    cause = cause_of(machine)
    assert (cause.gpa, cause.size, cause.role) == (0x6066, 2, "tss")


def test_explain_looks_at_an_annotated_failure_too() -> None:
    backend = Annotate(anykvm.backend("soft", "documented"))
    with anykvm.open(backend) as kvm, Machine(kvm) as machine:
        machine.long_mode("mov $0x61008, %esi; mov (%rsi), %rax; hlt")
        machine.memory.protect(0x61000, PAGE, 0)
        assert isinstance(machine.vcpu.run(), MemoryFault)
        cause = backend.explain(machine.vcpu.fileno())
        assert cause is not None and (cause.gpa, cause.access) == (0x61008, Access.READ)
        assert backend.explain(machine.vm.fileno()) is None
