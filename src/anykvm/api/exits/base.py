"""What all exits share: fields compare and show, an answer is taken only from the latest exit.

A payload is copied out of the kvm_run page when the exit happens, so it cannot be read at the wrong time. Some exits
want an answer: ``Io`` (input), ``Mmio`` (read), ``Hypercall``, ``X86Rdmsr``, ``X86Wrmsr``. They take it only while they
are their vCPU's latest. KVM completes them at the next KVM_RUN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from anykvm.abi import constants as c

if TYPE_CHECKING:
    from anykvm.api.vcpu import Vcpu


class StaleExit(RuntimeError):
    """An answer to an exit that is over: the vCPU has been run again or closed since.

    >>> from anykvm import Mmio
    >>> Mmio(0xFEC00000, b"", 4, False).respond(0)
    Traceback (most recent call last):
    ...
    anykvm.api.exits.base.StaleExit: this Mmio is not its vCPU's latest exit; answer before the next run()
    """


class Exit:
    """Base of all exits. Two exits are equal if they are of one class and their fields are equal.

    >>> from anykvm import Intr, Io
    >>> Intr() == Intr(), Intr() == Io(Io.IN, 0x60, 1, 1, b"")
    (True, False)
    """

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()
    exit_reason: int = c.KVM_EXIT_UNKNOWN
    """``kvm_run.exit_reason`` of this exit."""

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
    """Which ``run`` of the vCPU it came from."""
    _vcpu: Vcpu | None

    def __eq__(self, other: object) -> bool:
        """Compare class and fields."""
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__match_args__)

    __hash__ = None  # type: ignore[assignment]

    def _page(self) -> memoryview:
        """Give the vCPU's pages if this exit may still be answered, else raise StaleExit."""
        vcpu = self._vcpu
        if vcpu is None or vcpu._serial != self._serial:
            name = type(self).__name__
            raise StaleExit(f"this {name} is not its vCPU's latest exit; answer before the next run()")
        return vcpu._page

    def _comes_from(self, vcpu: Vcpu | None, serial: int) -> None:
        """Say whose exit it is. An exit made by hand is nobody's, and takes no answer."""
        self._vcpu = vcpu
        self._serial = serial
