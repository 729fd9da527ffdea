"""The console: what a guest writes arrives, what it polls says ready."""

from __future__ import annotations

import pytest

import anykvm
from anykvm.api import GuestMemory, Hlt, Io
from anykvm.backends import Backend
from anykvm.vmm.interrupts import watched
from anykvm.vmm.loop import drive
from anykvm.vmm.modes import real_mode
from anykvm.vmm.serial import Console


def out(port: int, data: bytes, size: int = 1) -> Io:
    return Io(Io.OUT, port, size, len(data) // size, data)


class Answer(Io):
    """An input that can be answered without a vCPU."""

    answer = b""

    def respond(self, value: int | bytes) -> None:
        self.answer = value if isinstance(value, bytes) else bytes((value,))


def read(console: Console, port: int, size: int = 1, count: int = 1) -> bytes:
    exit = Answer(Io.IN, port, size, count, b"")
    assert console.handle(exit)
    return exit.answer


@pytest.fixture
def sink() -> bytearray:
    return bytearray()


def test_both_ports_reach_the_sink_in_order(sink: bytearray) -> None:
    console = Console(sink.extend)
    assert all(console.handle(exit) for exit in (out(0xE9, b"a"), out(0x3F8, b"b"), out(0xE9, b"cd"), out(0x3F8, b"e")))
    assert sink == b"abcde"


def test_other_ports_are_not_the_consoles(sink: bytearray) -> None:
    console = Console(sink.extend)
    for port in (0x3F7, 0x400, 0xE8, 0x80):
        assert not console.handle(out(port, b"x"))
    assert not sink


def test_divisor_is_not_output(sink: bytearray) -> None:
    console = Console(sink.extend)
    for port, value in ((0x3FB, b"\x83"), (0x3F8, b"\x01"), (0x3F9, b"\x02")):
        console.handle(out(port, value))
    assert read(console, 0x3F8) == b"\x01" and read(console, 0x3F9) == b"\x02"
    console.handle(out(0x3FB, b"\x03"))
    console.handle(out(0x3F8, b"!"))
    assert sink == b"!" and read(console, 0x3FB) == b"\x03"


def test_polling_finds_it_ready_and_without_input(sink: bytearray) -> None:
    console = Console(sink.extend)
    assert read(console, 0x3FD) == b"\x60"
    assert read(console, 0x3FA) == b"\x01"
    assert read(console, 0x3F8) == b"\x00"
    assert read(console, 0xE9) == b"\xe9"


def test_scratch_register_is_kept(sink: bytearray) -> None:
    console = Console(sink.extend)
    console.handle(out(0x3FF, b"\x5a"))
    assert read(console, 0x3FF) == b"\x5a"


def test_wide_access_reaches_ports_in_a_row(sink: bytearray) -> None:
    console = Console(sink.extend)
    console.handle(out(0x3F8, b"A\x00B\x00", size=2))  # twice: THR, IER
    assert sink == b"AB"
    assert read(console, 0x3FE, size=4) == b"\xb0\x00\xff\xff"
    assert read(console, 0xE9, size=2) == b"\xe9\xff"


def test_a_guest_that_polls_prints(backend: Backend, sink: bytearray) -> None:
    # mov si,msg; cld; next: lodsb; test al,al; jz end; mov ah,al; mov dx,0x3fd; wait: in al,dx; test al,0x20; jz wait;
    # mov dx,0x3f8; mov al,ah; out dx,al; jmp next; end: mov dx,0xe9; mov si,msg; mov cx,5; rep outsb; hlt; msg
    code = bytes.fromhex("be277c fc ac 84c0 7412 88c4 bafd03 ec a820 74fb baf803 88e0 ee ebe9")
    code += bytes.fromhex("bae900 be277c b90500 f36e f4")
    assert len(code) == 0x27  # where msg is
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm, GuestMemory(0x10000) as memory:
        memory.write(0x7C00, code + b"hello\0")
        vm.map(memory, 0)
        vcpu = vm.create_vcpu()
        real_mode(vcpu, 0x7C00)
        with watched(vcpu, 10):
            assert drive(vcpu, Console(sink.extend)) == Hlt()
    assert sink == b"hellohello"
