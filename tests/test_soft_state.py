"""The state of a vCPU, in and out: round trips and what each ioctl refuses."""

from __future__ import annotations

import ctypes
import errno
import random
from collections.abc import Iterator

import pytest

from anykvm import abi
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.cpuid import supported_cpuid
from anykvm.backends.soft.msrs import MSRS_TO_SAVE
from soft_helpers import PAGE, Guest, error_of, refused

ADDRESS = ctypes.addressof
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(SoftBackend())
    yield made
    made.close()


def cpuid_table(entries: list[abi.kvm_cpuid_entry2], room: int = 0) -> ctypes.Array[ctypes.c_uint8]:
    table = (ctypes.c_uint8 * (8 + 40 * max(room, len(entries))))()
    abi.kvm_cpuid2.from_buffer(table).nent = len(entries)
    for i, entry in enumerate(entries):
        ctypes.memmove(ADDRESS(table) + 8 + 40 * i, ADDRESS(entry), 40)
    return table


def use_supported_cpuid(guest: Guest) -> None:
    assert guest.set(abi.KVM_SET_CPUID2, cpuid_table(supported_cpuid())) == 0


def fill(data: ctypes.Structure, seed: int) -> None:
    raw = random.Random(seed).randbytes(ctypes.sizeof(data))
    ctypes.memmove(ADDRESS(data), raw, len(raw))


def test_reset_state(guest: Guest) -> None:
    regs, sregs = guest.get(abi.KVM_GET_REGS, abi.kvm_regs), guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs)
    assert (regs.rip, regs.rflags, regs.rdx) == (0xFFF0, 2, 0x600)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) == (0xFFFF0000, 0xF000, 0xFFFF)
    assert (sregs.cr0, sregs.cr4, sregs.efer, sregs.apic_base) == (0x60000010, 0, 0, 0xFEE00900)
    debugregs = guest.get(abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs)
    assert (debugregs.dr6, debugregs.dr7) == (0xFFFF0FF0, 0x400)
    xsave = guest.get(abi.KVM_GET_XSAVE, abi.kvm_xsave)
    assert (xsave.region[6], xsave.region[7]) == (0x1F80, 0xFFFF)


def test_regs(guest: Guest) -> None:
    regs = abi.kvm_regs()
    fill(regs, 1)
    regs.rflags = 0x202
    assert guest.set(abi.KVM_SET_REGS, regs) == 0
    assert bytes(guest.get(abi.KVM_GET_REGS, abi.kvm_regs)) == bytes(regs)
    regs.rflags = 0
    guest.set(abi.KVM_SET_REGS, regs)
    assert guest.get(abi.KVM_GET_REGS, abi.kvm_regs).rflags == 2


def long_mode(guest: Guest) -> abi.kvm_sregs:
    sregs = guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, 0x1000, 0x20, LME | LMA | NXE
    sregs.cs.l = 1
    return sregs


def test_sregs_hidden_segment_state(guest: Guest) -> None:
    sregs = long_mode(guest)
    for i, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")):
        segment = getattr(sregs, name)
        segment.selector, segment.base, segment.limit = 0x10 * i, 0x123450000 * i, 0xFFFFFFFF - i
        segment.type, segment.dpl, segment.s = i | 1, i % 4, i < 6
        if name == "tr":
            segment.type = 0xB
        segment.avl, segment.g, segment.db, segment.present, segment.unusable = i & 1, 1, name != "cs", 1, 0
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 1 << 40, 0x7F, 1 << 41, 0xFFF
    sregs.cr2, sregs.cr8, sregs.interrupt_bitmap[3] = 0xDEAD, 9, 1 << 63
    assert guest.set(abi.KVM_SET_SREGS, sregs) == 0
    assert bytes(guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs)) == bytes(sregs)
    events = guest.get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 255)


