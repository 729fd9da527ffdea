"""The engine's C interface for the contract (``run.py``) when it runs as plain Python: a ctypes mirror.

``native.pxd`` says the same to Cython. Only the head of ``struct ak_vcpu`` is mirrored. Importing this module compares
the mirrors with the library (``engine/layout.py``); types of functions are taken from it. Not for any other use:
everything here costs microseconds.
"""

from __future__ import annotations

import ctypes
from typing import Any

from anykvm import abi
from anykvm.abi.structures import kvm_run
from anykvm.backends.soft.engine.layout import Layout
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.engine.values import *  # noqa: F403  (AK_*)

from errno import EINTR, EINVAL, EIO  # noqa: F401  isort: skip  (names the contract uses)

KVM_EXIT_UNKNOWN = abi.KVM_EXIT_UNKNOWN
KVM_EXIT_IO = abi.KVM_EXIT_IO
KVM_EXIT_HLT = abi.KVM_EXIT_HLT
KVM_EXIT_HYPERCALL = abi.KVM_EXIT_HYPERCALL
KVM_EXIT_MMIO = abi.KVM_EXIT_MMIO
KVM_EXIT_IRQ_WINDOW_OPEN = abi.KVM_EXIT_IRQ_WINDOW_OPEN
KVM_EXIT_SET_TPR = abi.KVM_EXIT_SET_TPR
KVM_EXIT_SHUTDOWN = abi.KVM_EXIT_SHUTDOWN
KVM_EXIT_INTR = abi.KVM_EXIT_INTR
KVM_EXIT_INTERNAL_ERROR = abi.KVM_EXIT_INTERNAL_ERROR
KVM_EXIT_MEMORY_FAULT = abi.KVM_EXIT_MEMORY_FAULT
KVM_EXIT_DIRTY_RING_FULL = abi.KVM_EXIT_DIRTY_RING_FULL
KVM_INTERNAL_ERROR_EMULATION = abi.KVM_INTERNAL_ERROR_EMULATION
KVM_INTERNAL_ERROR_DELIVERY_EV = abi.KVM_INTERNAL_ERROR_DELIVERY_EV


class Exit(ctypes.Structure):
    """struct ak_exit."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("gpa", ctypes.c_uint64),
        ("hva", ctypes.c_uint64),
        ("access", ctypes.c_uint32),
        ("err", ctypes.c_int32),
        ("annotate", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("host_fault", ctypes.c_uint32),
        ("slot_id", ctypes.c_uint32),
        ("port", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("is_write", ctypes.c_uint32),
        ("ninsn", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("insn", ctypes.c_uint8 * 16),
    ]


class Vcpu(ctypes.Structure):
    """The head of struct ak_vcpu: what the contract reads and writes."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        ("exit", Exit),
        ("completion", ctypes.c_uint32),
        ("stopping", ctypes.c_uint32),
        ("string_in", ctypes.c_uint32),
        ("has_sigmask", ctypes.c_uint32),
        ("annotate_all", ctypes.c_uint32),
        ("ran", ctypes.c_uint32),
        ("purge", ctypes.c_uint32),
        ("sync_supported", ctypes.c_uint64),
        ("mp_state", ctypes.c_uint32),
    ]


class RunningVcpu(Vcpu):
    """A vCPU whose ``run`` is the shared page itself, as in C."""

    @property
    def run(self) -> kvm_run:
        """The shared page."""
        return kvm_run.from_address(Vcpu.run.__get__(self))


vcpu_p = RunningVcpu


def check_layout(layout: Layout) -> None:
    """Compare the mirrors with the library. Raises ImportError, which names the first difference."""
    layout.check_structure("ak_exit", Exit)
    layout.check_structure("ak_vcpu", Vcpu, head=True)


_LAYOUT = Layout(library())
check_layout(_LAYOUT)


def ak_vcpu_get(fd: int) -> RunningVcpu | None:
    """The vCPU that a descriptor stands for, held."""
    address = _function("ak_vcpu_get")(fd)
    return RunningVcpu.from_address(address) if address else None


def _function(name: str) -> Any:
    function = ctypes.CDLL(library()._name)[name]  # our own object: library()'s may have other types declared
    function.restype, function.argtypes = _LAYOUT.signature(name)
    return function


def __getattr__(name: str) -> Any:
    """An engine function; a vCPU goes to it by reference."""
    if not name.startswith("ak_"):
        raise AttributeError(name)
    function = _function(name)

    def call(*arguments: Vcpu | int) -> int:
        plain = (ctypes.addressof(one) if isinstance(one, Vcpu) else one for one in arguments)
        return int(function(*plain) or 0)

    globals()[name] = call
    return call
