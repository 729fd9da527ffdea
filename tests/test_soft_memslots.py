"""KVM_SET_USER_MEMORY_REGION: every check with its errno, and the table against a model."""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm import abi
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.memslots import TASK_SIZE_MAX, AddressSpace, Memslots, Region
from anykvm.backends.soft.vm import Vm, VmFile
from soft_helpers import PAGE, Guest, error_of

HVA = 0x10000000  # nothing is mapped there, and nothing needs to be
LOG, RO, GMEM = abi.KVM_MEM_LOG_DIRTY_PAGES, abi.KVM_MEM_READONLY, abi.KVM_MEM_GUEST_MEMFD
EINVAL, EEXIST, OK = errno.EINVAL, errno.EEXIST, 0
U64 = 1 << 64


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(SoftBackend("linux-7.3"))
    yield made
    made.close()


def vm_of(guest: Guest) -> Vm:
    file = FILES.get(guest.vm)
    assert isinstance(file, VmFile)
    return file.vm


CREATE = [
    # slot, gpa, size, hva, flags, errno
    pytest.param(0, 0, PAGE, HVA, 0, OK, id="plain"),
    pytest.param(0, 0, PAGE, 0, 0, OK, id="hva_0"),
    pytest.param(0, 1, PAGE, HVA, 0, EINVAL, id="gpa_unaligned"),
    pytest.param(0, 0, PAGE + 1, HVA, 0, EINVAL, id="size_unaligned"),
    pytest.param(0, 0, PAGE, HVA + 1, 0, EINVAL, id="hva_unaligned"),
    pytest.param(0, 0, 0, HVA, 0, EINVAL, id="delete_missing"),
    pytest.param(0, 0, PAGE, HVA, LOG, OK, id="log"),
    pytest.param(0, 0, PAGE, HVA, RO, OK, id="readonly"),
    pytest.param(0, 0, PAGE, HVA, LOG | RO, OK, id="log_readonly"),
    pytest.param(0, 0, PAGE, HVA, GMEM, EINVAL, id="gmem_not_offered"),
    pytest.param(0, 0, PAGE, HVA, 8, EINVAL, id="flag_8"),
    pytest.param(0, 0, PAGE, HVA, 1 << 31, EINVAL, id="flag_31"),
    pytest.param(32763, 0, PAGE, HVA, 0, OK, id="last_slot"),
    pytest.param(32764, 0, PAGE, HVA, 0, EINVAL, id="first_internal_slot"),
    pytest.param(0xFFFF, 0, PAGE, HVA, 0, EINVAL, id="slot_ffff"),
    pytest.param(1 << 16, 0, PAGE, HVA, 0, OK, id="smm"),
    pytest.param(2 << 16, 0, PAGE, HVA, 0, EINVAL, id="as_id_2"),
    pytest.param(0, 0, PAGE, TASK_SIZE_MAX - PAGE, 0, OK, id="hva_last"),
    pytest.param(0, 0, PAGE, TASK_SIZE_MAX, 0, EINVAL, id="hva_end"),
    pytest.param(0, 0, PAGE, 1 << 47, 0, EINVAL, id="hva_2^47"),
    pytest.param(0, 0, PAGE, 0xFFFF800000000000, 0, EINVAL, id="hva_kernel"),
    pytest.param(0, 0, PAGE, HVA | 1 << 62, 0, EINVAL, id="hva_tagged"),
    pytest.param(0, 0, PAGE, U64 - PAGE, 0, EINVAL, id="hva_wraps"),
    pytest.param(0, U64 - PAGE, PAGE, HVA, 0, EINVAL, id="gpa_ends_at_2^64"),
    pytest.param(0, U64 - PAGE, 2 * PAGE, HVA, 0, EINVAL, id="gpa_wraps"),
    pytest.param(0, (1 << 40) - PAGE, PAGE, HVA, 0, OK, id="gpa_last"),
    pytest.param(0, 1 << 40, PAGE, HVA, 0, EINVAL, id="gpa_2^40"),
    pytest.param(0, (1 << 40) - PAGE, 2 * PAGE, HVA, 0, EINVAL, id="across_2^40"),
    pytest.param(0, 0, 1 << 40, HVA, 0, OK, id="all_of_it"),
    pytest.param(0, 1 << 33, 1 << 38, HVA, 0, OK, id="256_gib"),
    pytest.param(0, 0, (1 << 43) - PAGE, HVA, 0, EINVAL, id="8_tib_less_a_page"),
    pytest.param(0, 0, 1 << 43, HVA, 0, EINVAL, id="too_many_pages"),
    pytest.param(0, 0, 1 << 63, HVA, 0, EINVAL, id="2^63"),
    pytest.param(0, 0xFFFBD000, PAGE, HVA, 0, OK, id="over_tss"),
    pytest.param(0, 0xFEE00000, PAGE, HVA, 0, OK, id="over_apic"),
]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("slot", "gpa", "size", "hva", "flags", "code"), CREATE)
def test_create(guest: Guest, slot: int, gpa: int, size: int, hva: int, flags: int, code: int, v2: bool) -> None:
    assert guest.slot(slot, gpa, size, hva, flags, v2) == code