BAD_SREGS = {
    "pg_without_pe": {"cr0": 0x80000000},
    "nw_without_cd": {"cr0": 0x20000011},
    "cr0_high": {"cr0": 1 << 32},
    "long_without_pae": {"cr4": 0},
    "long_without_lma": {"efer": LME},
    "lma_without_lme": {"efer": LMA},
    "cr3_reserved": {"cr3": 1 << 40},
    "la57": {"cr4": 0x20 | 1 << 12},
    "pcid": {"cr4": 0x20 | 1 << 17},
    "vmx": {"cr4": 0x20 | 1 << 13},
    "pke": {"cr4": 0x20 | 1 << 22},
    "svme": {"efer": LME | LMA | 1 << 12},
    "apic_base_low": {"apic_base": 0xFEE00801},
    "apic_base_high": {"apic_base": 1 << 40},
    "x2apic": {"apic_base": 0xFEE00C00},
}


@pytest.mark.parametrize("with_cpuid", [False, True])
@pytest.mark.parametrize("fields", BAD_SREGS.values(), ids=BAD_SREGS)
def test_bad_sregs_change_nothing(guest: Guest, fields: dict[str, int], with_cpuid: bool) -> None:
    if with_cpuid:
        use_supported_cpuid(guest)
    before = bytes(guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs))
    sregs = long_mode(guest)
    for name, value in fields.items():
        setattr(sregs, name, value)
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_SREGS, ADDRESS(sregs)) == errno.EINVAL
    assert bytes(guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs)) == before
    good = long_mode(guest)
    good.cr8 = 16  # not a task priority: ignored, as the kernel does
    assert guest.set(abi.KVM_SET_SREGS, good) == 0
    assert guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs).cr8 == 0


def test_cr4_follows_cpuid(guest: Guest) -> None:
    """Before KVM_SET_CPUID2 every CR4 bit there is may be set; then what the table offers."""
    smep = long_mode(guest)
    smep.cr4 |= 1 << 20
    assert guest.set(abi.KVM_SET_SREGS, smep) == 0
    entries = [e for e in supported_cpuid() if e.function != 7]
    guest.set(abi.KVM_SET_CPUID2, cpuid_table(entries))
    with refused(errno.EINVAL, "KVM_SET_SREGS: CR0, CR3, CR4"):
        guest.set(abi.KVM_SET_SREGS, smep)
    use_supported_cpuid(guest)
    assert guest.set(abi.KVM_SET_SREGS, smep) == 0


def test_sregs2_and_pdptrs(guest: Guest) -> None:
    memory = (ctypes.c_uint64 * (3 * PAGE // 8))()
    start = -(-ADDRESS(memory) // PAGE) * PAGE
    table = (ctypes.c_uint64 * 4).from_address(start + 0x20)
    table[:] = [0x1001, 0x2001, 0x3001, 0x4001]
    sregs = guest.get(abi.KVM_GET_SREGS2, abi.kvm_sregs2)
    assert sregs.flags == 0
    sregs.flags = 1
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_SREGS2, ADDRESS(sregs)) == errno.EINVAL  # no PAE paging
    sregs.flags, sregs.cr0, sregs.cr4, sregs.cr3 = 0, 0x80000011, 0x20, 0x5020
    assert guest.set(abi.KVM_SET_SREGS2, sregs) == 0
    got = guest.get(abi.KVM_GET_SREGS2, abi.kvm_sregs2)
    assert (got.flags, list(got.pdptrs)) == (1, [0, 0, 0, 0])  # no memory there
    assert guest.slot(0, 0x5000, PAGE, start) == 0
    got = guest.get(abi.KVM_GET_SREGS2, abi.kvm_sregs2)
    assert (got.flags, list(got.pdptrs)) == (1, list(table))
    assert guest.set(abi.KVM_SET_SREGS2, got) == 0
    got.flags = 2
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_SREGS2, ADDRESS(got)) == errno.EINVAL


def test_fpu_leaves_mxcsr_alone(guest: Guest) -> None:
    fpu = abi.kvm_fpu()
    fill(fpu, 2)
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.pad1, fpu.pad2 = 0x37F, 0x3800, 0xF0, 0x7FF, 0, 0
    for register in fpu.fpr:
        register[10:16] = [0] * 6
    fpu.mxcsr = 0xFFFF
    assert guest.set(abi.KVM_SET_FPU, fpu) == 0
    got = guest.get(abi.KVM_GET_FPU, abi.kvm_fpu)
    fpu.mxcsr = 0
    assert bytes(got) == bytes(fpu)
    assert guest.get(abi.KVM_GET_XSAVE, abi.kvm_xsave).region[6] == 0x1F80


def test_xsave(guest: Guest) -> None:
    xsave = guest.get(abi.KVM_GET_XSAVE, abi.kvm_xsave)
    xsave.region[6] = 0x1FBF
    xsave.region[40] = 0x12345678  # xmm0
    assert guest.set(abi.KVM_SET_XSAVE, xsave) == 0
    for request in (abi.KVM_GET_XSAVE, abi.KVM_GET_XSAVE2):
        assert bytes(guest.get(request, abi.kvm_xsave)) == bytes(xsave)
    xsave.region[128] = 1  # SSE state is not there: its initial value
    assert guest.set(abi.KVM_SET_XSAVE, xsave) == 0
    assert guest.get(abi.KVM_GET_XSAVE, abi.kvm_xsave).region[40] == 0
    for word, value in ((128, 4), (130, 1), (132, 1), (6, 1 << 16)):
        bad = guest.get(abi.KVM_GET_XSAVE, abi.kvm_xsave)
        bad.region[word] |= value
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_XSAVE, ADDRESS(bad)) == errno.EINVAL


