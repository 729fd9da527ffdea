"""Fields of KVM's structures by path, such as ``cs.base`` or ``db.0``: to change some, and to tell what changed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

from anykvm.abi.structures import kvm_vcpu_events


def fields(structure: ctypes.Structure) -> dict[str, int | str]:
    """Give every field that is not zero, numbers as they are and bytes in hex.

    >>> from anykvm.abi.structures import kvm_debugregs
    >>> debug = kvm_debugregs(dr6=0x10); debug.db[1] = 5
    >>> fields(debug)
    {'db.1': 5, 'dr6': 16}
    """
    found = {path: value for path, value in _walk("", structure) if value}
    if isinstance(structure, kvm_vcpu_events) and not (structure.exception.injected or structure.exception.pending):
        # Which exception there was before stays in the kernel's fields; those of the processor are not among them.
        found = {path: value for path, value in found.items() if not path.startswith("exception")}
    if isinstance(structure, kvm_vcpu_events) and not structure.interrupt.injected:
        found.pop("interrupt.nr", None)
    return found


def _walk(path: str, value: Any) -> Iterator[tuple[str, int | str]]:
    if isinstance(value, ctypes.Structure):
        for name, *_ in value._fields_:
            if not name.startswith(("pad", "reserved")):
                yield from _walk(f"{path}.{name}" if path else name, getattr(value, name))
    elif isinstance(value, ctypes.Array):
        if getattr(value, "_type_", None) is ctypes.c_uint8:
            yield path, bytes(value).rstrip(b"\0").hex()
        else:
            for index, part in enumerate(value):
                yield from _walk(f"{path}.{index}", part)
    else:
        yield path, value


def change(structure: Any, changes: Iterable[tuple[str, int]]) -> None:
    """Set fields by path; a number too large for its field loses its upper bits."""
    for path, value in changes:
        *parents, last = path.split(".")
        target = structure
        for name in parents:
            target = target[int(name)] if name.isdigit() else getattr(target, name)
        if last.isdigit():
            target[int(last)] = value
        else:
            setattr(target, last, value)


def changed(before: dict[str, int | str], after: dict[str, int | str]) -> dict[str, str]:
    """Say which fields are different, and what they are now."""
    paths = [*after, *(path for path in before if path not in after)]
    return {path: _text(after.get(path, 0)) for path in paths if before.get(path, 0) != after.get(path, 0)}


def _text(value: int | str) -> str:
    return value if isinstance(value, str) else hex(value)
