"""Mappings of devices (VM_IO, VM_PFNMAP): absent until touched, with a fault handler that may fail."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import anykvm
from anykvm import Hlt, Io, MemoryFault, Mmio
from anykvm.backends.soft import DeviceMapping, PciBar, SgxVepc
from anykvm.testing.assembler import assemble
from anykvm.testing.machine import CODE, Machine

PAGE = 4096
HIGH = 0x800000  # guest-physical address of the device
READ = f"mov ${HIGH}, %esi; mov (%rsi), %rax; hlt"
WRITE = f"mov ${HIGH}, %esi; movabs $0x8877665544332211, %rax; mov %rax, (%rsi); hlt"
ACCESS = CODE + 5  # address of the instruction after the first


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("device")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def fault(gpa: int) -> MemoryFault:
    return MemoryFault(gpa, PAGE, 0, errno.EFAULT)


def refuse(mapping: DeviceMapping, offset: int, write: bool) -> None:
    raise OSError(errno.EIO, "refused")


class Recorder:
    """A handler that inserts pages of a file and remembers what it was asked."""

    def __init__(self, fd: int, writable: bool = True) -> None:
        self.fd, self.writable = fd, writable
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, mapping: DeviceMapping, offset: int, write: bool) -> None:
        self.asked.append((offset, write))
        mapping.insert(offset, self.fd, offset, writable=self.writable)


def test_the_handler_is_asked_once_and_the_access_goes_on(machine: Machine, ram: int) -> None:
    handler = Recorder(ram)
    with DeviceMapping(2 * PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(WRITE)
        machine.run_to_halt()
        machine.long_mode(READ)
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 0x8877665544332211
        assert handler.asked == [(0, True)]
        assert os.pread(ram, 8, 0) == bytes.fromhex("1122334455667788")


@pytest.mark.parametrize("source", [READ, WRITE])
@pytest.mark.parametrize("profile", ["documented", "linux-7.3"])
def test_a_handler_that_fails_is_the_profiles_fault(profile: str, source: str, ram: int) -> None:
    """Documented: annotated. Linux 7.3: bare. The instruction runs again when the device has recovered."""
    broken = True

    def sometimes(mapping: DeviceMapping, offset: int, write: bool) -> None:
        if broken:
            raise OSError(errno.ENOMEM, "none left")
        mapping.insert(offset, ram)

    with (
        anykvm.open("soft", profile) as kvm,
        Machine(kvm) as machine,
        DeviceMapping(PAGE, sometimes) as device,
    ):
        machine.vm.map(device, HIGH)
        machine.long_mode(source)
        before = machine.vcpu.kvm_run.exit_reason
        if profile == "documented":
            assert machine.vcpu.run() == fault(HIGH)
        else:
            with pytest.raises(OSError) as caught:
                machine.vcpu.run()
            assert (caught.value.errno, machine.vcpu.kvm_run.exit_reason) == (errno.EFAULT, 0), before
        regs = machine.vcpu.get_regs()
        assert regs.rip in (ACCESS, ACCESS + len(assemble("movabs $0x8877665544332211, %rax")))
        broken = False
        machine.run_to_halt()


def test_every_kind_of_access_reaches_the_handler(machine: Machine, ram: int) -> None:
    """Page tables, fetches, string instructions of the emulator, page-crossing accesses, exception frames."""
    cases = {
        "fetch": f"mov ${HIGH}, %eax; jmp *%rax",
        "crossing": f"mov ${HIGH + PAGE - 4}, %esi; mov %rax, (%rsi); hlt",
        "locked": f"mov ${HIGH}, %esi; lock incq (%rsi); hlt",
        "stack": f"mov ${HIGH + PAGE}, %esp; push %rax; hlt",
        "SSE": f"mov ${HIGH}, %esi; movups (%rsi), %xmm0; hlt",
    }
    for name, source in cases.items():
        os.pwrite(ram, b"\xf4", 0)
        handler = Recorder(ram)
        with DeviceMapping(2 * PAGE, handler) as device:
            slot = machine.vm.map(device, HIGH)
            machine.long_mode(source)
            machine.run_to_halt()
            pages = {offset for offset, _ in handler.asked}
            assert pages == ({0, PAGE} if name == "crossing" else {0}), name
            machine.vm.unmap(slot)


def test_guest_page_tables_in_a_device(machine: Machine, ram: int) -> None:
    handler = Recorder(ram)
    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode("mov $0x1234, %eax; hlt")
        os.pwrite(ram, machine.memory.read(0x10000, PAGE), 0)
        sregs = machine.vcpu.get_sregs()
        sregs.cr3 = HIGH
        machine.vcpu.set_sregs(sregs)
        machine.run_to_halt()
        assert handler.asked[0] == (0, True)  # accessed bits are written
        device.zap()
        handler.fd = -1  # mmap fails: EBADF
        machine.set_regs(rip=CODE)
        sregs.cr3 = HIGH
        machine.vcpu.set_sregs(sregs)
        assert machine.vcpu.run() == fault(HIGH)


def test_write_to_a_page_inserted_read_only_is_mmio(machine: Machine, ram: int) -> None:
    """KVM_PFN_ERR_RO_FAULT: /dev/mem mapped PROT_READ gave KVM_EXIT_MMIO where anonymous memory gives EFAULT."""
    handler = Recorder(ram, writable=False)
    os.pwrite(ram, b"\x07", 0)
    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(WRITE)
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio)
        assert (exit.phys_addr, exit.is_write, exit.data) == (HIGH, True, bytes.fromhex("1122334455667788"))
        assert machine.vcpu.run() == Hlt()
        assert os.pread(ram, 1, 0) == b"\x07"
        machine.long_mode(READ)
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 7
        assert handler.asked == [(0, True)]


def test_read_modify_write_across_two_read_only_pages(machine: Machine, ram: int) -> None:
    handler = Recorder(ram, writable=False)
    with DeviceMapping(2 * PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(f"mov ${HIGH + PAGE - 2}, %esi; incl (%rsi); hlt")
        writes = []
        while isinstance(exit := machine.vcpu.run(), Mmio):
            assert exit.is_write
            writes.append((exit.phys_addr, exit.data))
        assert exit == Hlt()
        assert writes == [(HIGH + PAGE - 2, b"\1\0"), (HIGH + PAGE, b"\0\0")]


def test_a_mapping_that_may_only_be_read_refuses_writes_to_absent_pages(machine: Machine, ram: int) -> None:
    """fixup_user_fault() looks at the mapping's own permission first: EFAULT, and the handler is not asked."""
    handler = Recorder(ram)
    with DeviceMapping(PAGE, handler, writable=False) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(WRITE)
        assert machine.vcpu.run() == fault(HIGH)
        assert handler.asked == []
        machine.long_mode(READ)
        machine.run_to_halt()
        machine.long_mode(WRITE)
        assert isinstance(machine.vcpu.run(), Mmio)