def test_xcrs(guest: Guest) -> None:
    xcrs = guest.get(abi.KVM_GET_XCRS, abi.kvm_xcrs)
    assert (xcrs.nr_xcrs, xcrs.flags, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 0, 1)
    xcrs.xcrs[0].value = 3
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_XCRS, ADDRESS(xcrs)) == errno.EINVAL  # CPUID offers no SSE
    use_supported_cpuid(guest)
    assert guest.set(abi.KVM_SET_XCRS, xcrs) == 0
    assert guest.get(abi.KVM_GET_XCRS, abi.kvm_xcrs).xcrs[0].value == 3
    for field, value in (("nr_xcrs", 17), ("flags", 1)):
        bad = guest.get(abi.KVM_GET_XCRS, abi.kvm_xcrs)
        setattr(bad, field, value)
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_XCRS, ADDRESS(bad)) == errno.EINVAL
    for value in (0, 2, 7):
        xcrs.xcrs[0].value = value
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_XCRS, ADDRESS(xcrs)) == errno.EINVAL


def test_debugregs(guest: Guest) -> None:
    for sregs in (guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs), long_mode(guest)):
        guest.set(abi.KVM_SET_SREGS, sregs)
        regs = abi.kvm_debugregs(dr6=0xFFFF0FF0, dr7=0x4FF)
        regs.db[:] = [0x1000, 0x2000, 0x7FFFFFFFF000, 0xFFFF800000000000]
        assert guest.set(abi.KVM_SET_DEBUGREGS, regs) == 0
        assert bytes(guest.get(abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs)) == bytes(regs)
    for field, value in (("flags", 1), ("dr6", 1 << 32), ("dr7", 1 << 63)):
        bad = abi.kvm_debugregs(dr6=0xFFFF0FF0, dr7=0x400)
        setattr(bad, field, value)
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_DEBUGREGS, ADDRESS(bad)) == errno.EINVAL


def msrs(*pairs: tuple[int, int]) -> ctypes.Array[ctypes.c_uint64]:
    data = (ctypes.c_uint64 * (1 + 2 * len(pairs)))(len(pairs))
    for i, (index, value) in enumerate(pairs):
        data[1 + 2 * i], data[2 + 2 * i] = index, value
    return data


def test_every_listed_msr_reads_and_writes_back(guest: Guest) -> None:
    data = msrs(*((index, 0) for index in MSRS_TO_SAVE))
    assert guest.set(abi.KVM_GET_MSRS, data) == len(MSRS_TO_SAVE)
    assert guest.set(abi.KVM_SET_MSRS, data) == len(MSRS_TO_SAVE)


