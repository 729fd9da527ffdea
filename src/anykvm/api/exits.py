"""The exits of KVM_RUN as classes: snapshots of one exit, for ``match``.

A payload is copied out of the kvm_run page when the exit happens, so it cannot be read at the wrong time. Exits that
want an answer (``Io`` in, ``Mmio`` read, ``Hypercall``, ``X86Rdmsr``, ``X86Wrmsr``) take it only while they are their
vCPU's latest; KVM completes them at the next KVM_RUN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from anykvm.abi import constants as c
from anykvm.abi.names import errno_name, exit_name

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu


class StaleExit(RuntimeError):
    """An answer to an exit that is over: the vCPU has been run again or closed since.

    >>> Mmio(0xFEC00000, b"", 4, False).respond(0)
    Traceback (most recent call last):
    ...
    anykvm.api.exits.StaleExit: this Mmio is not its vCPU's latest exit; answer before the next run()
    """


class Exit:
    """Base of all exits. Two exits are equal if they are of one class and their fields are equal.

    >>> Intr() == Intr(), Intr() == Io(Io.IN, 0x60, 1, 1, b"")
    (True, False)
    """

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()
    exit_reason: int = c.KVM_EXIT_UNKNOWN
    """``kvm_run.exit_reason`` of this exit."""

    def __eq__(self, other: object) -> bool:
        """Compare class and fields."""
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__match_args__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the fields, numbers of 10 and more in hex."""
        fields = ((name, getattr(self, name)) for name in self.__match_args__)
        shown = ", ".join(
            f"{name}={value:#x}" if type(value) is int and value > 9 else f"{name}={value!r}" for name, value in fields
        )
        return f"{type(self).__name__}({shown})"


class Answerable(Exit):
    """Base of exits that may be answered while they are their vCPU's latest."""

    __slots__ = ("_serial", "_vcpu")
    _serial: int
    _vcpu: Vcpu | None

    def _page(self) -> memoryview:
        """Give the vCPU's pages if this exit may still be answered, else raise StaleExit."""
        vcpu = self._vcpu
        if vcpu is None or vcpu._serial != self._serial:
            name = type(self).__name__
            raise StaleExit(f"this {name} is not its vCPU's latest exit; answer before the next run()")
        return vcpu._page


class _Access(Answerable):
    """Base of the accesses that carry bytes: the guest wrote them, or waits for them."""

    __slots__ = ("_data",)
    _data: bytes

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
        self._vcpu = None
        self._serial = 0

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
    DATA: Final = 40
    """Where the data is in kvm_run (api.rst: at most 8 bytes)."""

    def __init__(
        self, phys_addr: int, data: bytes, len: int, is_write: bool, vcpu: Vcpu | None = None, serial: int = 0
    ) -> None:
        """Make one; without a vCPU it cannot be answered."""
        self.phys_addr = phys_addr
        self._data = data
        self.len = len
        self.is_write = is_write
        self._vcpu = vcpu
        self._serial = serial

    def _asked(self) -> tuple[int, int, str, int]:
        if self.is_write:
            raise ValueError(f"write to {self.phys_addr:#x} takes no answer")
        return self.DATA, self.len, "the read of", self.phys_addr


class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT: KVM could not resolve a guest access to ``[gpa, gpa + size)``.

    Made only when the documented rule holds: KVM_RUN failed with EFAULT or EHWPOISON (``errno``) and exit_reason is
    KVM_EXIT_MEMORY_FAULT. ``flags`` is 0 or ``MemoryFault.PRIVATE``. The instruction has not executed:
    make the memory accessible and run again.

    >>> MemoryFault(0x1000, 0x1000, 0, 14)
    MemoryFault(gpa=0x1000, size=0x1000, flags=0, errno=EFAULT)
    """

    PRIVATE: Final = c.KVM_MEMORY_EXIT_FLAG_PRIVATE
    __slots__ = ("errno", "flags", "gpa", "size")
    __match_args__ = ("gpa", "size", "flags", "errno")
    exit_reason = c.KVM_EXIT_MEMORY_FAULT

    def __init__(self, gpa: int, size: int, flags: int, errno: int) -> None:
        """Make one from the fields of ``kvm_run.memory_fault`` and KVM_RUN's errno."""
        self.gpa = gpa
        self.size = size
        self.flags = flags
        self.errno = errno

    def __repr__(self) -> str:
        """Show the fields, errno by name."""
        start = f"MemoryFault(gpa={self.gpa:#x}, size={self.size:#x}"
        return f"{start}, flags={self.flags:#x}, errno={errno_name(self.errno)})".replace("flags=0x0", "flags=0")


class Intr(Exit):
    """KVM_RUN returned EINTR: a signal is pending, or ``immediate_exit`` was set.

    ``exit_reason`` is what the page said then. With a signal it is KVM_EXIT_INTR. With ``immediate_exit`` it is the
    reason of an *earlier* exit, which KVM does not clear: never act on it (``memory_fault`` is not valid here either).

    >>> Intr(c.KVM_EXIT_MEMORY_FAULT)
    Intr(exit_reason=KVM_EXIT_MEMORY_FAULT)
    """

    __slots__ = ("exit_reason",)
    __match_args__ = ("exit_reason",)

    def __init__(self, exit_reason: int = c.KVM_EXIT_INTR) -> None:
        """Make one."""
        self.exit_reason = exit_reason

    def __repr__(self) -> str:
        """Show the reason by name."""
        return f"Intr(exit_reason={exit_name(self.exit_reason)})"


class Unknown(Exit):
    """Any exit without a class here. ``payload`` is a copy of the 256 bytes of kvm_run's exit union.

    A KVM_RUN that succeeded with KVM_EXIT_MEMORY_FAULT in the page is such an exit too: without EFAULT or EHWPOISON
    the annotation is not valid.

    >>> Unknown(1000, b"")
    Unknown(exit reason 1000)
    """

    __slots__ = ("exit_reason", "payload")
    __match_args__ = ("exit_reason", "payload")

    def __init__(self, exit_reason: int, payload: bytes) -> None:
        """Make one."""
        self.exit_reason = exit_reason
        self.payload = payload

    def __repr__(self) -> str:
        """Show the reason by name, not the payload."""
        return f"Unknown({exit_name(self.exit_reason)})"
