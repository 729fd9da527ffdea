"""Catch SIGBUS with what the kernel says about it: code and address, which Python's own handlers are not told."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Iterator
from typing import Final

from anykvm.conformance.signals import Signals

_SA_SIGINFO: Final = 4
_SI_CODE: Final = 8
_SI_ADDR: Final = 16
_SI_ADDR_LSB: Final = 24

_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction on x86-64."""

    _fields_ = [
        ("handler", _HANDLER),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def caught(signals: Signals) -> Iterator[None]:
    """Record each SIGBUS of this process in ``signals.bus_errors`` while the context lasts.

    For signals that KVM or madvise sends, which arrive at the end of a system call: a SIGBUS of an instruction would
    come again and again. ctypes takes the GIL for the handler; the thread has released it for the system call.
    """

    def handle(number: int, info: int, context: int) -> None:
        signals.bus_errors.append(siginfo(info))

    callback = _HANDLER(handle)
    previous = _SigAction()
    action = _SigAction(callback, (ctypes.c_uint64 * 16)(), _SA_SIGINFO, None)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(previous)):
        raise OSError(ctypes.get_errno(), "sigaction")
    try:
        yield
    finally:
        libc.sigaction(signal.SIGBUS, ctypes.byref(previous), None)


def siginfo(address: int) -> dict[str, int]:
    """Read a siginfo_t of a SIGBUS: the fields that records have."""
    code = ctypes.c_int32.from_address(address + _SI_CODE).value
    fault = ctypes.c_uint64.from_address(address + _SI_ADDR).value
    granule = ctypes.c_int16.from_address(address + _SI_ADDR_LSB).value
    return {"si_code": code, "addr_lsb": granule, "addr": fault}


def take_pending() -> list[dict[str, int]]:
    """Take every pending SIGBUS of this thread, which has it blocked, and give what each says."""
    taken: list[dict[str, int]] = []
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = (ctypes.c_uint64 * 16)(1 << signal.SIGBUS - 1)
    info = (ctypes.c_uint8 * 128)()
    now = (ctypes.c_int64 * 2)()
    while libc.sigtimedwait(ctypes.byref(wanted), ctypes.byref(info), ctypes.byref(now)) > 0:
        taken.append(siginfo(ctypes.addressof(info)))
    return taken
