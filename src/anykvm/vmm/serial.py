"""The guest's console: port 0xE9, and as much of a 16550 at 0x3F8 as a guest that polls it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from anykvm.api import Io

DEBUG_PORT: Final = 0xE9
"""Every byte written goes to the sink; reading gives 0xE9, which is how a guest finds out that it is there."""
COM1: Final = 0x3F8
"""First of the eight ports of the serial line."""

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_DLAB: Final = 0x80  # LCR: the first two ports are the baud rate divisor
_LSR_READY: Final = 0x60  # transmitter empty, and idle
_IIR_NONE: Final = 0x01  # no interrupt is pending
_MSR_READY: Final = 0xB0  # carrier, data set ready, clear to send


class Console:
    """Takes the port exits that are the guest's console, and gives the bytes to ``sink`` as they come.

    There is no input and no interrupt: a guest that polls the line status finds it always ready to send, never with
    data.

    >>> out = bytearray()
    >>> console = Console(out.extend)
    >>> console.handle(Io(Io.OUT, 0xE9, 1, 1, b"!")), console.handle(Io(Io.OUT, 0x80, 1, 1, b"?")), bytes(out)
    (True, False, b'!')
    """

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        """Make one that calls ``sink`` with what the guest writes."""
        self._sink = sink
        self._registers = bytearray(8)
        self._divisor = bytearray((12, 0))  # 9600 baud

    def handle(self, exit: Io) -> bool:
        """Serve a port exit, answering it if it is an input. Returns False for ports that are not the console's.

        An access of several bytes reaches as many ports in a row, as on a bus. Raises StaleExit for an exit that is
        over.
        """
        if exit.port != DEBUG_PORT and not COM1 <= exit.port < COM1 + 8:
            return False
        if exit.direction == Io.OUT:
            self._write(exit)
        else:
            one = b"".join(self._read(exit.port + index) for index in range(exit.size))
            exit.respond(one * exit.count)
        return True

    def _write(self, exit: Io) -> None:
        if exit.port == DEBUG_PORT:
            self._sink(exit.data)
            return
        sent = bytearray()
        for start in range(0, len(exit.data), exit.size):
            for index, value in enumerate(exit.data[start : start + exit.size], exit.port - COM1):
                self._write_register(index, value, sent)
        if sent:
            self._sink(bytes(sent))

    def _write_register(self, index: int, value: int, sent: bytearray) -> None:
        if index <= _IER and self._registers[_LCR] & _DLAB:
            self._divisor[index] = value
        elif index == _DATA:
            sent.append(value)
        elif index in (_IER, _LCR, _MCR, _SCR):
            self._registers[index] = value

    def _read(self, port: int) -> bytes:
        if port == DEBUG_PORT:
            return bytes((DEBUG_PORT,))
        index = port - COM1
        if not 0 <= index < 8:
            return b"\xff"
        if index <= _IER and self._registers[_LCR] & _DLAB:
            return bytes((self._divisor[index],))
        fixed = {_DATA: 0, _IIR: _IIR_NONE, _LSR: _LSR_READY, _MSR: _MSR_READY}
        return bytes((fixed.get(index, self._registers[index]),))