def test_the_emulator_asks_too_and_has_mmio_where_it_fails(machine: Machine, ram: int) -> None:
    """REP INSB into a device: a page that comes is memory; a page that does not is a device access (ABI.md 0.9)."""
    source = f"mov ${HIGH}, %edi; mov $4, %ecx; mov $0x20, %edx; rep insb; hlt"
    with DeviceMapping(PAGE, Recorder(ram)) as device:
        slot = machine.vm.map(device, HIGH)
        machine.long_mode(source)
        exit = machine.vcpu.run()
        assert isinstance(exit, Io)
        exit.respond(b"wxyz")
        machine.run_to_halt()
        assert os.pread(ram, 4, 0) == b"wxyz"
        machine.vm.unmap(slot)
    with DeviceMapping(PAGE, refuse) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(source)
        exit = machine.vcpu.run()
        assert isinstance(exit, Io)
        exit.respond(b"wxyz")
        written = machine.vcpu.run()
        assert isinstance(written, Mmio)
        assert (written.phys_addr, written.data) == (HIGH, b"wxyz")
        machine.run_to_halt()


def test_device_access_then_device_mapping_in_one_instruction(machine: Machine, ram: int) -> None:
    """MOVSQ from MMIO to a mapping that is absent: the read is answered once, the handler asked, the store done."""
    handler = Recorder(ram)
    with DeviceMapping(PAGE, handler) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(f"mov $0x1000000, %esi; mov ${HIGH}, %edi; movsq; hlt")
        exit = machine.vcpu.run()
        assert isinstance(exit, Mmio) and not exit.is_write
        exit.respond(0x1122334455667788)
        machine.run_to_halt()
        assert os.pread(ram, 8, 0) == (0x1122334455667788).to_bytes(8, "little")
        assert handler.asked == [(0, True)]