def test_msr_count(guest: Guest) -> None:
    data = msrs((0xC0000081, 5), (0x12345, 6), (0xC0000082, 7))
    assert guest.set(abi.KVM_SET_MSRS, data) == 1  # the second does not exist
    assert guest.set(abi.KVM_SET_MSRS, msrs((0xC0000082, 1 << 63))) == 0  # LSTAR: not canonical
    assert guest.set(abi.KVM_SET_MSRS, msrs()) == 0
    assert guest.set(abi.KVM_GET_MSRS, data) == 1
    assert (data[2], data[6]) == (5, 7)  # what was not read stays
    data[0] = 256
    for request in (abi.KVM_GET_MSRS, abi.KVM_SET_MSRS):
        assert error_of(guest.backend, guest.vcpu, request, ADDRESS(data)) == errno.E2BIG
    many = msrs(*[(0xC0000081, 1)] * 255)
    assert guest.set(abi.KVM_SET_MSRS, many) == 255


def test_cpuid2(guest: Guest) -> None:
    use_supported_cpuid(guest)
    count = len(supported_cpuid())
    table = cpuid_table([], room=300)
    header = abi.kvm_cpuid2.from_buffer(table)
    header.nent = count - 1
    assert error_of(guest.backend, guest.vcpu, abi.KVM_GET_CPUID2, ADDRESS(table)) == errno.E2BIG
    assert header.nent == count - 1
    header.nent = 300
    assert guest.set(abi.KVM_GET_CPUID2, table) == 0
    assert bytes(table)[: 8 + 40 * count] == bytes(cpuid_table(supported_cpuid()))
    header.nent = 257
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_CPUID2, ADDRESS(table)) == errno.E2BIG
    header.nent = 0
    assert guest.set(abi.KVM_SET_CPUID2, table) == 0
    address_bits = abi.kvm_cpuid_entry2(function=0x80000008, eax=40 | 49 << 8)
    table = cpuid_table([address_bits])
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_CPUID2, ADDRESS(table)) == errno.EINVAL


def test_cpuid_follows_state(guest: Guest) -> None:
    use_supported_cpuid(guest)

    def leaf1() -> abi.kvm_cpuid_entry2:
        table = cpuid_table([], room=64)
        abi.kvm_cpuid2.from_buffer(table).nent = 64
        guest.set(abi.KVM_GET_CPUID2, table)
        return abi.kvm_cpuid_entry2.from_buffer_copy(table, 8 + 40)

    assert not leaf1().ecx >> 27 & 1
    sregs = long_mode(guest)
    sregs.cr4 |= 1 << 18  # OSXSAVE
    sregs.apic_base = 0xFEE00000
    guest.set(abi.KVM_SET_SREGS, sregs)
    assert leaf1().ecx >> 27 & 1
    assert not leaf1().edx >> 9 & 1  # no APIC


def test_old_set_cpuid(guest: Guest) -> None:
    entry = abi.kvm_cpuid_entry(function=5, eax=1, ebx=2, ecx=3, edx=4)
    table = (ctypes.c_uint8 * 32)()
    abi.kvm_cpuid.from_buffer(table).nent = 1
    ctypes.memmove(ADDRESS(table) + 8, ADDRESS(entry), 24)
    assert guest.set(abi.KVM_SET_CPUID, table) == 0
    got = cpuid_table([], room=4)
    abi.kvm_cpuid2.from_buffer(got).nent = 4
    guest.set(abi.KVM_GET_CPUID2, got)
    new = abi.kvm_cpuid_entry2.from_buffer(got, 8)
    assert (new.function, new.eax, new.ebx, new.ecx, new.edx) == (5, 1, 2, 3, 4)


def test_cpuid_is_final_after_a_run(guest: Guest) -> None:
    use_supported_cpuid(guest)
    guest.backend.ioctl(guest.vcpu, abi.KVM_RUN)  # no memory: some exit
    table = cpuid_table([], room=64)
    header = abi.kvm_cpuid2.from_buffer(table)
    header.nent = 64
    guest.set(abi.KVM_GET_CPUID2, table)
    assert guest.set(abi.KVM_SET_CPUID2, table) == 0  # the same again
    header.nent -= 1
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_CPUID2, ADDRESS(table)) == errno.EINVAL
    header.nent += 1
    abi.kvm_cpuid_entry2.from_buffer(table, 8).eax ^= 1
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_CPUID2, ADDRESS(table)) == errno.EINVAL


