"""Guest programs: flat 64-bit binaries, each beside its assembler source, which says what it wants in its registers."""

from __future__ import annotations

from importlib.resources import files


def guest(name: str) -> bytes:
    """Give the bytes of a guest program. Raises FileNotFoundError for a name there is none of.

    >>> len(guest("crc32")) < 4096
    True
    """
    return (files(__name__) / f"{name}.bin").read_bytes()