CHANGE = [
    # slot, gpa, size, hva, flags, errno; there is slot 1: gpa 16 pages, 4 pages, and slot 2 behind a gap of 4 pages
    pytest.param(1, 16, 4, 0, 0, OK, id="repeat"),
    pytest.param(1, 16, 4, 0, LOG, OK, id="log_on"),
    pytest.param(1, 16, 4, 0, RO, EINVAL, id="readonly_toggled"),
    pytest.param(1, 16, 4, 1, 0, EINVAL, id="hva_changed"),
    pytest.param(1, 16, 5, 0, 0, EINVAL, id="resized"),
    pytest.param(1, 16, 3, 0, 0, EINVAL, id="shrunk"),
    pytest.param(1, 20, 4, 0, 0, OK, id="moved"),
    pytest.param(1, 20, 4, 0, LOG, OK, id="moved_with_flags"),
    pytest.param(1, 18, 4, 0, 0, OK, id="moved_over_itself"),
    pytest.param(1, 21, 4, 0, 0, EEXIST, id="moved_into_other"),
    pytest.param(1, 30, 4, 0, 0, OK, id="moved_past_other"),
    pytest.param(1, (1 << 28) - 3, 4, 0, 0, EINVAL, id="moved_beyond_maxphyaddr"),
    pytest.param(3, 12, 4, 0, 0, OK, id="just_below"),
    pytest.param(3, 13, 4, 0, 0, EEXIST, id="overlaps_start"),
    pytest.param(3, 19, 1, 0, 0, EEXIST, id="overlaps_end"),
    pytest.param(3, 17, 1, 0, 0, EEXIST, id="inside"),
    pytest.param(3, 0, 64, 0, 0, EEXIST, id="around_both"),
    pytest.param(3, 20, 4, 0, 0, OK, id="fills_the_gap"),
    pytest.param(3, 20, 5, 0, 0, EEXIST, id="overfills_the_gap"),
    pytest.param(0x10003, 16, 4, 0, 0, OK, id="other_address_space"),
    pytest.param(0x10001, 16, 0, 0, 0, EINVAL, id="delete_in_other_address_space"),
    pytest.param(1, 99, 0, 7, 0, OK, id="delete"),
    pytest.param(1, 99, 0, 7, 8, EINVAL, id="delete_bad_flags"),
    pytest.param(1, 99, 0, 1 << 40, 0, EINVAL, id="delete_kernel_hva"),
]


@pytest.mark.parametrize(("slot", "gfn", "npages", "page", "flags", "code"), CHANGE)
def test_change(guest: Guest, slot: int, gfn: int, npages: int, page: int, flags: int, code: int) -> None:
    assert guest.slot(1, 16 * PAGE, 4 * PAGE, HVA) == OK
    assert guest.slot(2, 24 * PAGE, 4 * PAGE, HVA) == OK
    assert guest.slot(slot, gfn * PAGE, npages * PAGE, HVA + page * PAGE, flags) == code


def test_unaligned_delete_and_bad_pointers(guest: Guest) -> None:
    assert guest.slot(1, 0, PAGE, HVA) == OK
    assert guest.slot(1, 8, 0, HVA) == EINVAL
    assert guest.slot(1, 0, 0, HVA + 8) == EINVAL
    for request in (abi.KVM_SET_USER_MEMORY_REGION, abi.KVM_SET_USER_MEMORY_REGION2):
        for address in (0, 8, (1 << 47) - 8, U64 - 8):
            assert error_of(guest.backend, guest.vm, request, address) == errno.EFAULT


def test_pads_are_ignored(guest: Guest) -> None:
    region = abi.kvm_userspace_memory_region2(slot=1, memory_size=PAGE, userspace_addr=HVA, guest_memfd_offset=7)
    region.pad1 = region.pad2[3] = 1
    assert guest.backend.ioctl(guest.vm, abi.KVM_SET_USER_MEMORY_REGION2, ctypes.addressof(region)) == 0


