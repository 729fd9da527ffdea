"""Accesses that carry bytes: port I/O and device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.reading import field
from anykvm.abi.structures import kvm_run
from anykvm.api.exits.base import Answerable

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu


class _Access(Answerable):
    """Base of the accesses that carry bytes: the guest wrote them, or waits for them."""

    __slots__ = ("_data",)
    _data: bytes

    # No dataclass: setting ``data`` answers the exit, so it is a property.

    @property
    def data(self) -> bytes:
        """The bytes the guest wrote, or the answer to its read."""
        return self._data

    @data.setter
    def data(self, value: bytes) -> None:
        self.respond(value)

    def _asked(self) -> tuple[int, int, str, int]:
        """Say where in the vCPU's pages the answer goes, its length, and what asks; ValueError where nothing does."""
        raise NotImplementedError

    def respond(self, value: int | bytes) -> None:
        """Answer a read: all of its bytes, or their value as a little-endian integer.

        Raises StaleExit when the vCPU has been run again or closed; ValueError for a write or a wrong length.
        """
        page = self._page()
        at, length, what, where = self._asked()
        if isinstance(value, int):
            if not 0 <= value < 1 << 8 * length:
                raise ValueError(f"{value:#x} does not fit the {length} bytes of {what} {where:#x}")
            data = value.to_bytes(length, "little")
        elif len(value) != length:
            raise ValueError(f"{len(value)} bytes given to {what} {where:#x}, which takes {length}")
        else:
            data = bytes(value)
        page[at : at + length] = data
        self._data = data


class Io(_Access):
    """KVM_EXIT_IO: port input (``Io.IN``) or output (``Io.OUT``), ``count`` items of ``size`` bytes.

    ``data`` holds the bytes the guest wrote; for input it is empty until it is set, which answers as ``respond`` does.

    >>> match Io(Io.OUT, 0x3F8, 1, 1, b"!"):
    ...     case Io(Io.OUT, 0x3F8, data=data):
    ...         print(data)
    b'!'
    """

    IN: Final = c.KVM_EXIT_IO_IN
    OUT: Final = c.KVM_EXIT_IO_OUT
    __slots__ = ("_offset", "count", "direction", "port", "size")
    __match_args__ = ("direction", "port", "size", "count", "data")
    exit_reason = c.KVM_EXIT_IO

    def __init__(self, direction: int, port: int, size: int, count: int, data: bytes) -> None:
        """Make one by hand, for comparing; it cannot be answered."""
        # Vcpu.run() fills the same slots without this call, which would cost a third of its time.
        self.direction = direction
        self.port = port
        self.size = size
        self.count = count
        self._data = data
        self._offset = 0
        self._comes_from(None, 0)

    def _asked(self) -> tuple[int, int, str, int]:
        if self.direction != Io.IN:
            raise ValueError(f"output to port {self.port:#x} takes no answer")
        return self._offset, self.size * self.count, "the input from port", self.port


class Mmio(_Access):
    """KVM_EXIT_MMIO: access of ``len`` bytes to a guest-physical address with no memory behind it.

    ``data`` holds the bytes written; for a read it is empty until it is set, which answers as ``respond`` does.

    >>> Mmio(0xFEE00000, b"\\x01\\0\\0\\0", 4, True)
    Mmio(phys_addr=0xfee00000, data=b'\\x01\\x00\\x00\\x00', len=4, is_write=True)
    """

    __slots__ = ("is_write", "len", "phys_addr")
    __match_args__ = ("phys_addr", "data", "len", "is_write")
    exit_reason = c.KVM_EXIT_MMIO
    DATA: Final = field(kvm_run, "mmio.data")[0]
    """Where the data is in kvm_run (api.rst: at most 8 bytes)."""

    def __init__(
        self, phys_addr: int, data: bytes, len: int, is_write: bool, vcpu: Vcpu | None = None, serial: int = 0
    ) -> None:
        """Make one; without a vCPU it cannot be answered."""
        self.phys_addr = phys_addr
        self._data = data
        self.len = len
        self.is_write = is_write
        self._comes_from(vcpu, serial)

    def _asked(self) -> tuple[int, int, str, int]:
        if self.is_write:
            raise ValueError(f"write to {self.phys_addr:#x} takes no answer")
        return self.DATA, self.len, "the read of", self.phys_addr
