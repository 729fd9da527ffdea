"""Each mode runs code that means something else in the others, on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import anykvm
from anykvm.api import GuestMemory, Hlt, Io, Kvm, Vcpu
from anykvm.backends import Backend
from anykvm.vmm import modes
from vmm_helpers import require_soft

SIZE = 1 << 20


@pytest.fixture
def kvm(backend: Backend) -> Iterator[Kvm]:
    with anykvm.open(backend) as kvm:
        yield kvm


def machine(kvm: Kvm, code: bytes, at: int) -> tuple[Vcpu, GuestMemory]:
    vm = kvm.create_vm()
    memory = GuestMemory(SIZE)
    memory.write(at, code)
    vm.map(memory, 0)
    return vm.create_vcpu(), memory


def outputs(vcpu: Vcpu) -> list[bytes]:
    found = []
    while True:
        match vcpu.run():
            case Io(Io.OUT, 0x80, data=data):
                found.append(data)
            case Hlt():
                return found
            case other:
                raise AssertionError(f"{other!r} at rip {vcpu.get_regs().rip:#x}")


@pytest.mark.parametrize("entry", [0x7C00, 0x12345, 0xF1000])
def test_real_mode_computes_in_16_bits(kvm: Kvm, entry: int) -> None:
    # mov al,1; push ax; pop bx; mov ax,0x1234 (in 32-bit code this would take two more bytes); out 0x80,ax; hlt
    code = bytes.fromhex("b001 50 5b b83412 e780 f4")
    vcpu, _ = machine(kvm, code, entry)
    modes.real_mode(vcpu, entry)
    assert outputs(vcpu) == [b"\x34\x12"]


def test_real_mode_refuses_an_entry_above_it(kvm: Kvm) -> None:
    vcpu, _ = machine(kvm, b"\xf4", 0)
    with pytest.raises(ValueError, match="below 1 MiB"):
        modes.real_mode(vcpu, 1 << 20)


def test_protected_mode_is_flat_and_has_a_usable_gdt_and_stack(kvm: Kvm) -> None:
    # mov ax,0x10; mov ds,ax; push 0x11223344; pop eax; out 0x80,eax; mov eax,cr0; out 0x80,eax; ljmp 8:next;
    # next: mov eax,[0x60000]; out 0x80,eax; hlt
    code = bytes.fromhex("66b81000 8ed8 6844332211 58 e780 0f20c0 e780 ea1a000500 0800 a100000600 e780 f4")
    vcpu, memory = machine(kvm, code, 0x50000)
    memory.write(0x60000, b"data")
    assert modes.protected_mode(vcpu, memory, 0x50000, 0x80000) == modes.GDT + 4096
    pushed, cr0, data = outputs(vcpu)
    assert pushed == bytes.fromhex("44332211")
    assert cr0[0] & 1 and not cr0[3] & 0x80
    assert data == b"data"


def test_long_mode_computes_in_64_bits_and_has_a_usable_gdt_and_stack(kvm: Kvm) -> None:
    # mov ax,0x10; mov ds,ax; mov ss,ax; mov rax,0x1122334455667788; push rax; shr rax,32; out 0x80,eax; pop rax;
    # out 0x80,eax; push 8; lea rax,[rip+next]; push rax; lretq; next: hlt
    code = bytes.fromhex(
        "66b81000 8ed8 8ed0 48b88877665544332211 50 48c1e820 e780 58 e780 6a08 488d0503000000 50 48cb f4"
    )
    vcpu, memory = machine(kvm, code, 0x50000)
    end = modes.long_mode(vcpu, memory, 0x50000, 0x80000, ((0, SIZE), (4 << 30, 1)))
    assert end == modes.tables_end(((0, SIZE), (4 << 30, 1))) == modes.TABLES + 4 * 4096
    assert outputs(vcpu) == [bytes.fromhex("44332211"), bytes.fromhex("88776655")]


def test_long_mode_has_sse() -> None:
    # mov rax,0x1122334455667788; movq xmm0,rax; paddq xmm0,xmm0; movq rcx,xmm0; mov eax,ecx; out 0x80,eax; hlt
    code = bytes.fromhex("48b88877665544332211 66480f6ec0 660fd4c0 66480f7ec1 89c8 e780 f4")
    # Not on any device: KVM's instruction emulator, which runs guests where there is no hardware for it, has no paddq.
    with anykvm.open(require_soft()) as kvm:
        vcpu, memory = machine(kvm, code, 0x50000)
        modes.long_mode(vcpu, memory, 0x50000, 0x80000, ((0, SIZE),))
        assert outputs(vcpu) == [(0x55667788 * 2).to_bytes(4, "little")]


def test_long_mode_maps_one_to_one_and_only_what_was_asked(kvm: Kvm) -> None:
    vcpu, memory = machine(kvm, b"\xf4", 0x50000)
    modes.long_mode(vcpu, memory, 0x50000, 0x80000, ((0, SIZE), (4 << 30, 1 << 30)))
    for address in (0x50000, (4 << 30) + 0x12345, (5 << 30) - 1):
        assert vcpu.translate(address).physical_address == address
    assert not vcpu.translate(1 << 30).valid
    assert not vcpu.translate(5 << 30).valid


def test_long_mode_refuses_what_its_tables_cannot_map(kvm: Kvm) -> None:
    vcpu, memory = machine(kvm, b"\xf4", 0x50000)
    with pytest.raises(ValueError, match="512 GiB"):
        modes.long_mode(vcpu, memory, 0x50000, 0x80000, ((0, 513 << 30),))
    with pytest.raises(IndexError):
        modes.long_mode(vcpu, memory, 0x50000, 0x80000, ((0, 300 << 30),))