def test_not_offered() -> None:
    leaves = {(e.function, e.index): e for e in supported_cpuid()}
    assert not leaves[1, 0].ecx & (1 << 3 | 1 << 12 | 1 << 17 | 1 << 21 | 1 << 24 | 1 << 28 | 1 << 29)
    assert not leaves[7, 0].ebx & (1 << 5 | 1 << 10 | 1 << 16 | 1 << 29)
    assert leaves[7, 0].ecx == leaves[7, 0].edx == 0
    assert leaves[0xD, 0].eax == 3 and leaves[0xD, 1].eax == 1
    assert not leaves[0x80000001, 0].ecx & 1 << 2  # SVM
    assert leaves[0x80000008, 0].eax == 40 | 48 << 8
    assert leaves[0x40000001, 0].eax == 0


def test_mp_state(guest: Guest) -> None:
    state = guest.get(abi.KVM_GET_MP_STATE, abi.kvm_mp_state)
    assert state.mp_state == abi.KVM_MP_STATE_RUNNABLE
    for value in range(12):
        state.mp_state = value
        expected = 0 if value == abi.KVM_MP_STATE_RUNNABLE else errno.EINVAL
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_MP_STATE, ADDRESS(state)) == expected


def test_translate(guest: Guest) -> None:
    request = abi.kvm_translation(linear_address=0x1234)
    assert guest.set(abi.KVM_TRANSLATE, request) == 0
    assert (request.physical_address, request.valid, request.writeable, request.usermode) == (0x1234, 1, 1, 0)
    guest.set(abi.KVM_SET_SREGS, long_mode(guest))  # page tables where no memory is
    assert guest.set(abi.KVM_TRANSLATE, request) == 0
    assert (request.physical_address, request.valid) == ((1 << 64) - 1, 0)


def test_signal_mask(guest: Guest) -> None:
    mask = (ctypes.c_uint8 * 12)()
    for length in (0, 4, 7, 9, 16, 128):
        ctypes.c_uint32.from_buffer(mask).value = length
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_SIGNAL_MASK, ADDRESS(mask)) == errno.EINVAL
    ctypes.c_uint32.from_buffer(mask).value = 8
    assert guest.set(abi.KVM_SET_SIGNAL_MASK, mask) == 0
    assert guest.backend.ioctl(guest.vcpu, abi.KVM_SET_SIGNAL_MASK, 0) == 0


def test_interrupt_and_nmi(guest: Guest) -> None:
    assert error_of(guest.backend, guest.vcpu, abi.KVM_INTERRUPT, ADDRESS(abi.kvm_interrupt(256))) == errno.EINVAL
    assert guest.set(abi.KVM_INTERRUPT, abi.kvm_interrupt(0x20)) == 0
    assert guest.backend.ioctl(guest.vcpu, abi.KVM_NMI) == 0
    events = guest.get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)
    assert (events.interrupt.injected, events.interrupt.nr, events.nmi.pending) == (1, 0x20, 1)
    assert guest.get(abi.KVM_GET_SREGS, abi.kvm_sregs).interrupt_bitmap[0] == 1 << 0x20


def test_vcpu_events(guest: Guest) -> None:
    events = guest.get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)
    events.exception.injected, events.exception.nr = 1, 14
    events.exception.has_error_code, events.exception.error_code = 1, 7
    events.nmi.pending = 1
    events.interrupt.shadow = abi.KVM_X86_SHADOW_INT_STI | abi.KVM_X86_SHADOW_INT_MOV_SS
    assert guest.set(abi.KVM_SET_VCPU_EVENTS, events) == 0
    assert bytes(guest.get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)) == bytes(events)
    for nr in (2, 32, 255):
        events.exception.nr = nr
        assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_VCPU_EVENTS, ADDRESS(events)) == errno.EINVAL
    events.exception.nr, events.flags = 14, 1 << 31
    assert error_of(guest.backend, guest.vcpu, abi.KVM_SET_VCPU_EVENTS, ADDRESS(events)) == errno.EINVAL
