"""Reading several fields of a structure in one call, at the offsets the structure itself has."""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import Any

_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def field(structure: type[ctypes.Structure], path: str) -> tuple[int, int]:
    """Give offset and size in bytes of a field, of a member's field (``"io.port"``), or of a whole member.

    Raises AttributeError for a name the structure does not have.

    >>> from anykvm.abi.structures import kvm_run
    >>> field(kvm_run, "exit_reason"), field(kvm_run, "memory_fault.gpa")
    ((8, 4), (40, 8))
    """
    offset = 0
    kind: Any = structure
    for name in path.split("."):
        descriptor = getattr(kind, name)
        offset += descriptor.offset
        size: int = descriptor.size
        kind = _type_of(kind, name)
    return offset, size


def _type_of(kind: Any, name: str) -> Any:
    """Find a member's type, also through anonymous members."""
    fields: dict[str, Any] = {entry[0]: entry[1] for entry in kind._fields_}
    if name in fields:
        return fields[name]
    for anonymous in getattr(kind, "_anonymous_", ()):
        try:
            return _type_of(fields[anonymous], name)
        except AttributeError:
            continue
    raise AttributeError(name)


def reader(structure: type[ctypes.Structure], *paths: str) -> Struct:
    """Make a Struct that unpacks these fields from the start of the structure, in the order they lie in memory.

    Each path is as for ``field``; an array of integers gives one value an element, an array of bytes one ``bytes``.
    Raises ValueError when the paths are not in memory order.

    >>> from anykvm.abi.structures import kvm_run
    >>> reader(kvm_run, "exit_reason", "memory_fault.flags", "memory_fault.gpa").format
    '<8xI20xQQ'
    """
    text, at = "<", 0
    for path in paths:
        offset, size = field(structure, path)
        if offset < at:
            raise ValueError(f"{path} lies before the field named in front of it")
        text += f"{offset - at}x" if offset > at else ""
        text += _format(structure, path, size)
        at = offset + size
    return Struct(text)


def _format(structure: type[ctypes.Structure], path: str, size: int) -> str:
    kind: Any = structure
    for name in path.split("."):
        kind = _type_of(kind, name)
    length = getattr(kind, "_length_", None)
    if length is None:
        return _FORMATS[size]
    item = ctypes.sizeof(kind._type_)
    return f"{size}s" if item == 1 else f"{length}{_FORMATS[item]}"


def span(structure: type[ctypes.Structure], path: str) -> slice:
    """Give a field's bytes as a slice; ``path`` as for ``field``.

    >>> from anykvm.abi.structures import kvm_run
    >>> span(kvm_run, "hypercall.ret")
    slice(88, 96, None)
    """
    offset, size = field(structure, path)
    return slice(offset, offset + size)
