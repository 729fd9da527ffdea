"""C and Python describe the same structures, values and functions. Here they are compared, before anything is called.

The C side is ``layout.c``, a table of rows made by the compiler from the declarations themselves. The Python sides are
``AkSlot`` and the signatures in ``library.py``, ``values.py``, and ``native.py``. A structure that is smaller in Python
than in C would be read beyond its end; a value that differs would be another exit: so a difference ends the import.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

Signature = tuple[Any, tuple[Any, ...]]
"""Result and arguments of a function, as ctypes has them."""

_SCALARS: Final[dict[str, Any]] = {
    "void": None,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "const char *": ctypes.c_char_p,
}
_ADDRESS_SIZE: Final = ctypes.sizeof(ctypes.c_void_p)


class Row(NamedTuple):
    """What C says of one name."""

    value: int
    """Of a structure its size, of a field its offset."""
    size: int
    """Of a field."""


class Layout:
    """The rows of one library's ``layout.c``."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        """Read them. Raises AttributeError for a library that has none."""
        name, value, size = loaded.ak_layout_name, loaded.ak_layout_value, loaded.ak_layout_size
        name.restype, value.restype, size.restype = ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64
        self.rows: dict[str, Row] = {}
        self.functions: dict[str, str] = {}
        """Types of functions as C writes them, ``int ak_poison(struct ak_vm *, u64, bool)``, by name."""
        index = 0
        while (text := name(index)) is not None:
            row = text.decode()
            if "(" in row:
                self.functions[row.partition("(")[0].split()[-1].lstrip("*")] = row
            else:
                self.rows[row] = Row(value(index), size(index))
            index += 1

    def check_structure(self, name: str, mirror: type[ctypes.Structure], *, head: bool = False) -> None:
        """Compare a structure with its mirror; ``head``: the mirror has its first fields alone.

        Raises ImportError, which names the field and both sides.
        """
        fields: dict[str, Any] = {field[0]: getattr(mirror, field[0]) for field in mirror._fields_}
        prefix = f"struct {name}."
        known = {row.removeprefix(prefix): found for row, found in self.rows.items() if row.startswith(prefix)}
        for field in fields.keys() | known.keys():
            ours = Row(fields[field].offset, fields[field].size) if field in fields else None
            if ours != known.get(field):
                there = _place(known.get(field))
                raise ImportError(f"struct {name}: {field} is {there} in C, {_place(ours)} in Python")
        if not head:
            self.check_size(name, mirror)

    def check_size(self, name: str, mirror: type[ctypes.Structure]) -> None:
        """Compare the size of a structure with its mirror's. Raises ImportError."""
        size = self.rows.get(f"struct {name}")
        if size is None or size.value != ctypes.sizeof(mirror):
            there = f"{size.value} bytes" if size else "unknown"
            raise ImportError(f"struct {name} is {there} in C, {ctypes.sizeof(mirror)} bytes in Python")

    def check_values(self, values: Mapping[str, int]) -> None:
        """Compare values by name. Raises ImportError."""
        for name, value in values.items():
            row = self.rows.get(name)
            if row is None or row.value != value:
                raise ImportError(f"{name} is {row.value if row else 'unknown'} in C, {value} in Python")

    def check_signatures(self, signatures: Mapping[str, Signature]) -> None:
        """Compare functions: the number of arguments, and the width and signedness of each and of the result.

        Raises ImportError.
        """
        for name, (result, arguments) in signatures.items():
            text = self.functions.get(name)
            if text is None:
                raise ImportError(f"{name} is in library.py, and not in exports.h")
            result_type, argument_types = types_of(text)
            if len(argument_types) != len(arguments):
                raise ImportError(f"{text}: {len(arguments)} arguments in Python")
            pairs = [(result_type, result), *zip(argument_types, arguments, strict=True)]
            for index, (theirs, ours) in enumerate(pairs):
                if not _same(theirs, ours):
                    what = f"argument {index}" if index else "the result"
                    raise ImportError(f"{text}: {what} is {getattr(ours, '__name__', 'nothing')} in Python")

    def signature(self, name: str) -> Signature:
        """Make ctypes types of a function from what C says: pointers are plain addresses. Raises AttributeError."""
        text = self.functions.get(name)
        if text is None:
            raise AttributeError(f"{name} is not in exports.h")
        result, arguments = types_of(text)
        return _ctype(result), tuple(_ctype(argument) for argument in arguments)


def types_of(text: str) -> tuple[str, list[str]]:
    """Take a function's type apart.

    >>> types_of("struct ak_vm * ak_f(const u64 *, bool)")
    ('struct ak_vm *', ['const u64 *', 'bool'])
    >>> types_of("void ak_g(void)")
    ('void', [])
    """
    head, _, tail = text.partition("(")
    result = head.rpartition(" ")[0].strip()
    arguments = [argument.strip() for argument in tail.removesuffix(")").split(",")]
    return result, [] if arguments == ["void"] else arguments


def _ctype(type: str) -> Any:
    if type in _SCALARS:
        return _SCALARS[type]
    if _is_address(type):
        return ctypes.c_void_p
    raise ImportError(f"exports.h: {type} has no ctypes type here (layout.py)")


def _is_address(type: str) -> bool:
    return type.endswith(("*", "]"))


def _same(theirs: str, ours: Any) -> bool:
    """An address may be any type of its width but a signed one; everything else is what it is."""
    if _is_address(theirs) and theirs not in _SCALARS:
        return ours is not None and ctypes.sizeof(ours) == _ADDRESS_SIZE and ours is not ctypes.c_int64
    expected = _ctype(theirs)
    if expected is None or ours is None:
        return expected is ours
    return bool(expected._type_ == ours._type_)


def _place(row: Row | None) -> str:
    return f"{row.size} bytes at {row.value}" if row else "not there"


def mirrored(module: Mapping[str, object]) -> dict[str, int]:
    """Find the values of a module that are C's: those that are named AK_*."""
    return {name: value for name, value in module.items() if name.startswith("AK_") and isinstance(value, int)}


def check_sizes(layout: Layout, structures: Iterable[type[ctypes.Structure]]) -> None:
    """Compare the sizes of the kernel's structures, which are named alike. Raises ImportError."""
    for structure in structures:
        layout.check_size(structure.__name__, structure)