def test_a_bug_in_the_handler_is_reported_and_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def bug(mapping: DeviceMapping, offset: int, write: bool) -> None:
        raise KeyError(offset)

    with DeviceMapping(PAGE, bug) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        assert machine.vcpu.run() == fault(HIGH)
    assert [one.exc_type for one in told] == [KeyError]


def test_a_handler_that_does_nothing_fails(machine: Machine) -> None:
    with DeviceMapping(PAGE, lambda mapping, offset, write: None) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        assert machine.vcpu.run() == fault(HIGH)


def test_pages_that_somebody_else_protects_are_a_fault_and_no_hang(machine: Machine, ram: int) -> None:
    from anykvm.host import libc

    with DeviceMapping(PAGE, Recorder(ram)) as device:
        machine.vm.map(device, HIGH)
        machine.long_mode(READ)
        machine.run_to_halt()
        libc.mprotect(device.address, PAGE, libc.PROT_NONE)
        machine.set_regs(rip=CODE)
        assert machine.vcpu.run() == fault(HIGH)


def test_a_handler_may_use_the_process_and_other_guests(machine: Machine, ram: int) -> None:
    """It runs on the vCPU's thread: it may copy guest memory, run another vCPU, and take its time."""
    with Machine(machine.kvm) as other:
        other.long_mode("mov $77, %eax; hlt")

        def handler(mapping: DeviceMapping, offset: int, write: bool) -> None:
            other.run_to_halt()
            os.pwrite(ram, other.vcpu.get_regs().rax.to_bytes(8, "little"), offset)
            mapping.insert(offset, ram, offset)

        with DeviceMapping(PAGE, handler) as device:
            machine.vm.map(device, HIGH)
            machine.long_mode(READ)
            machine.run_to_halt()
            assert machine.vcpu.get_regs().rax == 77


def test_arguments_and_closing(machine: Machine, ram: int) -> None:
    for size in (0, -PAGE, 100):
        with pytest.raises(ValueError, match="page size"):
            DeviceMapping(size, refuse)
    closed: list[int] = []
    device = DeviceMapping(2 * PAGE, Recorder(ram), released=lambda: closed.append(1))
    with pytest.raises(IndexError):
        device.insert(2 * PAGE, ram)
    with pytest.raises(ValueError, match="whole pages"):
        device.insert(1, ram)
    with pytest.raises(IndexError):
        device.read(PAGE, PAGE + 1)
    device.write(PAGE - 2, b"abcd")
    assert device.read(PAGE - 2, 4) == b"abcd"
    assert device.present(PAGE + 5)
    assert "2 pages present" in repr(device)
    machine.vm.map(device, HIGH)
    device.close()
    device.close()
    assert closed == [1] and device.closed and "closed" in repr(device)
    with pytest.raises(ValueError, match="closed"):
        _ = device.address
    with pytest.raises(OSError) as caught:
        device.insert(0, ram)
    assert caught.value.errno == errno.ENXIO
    with pytest.raises(OSError) as caught:
        device.read(0, 1)
    assert caught.value.errno == errno.EFAULT
    device.zap()
    machine.long_mode(READ)
    assert machine.vcpu.run() == fault(HIGH)


def test_a_dropped_mapping_goes_with_its_slot(ram: int) -> None:
    dropped: list[int] = []
    with anykvm.open("soft") as kvm, Machine(kvm) as machine:
        slot = machine.vm.map(DeviceMapping(PAGE, Recorder(ram), released=lambda: dropped.append(1)), HIGH)
        machine.long_mode(READ)
        machine.run_to_halt()
        assert not dropped
        machine.vm.unmap(slot)
        assert dropped == [1]