def test_order_of_checks(guest: Guest) -> None:
    """Overlap is found before the end of the address space; unknown flags before everything but the slot number."""
    assert guest.slot(1, (1 << 40) - PAGE, PAGE, HVA) == OK
    assert guest.slot(2, (1 << 40) - PAGE, 2 * PAGE, HVA) == EEXIST
    with pytest.raises(OSError, match="flags"):
        guest.backend.ioctl(guest.vm, abi.KVM_SET_USER_MEMORY_REGION, region_address := _bad_region())
    assert region_address


_keep: list[abi.kvm_userspace_memory_region] = []


def _bad_region() -> int:
    _keep.append(abi.kvm_userspace_memory_region(slot=5 << 16, flags=64, guest_phys_addr=1, memory_size=3))
    return ctypes.addressof(_keep[-1])


def test_all_slots_fast(guest: Guest) -> None:
    memslots = vm_of(guest).memslots
    began = time.perf_counter()
    for number in range(0, 32764):  # from the top down: every insertion at the front
        memslots.set_memory_region(Region(number, 0, (40000 - number) * PAGE, PAGE, HVA), v1=True)
    assert time.perf_counter() - began < 10  # quadratic checks would take minutes
    assert memslots.nr_memslot_pages == 32764


def test_move_keeps_what_the_engine_has(guest: Guest) -> None:
    """The engine's table has exactly the slots of address space 0, through create, move and delete."""
    engine_slots = vm_of(guest)
    assert guest.slot(1, 0, 4 * PAGE, HVA) == OK
    assert guest.slot(1, PAGE, 4 * PAGE, HVA) == OK
    assert guest.slot(0x10001, 64 * PAGE, PAGE, HVA) == OK
    assert engine_slots.memslots.spaces[0].gfn_to_memslot(0) is None
    found = engine_slots.memslots.spaces[0].gfn_to_memslot(4)
    assert found is not None and found.base_gfn == 1
    assert engine_slots.memslots.spaces[0].gfn_to_memslot(5) is None
    assert engine_slots.memslots.spaces[1].gfn_to_memslot(64) is not None
    assert guest.slot(1, 0, 0, 0) == OK
    assert engine_slots.memslots.nr_memslot_pages == 1


class Model:
    """Slots as a set of frames each."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int, int, int]] = {}  # id -> gfn, npages, hva, flags

    def set(self, slot: int, flags: int, gfn: int, npages: int, hva: int) -> int:
        old = self.slots.get(slot)
        if npages == 0:
            if old is None:
                return EINVAL
            del self.slots[slot]
            return OK
        if old is not None and (old[1] != npages or old[2] != hva or (old[3] ^ flags) & RO):
            return EINVAL
        frames = set(range(gfn, gfn + npages))
        for other, (base, length, _, _) in self.slots.items():
            if other != slot and frames & set(range(base, base + length)):
                return EEXIST
        self.slots[slot] = (gfn, npages, hva, flags)
        return OK


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from([0, LOG, RO]),
        st.integers(0, 24),
        st.integers(0, 6),
        st.sampled_from([HVA, HVA + PAGE]),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS)
def test_table_against_model(operations: list[tuple[int, int, int, int, int]]) -> None:
    backend = SoftBackend()
    kvm = backend.open()
    vm = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    file = FILES.get(vm)
    assert isinstance(file, VmFile)
    memslots, model = file.vm.memslots, Model()
    for slot, flags, gfn, npages, hva in operations:
        try:
            memslots.set_memory_region(Region(slot, flags, gfn * PAGE, npages * PAGE, hva), v1=True)
            code = OK
        except Refused as refusal:
            code = refusal.errno
        assert code == model.set(slot, flags, gfn, npages, hva)
    check(memslots, model)
    backend.close(vm)
    backend.close(kvm)


def check(memslots: Memslots, model: Model) -> None:
    space: AddressSpace = memslots.spaces[0]
    assert {m.slot: (m.base_gfn, m.npages, m.userspace_addr, m.flags) for m in space.by_id.values()} == model.slots
    assert memslots.nr_memslot_pages == sum(slot[1] for slot in model.slots.values())
    for gfn in range(34):
        owner = next((s for s, (base, n, _, _) in model.slots.items() if base <= gfn < base + n), None)
        found = space.gfn_to_memslot(gfn)
        assert (None if found is None else found.slot) == owner
