"""Ranges of an object's bytes and pages, and what is checked of one before anything is done to it."""

from __future__ import annotations

from typing import Final

PAGE_SIZE: Final = 4096


def check_size(size: int) -> None:
    """Raise ValueError for a size, in bytes, that is 0 or less, or not page aligned.

    >>> check_size(100)
    Traceback (most recent call last):
    ...
    ValueError: size 0x64 is not a positive multiple of the page size
    """
    if size <= 0 or size % PAGE_SIZE:
        raise ValueError(f"size {size:#x} is not a positive multiple of the page size")


def check_bytes(offset: int, length: int, size: int) -> None:
    """Raise IndexError for a range that is not within ``size`` bytes; an empty one may be at their end.

    >>> check_bytes(4090, 8, 4096)
    Traceback (most recent call last):
    ...
    IndexError: [0xffa, 0x1002) is outside of 0x1000 bytes
    """
    if offset < 0 or length < 0 or offset + length > size:
        raise IndexError(f"[{offset:#x}, {offset + length:#x}) is outside of {size:#x} bytes")


def check_pages(offset: int, length: int, size: int, *, empty: bool = True) -> None:
    """Raise as ``check_bytes``, and ValueError for a range that is not of whole pages, or is ``empty`` and must not be.

    >>> check_pages(0, 4096, 4096)
    >>> check_pages(0, 100, 4096)
    Traceback (most recent call last):
    ...
    ValueError: [0x0, 0x64) is not a range of whole pages
    """
    check_bytes(offset, length, size)
    if offset % PAGE_SIZE or length % PAGE_SIZE or not (length or empty):
        raise ValueError(f"[{offset:#x}, {offset + length:#x}) is not a range of whole pages")
