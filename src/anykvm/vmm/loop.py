"""The run loop of a VMM with no devices but a console: run the guest until something ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from anykvm.abi.names import errno_name
from anykvm.abi.names import exit_name as reason_name
from anykvm.api import (
    Debug,
    DirtyRingFull,
    Exit,
    FailEntry,
    Hlt,
    InternalError,
    Intr,
    Io,
    IrqWindowOpen,
    MemoryFault,
    Mmio,
    Shutdown,
    SystemEvent,
    Unknown,
    Vcpu,
)
from anykvm.vmm.interrupts import raise_pending
from anykvm.vmm.serial import Console

_ALL_ONES: Final = 0xFF


class TooManyExits(Exception):
    """The guest made more exits than it was allowed."""


def drive(
    vcpu: Vcpu, console: Console, report: Callable[[Exit], object] = lambda exit: None, max_exits: int | None = None
) -> Exit:
    """Run until an exit that ends the guest, and return that: HLT, shutdown, memory fault, internal error...

    Ports of the console are served and not reported; all other exits are given to ``report``. Nothing is behind other
    ports and addresses: a write is lost, a read gives all ones, as on a bus. Call it within ``interrupts.watched`` to
    have signals and a time limit end it.
    Raises TooManyExits behind ``max_exits`` exits, console included; OSError as ``Vcpu.run``; what ``raise_pending``
    raises.
    """
    exits = 0
    while True:
        exit = vcpu.run()
        exits += 1
        match exit:
            case Intr():
                raise_pending()
                exits -= 1  # not the guest's doing
            case Io():
                if not console.handle(exit):
                    if exit.direction == Io.IN:
                        exit.respond(bytes((_ALL_ONES,)) * (exit.size * exit.count))
                    report(exit)
            case Mmio():
                if not exit.is_write:
                    exit.respond(bytes((_ALL_ONES,)) * exit.len)
                report(exit)
            case IrqWindowOpen() | DirtyRingFull() | Debug():
                report(exit)
            case _:
                report(exit)
                return exit
        if exits == max_exits:
            raise TooManyExits(f"stopped after {exits} exits")


def describe(exit: Exit) -> str:
    """Say what an exit is, in one line.

    >>> describe(Io(Io.OUT, 0x80, 1, 1, b"A")), describe(MemoryFault(0x5000, 4096, 0, 14))
    ('io out port=0x80 size=1 data=41', 'memory fault gpa=0x5000 size=0x1000 flags=0 errno=EFAULT')
    """
    match exit:
        case Io(direction, port, size, count, data):
            way = "out" if direction == Io.OUT else "in"
            times = f" count={count}" if count != 1 else ""
            return f"io {way} port={port:#x} size={size}{times} data={data.hex()}"
        case Mmio(address, data, length, is_write):
            return f"mmio {'write' if is_write else 'read'} gpa={address:#x} size={length} data={data.hex()}"
        case MemoryFault(gpa, size, flags, errno):
            kind = "private" if flags == MemoryFault.PRIVATE else f"{flags:#x}" if flags else "0"
            return f"memory fault gpa={gpa:#x} size={size:#x} flags={kind} errno={errno_name(errno)}"
        case Hlt():
            return "hlt"
        case Shutdown():
            return "shutdown (triple fault)"
        case InternalError(suberror, data):
            code = f" instruction={exit.instruction.hex()}" if exit.instruction else ""
            values = ",".join(f"{value:#x}" for value in data)
            return f"internal error suberror={suberror} data={values}{code}"
        case FailEntry(reason, cpu):
            return f"fail entry hardware_entry_failure_reason={reason:#x} cpu={cpu}"
        case SystemEvent(kind):
            return f"system event type={kind}"
        case Unknown():
            return reason_name(exit.exit_reason)
        case _:
            return repr(exit)
