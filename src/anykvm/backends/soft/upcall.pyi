"""Calls from the engine into Python, and what becomes of the exceptions they raise.

There is one: the fault handlers of device mappings, which a guest's access calls in the middle of KVM_RUN. An exception
cannot cross the engine. An Exception fails the access; it is reported to ``sys.unraisablehook`` at once, and it is the
``__cause__`` of the error if KVM_RUN fails. Others (KeyboardInterrupt of a signal handler, SystemExit) end KVM_RUN as a
signal does, and are raised after it.
"""

from __future__ import annotations

from collections.abc import Callable

def device_fault_address() -> int:
    """Give the address of the C function that ``ak_device_handler()`` takes."""

def python_signals_address() -> int:
    """Give the address of the int that CPython sets while a signal waits for its Python function; 0: not known."""

def install(function: Callable[[int, int], int]) -> None:
    """Have device faults answered by ``function(host address, access)``: an ``enum ak_device_answer``."""

def in_device_fault() -> bool:
    """Whether the thread that asks, or for which a worker asks, is in a device's fault handler."""

def check(result: int = 0, message: str = "") -> None:
    """Raise what a fault handler has raised on this thread since the last ``check``.

    Of Exceptions this is done only if the ioctl failed, with ``result`` a negative errno: OSError with this errno and
    ``message``, whose cause is the exception.
    """
