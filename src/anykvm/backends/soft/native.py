"""The engine's C interface for the contract (``run.py``) when it runs as plain Python: a ctypes mirror.

``native.pxd`` says the same to Cython. Only the head of ``struct ak_vcpu`` is mirrored; `check_layout` compares it with
the library's own idea. Not for any other use: everything here costs microseconds.
"""

from __future__ import annotations

import ctypes
from typing import Any

from anykvm import abi
from anykvm.abi.structures import kvm_run
from anykvm.backends.soft.engine.library import library

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

(
    AK_EXIT_NONE,
    AK_EXIT_KICKED,
    AK_EXIT_IO,
    AK_EXIT_MMIO,
    AK_EXIT_HLT,
    AK_EXIT_SHUTDOWN,
    AK_EXIT_FAULT,
    AK_EXIT_EMULATION,
    AK_EXIT_SET_TPR,
    AK_EXIT_DELIVERY,
    AK_EXIT_IRQ_WINDOW,
    AK_EXIT_HYPERCALL,
    AK_EXIT_DIRTY_FULL,
    AK_EXIT_ENGINE,
    AK_EXIT_HWPOISON,
) = range(15)
(
    AK_COMPLETE_NONE,
    AK_COMPLETE_PIO,
    AK_COMPLETE_STRING_IN,
    AK_COMPLETE_MMIO_READ,
    AK_COMPLETE_MMIO_WRITE,
    AK_COMPLETE_HYPERCALL,
) = range(6)


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
        ("run_pointer", ctypes.c_void_p),
        ("exit", Exit),
        ("completion", ctypes.c_uint32),
        ("stopping", ctypes.c_uint32),
        ("string_in", ctypes.c_uint32),
        ("has_sigmask", ctypes.c_uint32),
        ("annotate_all", ctypes.c_uint32),
        ("ran", ctypes.c_uint32),
        ("sync_supported", ctypes.c_uint64),
        ("mp_state", ctypes.c_uint32),
    ]

    @property
    def run(self) -> kvm_run:
        """The shared page."""
        return kvm_run.from_address(self.run_pointer)


vcpu_p = Vcpu

#: Functions that return a C bool: only the low byte of the result is theirs.
PREDICATES = frozenset(
    {
        "ak_signal_pending",
        "ak_irq_window",
        "ak_next_fragment",
        "ak_send_hwpoison_signal",
        "ak_hypercall",
        "ak_dirty_ring_full",
        "ak_vcpu_put",
    }
)


def ak_vcpu_get(fd: int) -> Vcpu | None:
    """The vCPU that a descriptor stands for, held."""
    address = library().ak_vcpu_get(fd)
    return Vcpu.from_address(address) if address else None


def check_layout() -> None:
    """Compare the mirror with the library; RuntimeError if they differ."""
    offset = ctypes.CDLL(library()._name).ak_contract_offset
    for index, name in enumerate(("exit", "completion", "sync_supported", "mp_state")):
        ours = getattr(Vcpu, name).offset
        if offset(index) != ours:
            raise RuntimeError(f"struct ak_vcpu: {name} is at {offset(index)}, native.py has it at {ours}")


def __getattr__(name: str) -> Any:
    """An engine function, called with a vCPU by reference."""
    if not name.startswith("ak_"):
        raise AttributeError(name)
    function = getattr(library(), name)
    function.restype = ctypes.c_bool if name in PREDICATES else ctypes.c_int

    def call(vcpu: Vcpu, *arguments: int) -> int:
        return int(function(ctypes.byref(vcpu), *arguments) or 0)

    globals()[name] = call
    return call
