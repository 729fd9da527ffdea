"""The engine's C interface (``engine.h``, ``ioctl.c``) as typed ctypes functions.

Every call releases the GIL. Addresses of engine objects are plain integers here; only what crosses the border by value
is mirrored as a structure.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Final

PATH: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libanykvm_engine.so")
"""Where the build puts the library."""


class AkSlot(ctypes.Structure):
    """``struct ak_slot``: a memslot as the engine sees it."""

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
    ]


_address = ctypes.c_uint64
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64
_int = ctypes.c_int
_pointer = ctypes.c_void_p

DEVICE_FAULT: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
"""The fault handler of device mappings: host address of the page and access, to ``enum ak_device_answer``."""

REFUSAL_HOOK: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
"""Asked in front of a page's look-up: ``enum ak_lookup``, vCPU id, gpa, access; see refusal.c."""

_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
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
    "ak_gmem_held": (ctypes.c_bool, (_address,)),
    "ak_gmem_fd": (_int, (_address,)),
    "ak_gmem_inject": (_int, (_address, _address, _u64, _int)),
    "ak_pre_fault_memory": (_int, (_address, ctypes.POINTER(_u64))),
    "ak_device_add": (_int, (_address, _u64)),
    "ak_device_remove": (None, (_address,)),
    "ak_device_handler": (None, (DEVICE_FAULT,)),
    "ak_vm_refusal_hook": (None, (_address, _pointer)),
    # host memory
    "ak_host_init": (_int, ()),
    "ak_self_test": (ctypes.c_char_p, ()),
    "ak_copy_in": (_int, (_pointer, _address, _u64)),
    "ak_copy_out": (_int, (_address, _pointer, _u64)),
    # vCPU
    "ak_vcpu_create": (_address, (_address, _u32, _address)),
    "ak_vcpu_destroy": (None, (_address,)),
    "ak_vcpu_configure": (None, (_address, _u32, _u32, _u32)),
    "ak_dirty_ring_setup": (None, (_address, _address, _u32)),
    "ak_vcpu_ioctl": (_int, (_address, _u32, _pointer)),
}

_loaded: ctypes.CDLL | None = None
_loading: Final = threading.Lock()


def library() -> ctypes.CDLL:
    """Load the engine, once, and declare its functions.

    Raises ImportError when it is not there, does not load or fails its self-test; OSError when its signal handlers
    cannot be installed.
    """
    global _loaded
    if _loaded is None:
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
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        raise ImportError(f"anykvm's engine does not fit this installation: {path}: {error}") from error
    install_handlers(loaded)
    wrong = loaded.ak_self_test()
    if wrong:
        raise ImportError(f"anykvm's engine fails its self-test: {wrong.decode()} ({path})")
    return loaded


def install_handlers(loaded: ctypes.CDLL) -> None:
    """Make the engine's SIGSEGV and SIGBUS handlers the first in line, in case somebody replaced them.

    Raises OSError with sigaction(2)'s errno.
    """
    result: int = loaded.ak_host_init()
    if result:
        raise OSError(-result, f"installing the engine's signal handlers: {os.strerror(-result)}")
