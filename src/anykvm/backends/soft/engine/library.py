"""The engine's C interface (``engine.h``, ``ioctl.c``) as typed ctypes functions.

Every call releases the GIL. Addresses of engine objects are plain integers here; only what crosses the border by value
is mirrored as a structure.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Final

from anykvm.abi import structures as s
from anykvm.backends.soft import upcall
from anykvm.backends.soft.engine import values
from anykvm.backends.soft.engine.layout import Layout, check_sizes, mirrored
from anykvm.host.atomic import atomically_or_here

PATH: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libanykvm_engine.so")
"""Where the build puts the library."""


class AkSlot(ctypes.Structure):
    """``struct ak_slot``: a memslot as the engine sees it. The last two fields are the engine's own."""

    _fields_ = [
        ("base_gfn", ctypes.c_uint64),
        ("npages", ctypes.c_uint64),
        ("hva", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("dirty_bitmap", ctypes.c_void_p),
        ("gmem", ctypes.c_uint64),
        ("gmem_offset", ctypes.c_uint64),
        ("gmem_only", ctypes.c_uint32),
        ("mapped", ctypes.c_uint64),
        ("any_mapped", ctypes.c_uint32),
    ]


STRUCTURES: Final[tuple[type[ctypes.Structure], ...]] = (
    *(s.kvm_regs, s.kvm_sregs, s.kvm_fpu, s.kvm_xcrs, s.kvm_debugregs, s.kvm_vcpu_events, s.kvm_xsave),
    *(s.kvm_msrs, s.kvm_msr_entry, s.kvm_cpuid2, s.kvm_cpuid_entry2, s.kvm_mp_state),
    *(s.kvm_translation, s.kvm_interrupt, s.kvm_signal_mask),
)
"""The kernel's structures that the engine reads and writes in buffers made here."""


_address = ctypes.c_uint64
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64
_i64 = ctypes.c_int64
_int = ctypes.c_int
_pointer = ctypes.c_void_p

REFUSAL_HOOK: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
"""Asked in front of a page's look-up: ``enum ak_lookup``, vCPU id, gpa, access; see refusal.c."""

SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    # VM
    "ak_vm_create": (_address, ()),
    "ak_vm_destroy": (None, (_address,)),
    "ak_vm_dead": (_int, (_address,)),
    "ak_vm_kill": (None, (_address,)),
    "ak_vm_set_tsc_khz": (None, (_address, _u64)),
    "ak_set_memslot": (_int, (_address, ctypes.POINTER(AkSlot), ctypes.POINTER(AkSlot))),
    "ak_get_dirty_log": (_int, (_address, _address, _u64, _address, ctypes.c_bool)),
    "ak_clear_dirty_log": (_int, (_address, _address, _u64, _u32, _address)),
    "ak_reset_dirty_rings": (_int, (_address,)),
    "ak_poison": (_int, (_address, _u64, ctypes.c_bool)),
    "ak_mm_generation": (_u32, ()),
    "ak_vm_configure": (None, (_address, _u64, _u32)),
    "ak_vm_set_hypercall_exits": (None, (_address, _u64)),
    # private memory
    "ak_set_memory_attributes": (_int, (_address, _u64, _u64, ctypes.c_bool)),
    "ak_gmem_create": (_int, (_address, _int, _u64, ctypes.c_uint32, ctypes.POINTER(_address))),
    "ak_gmem_mmap": (ctypes.c_int64, (_int, _u64, _u64)),
    "ak_gmem_destroy": (None, (_address, _address)),
    "ak_gmem_fd": (_int, (_address,)),
    "ak_gmem_inject": (_int, (_address, _address, _u64, _int)),
    "ak_pre_fault_memory": (_int, (_address, _pointer, _address)),
    "ak_device_add": (_int, (_address, _u64)),
    "ak_device_remove": (None, (_address,)),
    "ak_device_handler": (None, (_pointer,)),
    "ak_vm_refusal_hook": (None, (_address, _pointer)),
    "ak_vm_in_device_fault": (ctypes.c_bool, (_address,)),
    # descriptors
    "ak_file_add": (_i64, (_int, _address, _int)),
    "ak_file_find": (_i64, (_i64,)),
    "ak_file_close": (_int, (_i64,)),
    "ak_file_map": (_i64, (_int, _u64, _u64)),
    "ak_file_dead": (_u64, ()),
    "ak_file_free": (None, (_u64,)),
    # host memory
    "ak_host_init": (_int, ()),
    "ak_python_signals": (None, (_pointer,)),
    "ak_self_test": (ctypes.c_char_p, ()),
    # for tests
    "ak_fail_allocation": (None, (_u32,)),
    "ak_fail_engine_allocation": (None, (_u32,)),
    "ak_ticker_tune": (None, (_u32, _u32)),
    "ak_set_file_size": (_int, (_int, _u64)),
    "ak_copy_in": (_int, (_pointer, _address, _u64)),
    "ak_copy_out": (_int, (_address, _pointer, _u64)),
    # vCPU
    "ak_vcpu_create": (_int, (_address, _u32, _address, ctypes.POINTER(_address))),
    "ak_ticker_start": (_int, ()),
    "ak_vcpu_destroy": (None, (_address,)),
    "ak_vcpu_configure": (None, (_address, _u32, _u32, _u32, _u32)),
    "ak_dirty_ring_setup": (None, (_address, _address, _u32)),
    "ak_vcpu_ioctl": (_int, (_address, _u32, _pointer)),
}

_loaded: ctypes.CDLL | None = None
_loading: Final = threading.Lock()  # taken on workers only: see anykvm.host.atomic


def library() -> ctypes.CDLL:
    """Load the engine, once, and declare its functions.

    Raises ImportError when it is not there, does not load or fails its self-test; OSError when its signal handlers
    cannot be installed.
    """
    return _loaded if _loaded is not None else atomically_or_here(_load_once)


def _load_once() -> ctypes.CDLL:
    global _loaded
    with _loading:
        if _loaded is None:
            _loaded = load(PATH)
    return _loaded


def load(path: str) -> ctypes.CDLL:
    """Load the engine from a path; ``library`` is for everything but tests. Raises as ``library``."""
    if not os.path.exists(path):
        raise ImportError(f"anykvm was installed without its engine: {path} does not exist (the build makes it)")
    try:
        loaded = ctypes.CDLL(path)
        check_layout(Layout(loaded))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError, ImportError) as error:
        raise ImportError(f"anykvm's engine does not fit this installation: {path}: {error}") from error
    loaded.ak_python_signals(upcall.python_signals_address())
    install_handlers(loaded)
    wrong = loaded.ak_self_test()
    if wrong:
        raise ImportError(f"anykvm's engine fails its self-test: {wrong.decode()} ({path})")
    return loaded


def check_layout(layout: Layout) -> None:
    """Compare the library with what Python knows of it. Raises ImportError, which names the first difference."""
    layout.check_structure("ak_slot", AkSlot)
    check_sizes(layout, STRUCTURES)
    layout.check_size("ak_pre_fault_memory", s.kvm_pre_fault_memory)
    layout.check_values(mirrored(vars(values)))
    layout.check_signatures(SIGNATURES)


def install_handlers(loaded: ctypes.CDLL) -> None:
    """Make the engine's SIGSEGV and SIGBUS handlers the first in line, in case somebody replaced them.

    Raises OSError with sigaction(2)'s errno.
    """
    result: int = loaded.ak_host_init()
    if result:
        raise OSError(-result, f"installing the engine's signal handlers: {os.strerror(-result)}")