# -- SgxVepc ----------------------------------------------------------------------------------------------------

FILL = f"mov ${HIGH}, %edi; 1: mov %rdi, (%rdi); add $0x1000, %rdi; cmp ${HIGH + 6 * PAGE}, %rdi; jb 1b; hlt"


def test_epc_runs_out_and_grows(machine: Machine) -> None:
    epc = SgxVepc(pages=4)
    with epc.map(6 * PAGE) as vepc:
        machine.vm.map(vepc, HIGH)
        machine.long_mode(FILL)
        assert machine.vcpu.run() == fault(HIGH + 4 * PAGE)
        assert machine.vcpu.run() == fault(HIGH + 4 * PAGE)  # still
        assert (epc.pages, epc.free) == (4, 0)
        epc.grow(1)
        assert machine.vcpu.run() == fault(HIGH + 5 * PAGE)
        epc.grow(7)
        machine.run_to_halt()
        assert (epc.pages, epc.free) == (12, 6)
        assert [vepc.read(page * PAGE, 8) for page in range(6)] == [
            (HIGH + page * PAGE).to_bytes(8, "little") for page in range(6)
        ]
    assert epc.free == 12
    with pytest.raises(ValueError):
        epc.grow(-1)
    with pytest.raises(ValueError):
        SgxVepc(-1)


def test_epc_is_shared_and_pages_taken_back_are_fresh(machine: Machine) -> None:
    epc = SgxVepc(pages=6)
    with epc.map(6 * PAGE) as first, epc.map(6 * PAGE) as second:
        second.write(0, b"mine")
        machine.vm.map(first, HIGH)
        machine.long_mode(FILL)
        assert machine.vcpu.run() == fault(HIGH + 5 * PAGE)
        assert epc.remove(second) == 1
        machine.run_to_halt()
        assert epc.remove(first, PAGE, 2 * PAGE) == 2
        assert (epc.free, first.present(PAGE), first.present(0)) == (2, False, True)
        assert second.read(0, 8) == bytes(8)
        machine.long_mode(f"mov ${HIGH + PAGE}, %esi; mov (%rsi), %rax; hlt")
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 0


# -- PciBar -----------------------------------------------------------------------------------------------------


def test_bar_with_decoding_switched_off_and_on(machine: Machine) -> None:
    with PciBar(2 * PAGE) as bar:
        machine.vm.map(bar, HIGH)
        bar.registers[0:8] = (99).to_bytes(8, "little")
        machine.long_mode(READ)
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 99
        bar.memory_decoding = False
        machine.set_regs(rip=CODE)
        assert machine.vcpu.run() == fault(HIGH)
        bar.memory_decoding = True
        bar.registers[0:8] = (100).to_bytes(8, "little")
        machine.run_to_halt()
        assert machine.vcpu.get_regs().rax == 100


def test_bar_switched_off_under_a_running_guest(machine: Machine) -> None:
    """No store arrives after the switch: mappings that the guest has are gone, and it stands at its store."""
    with PciBar(PAGE) as bar:
        machine.vm.map(bar, HIGH)
        machine.long_mode(f"mov ${HIGH}, %esi; 1: inc %rax; mov %rax, (%rsi); jmp 1b")
        for _ in range(5):
            exits: list[object] = []
            thread = threading.Thread(target=lambda found=exits: found.append(machine.vcpu.run()))
            before = bar.registers[0:8]
            thread.start()
            while bar.registers[0:8] == before:
                pass
            bar.memory_decoding = False
            last = bar.registers[0:8]
            thread.join()
            assert exits == [fault(HIGH)]
            assert bar.registers[0:8] == last
            assert machine.vcpu.get_regs().rax == int.from_bytes(last, "little") + 1
            bar.memory_decoding = True


def test_bar_of_no_whole_pages() -> None:
    with pytest.raises(ValueError):
        PciBar(100)
