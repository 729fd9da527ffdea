"""Steps that change the host's side: its mappings, its files, its memory. What is recorded is their errno."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from anykvm.conformance.host import PAGE, fallocate, move
from anykvm.conformance.outcome import attempt
from anykvm.conformance.sequences.world import FREE, PAGE_TABLE, World
from anykvm.host import libc


def _unmap(w: World, buffer: int, page: int, count: int) -> None:
    _record(w, lambda: w.buffers[buffer].unmap(page * PAGE, count * PAGE))


def _protect(w: World, buffer: int, page: int, count: int, prot: int) -> None:
    _record(w, lambda: w.buffers[buffer].protect(prot, page * PAGE, count * PAGE))


def _fresh(w: World, buffer: int, page: int, count: int) -> None:
    _record(w, lambda: w.buffers[buffer].fix(page * PAGE, count * PAGE))


def _map_file(w: World, buffer: int, page: int, count: int, prot: int) -> None:
    _record(w, lambda: w.buffers[buffer].map_file(w.file, page * PAGE, count * PAGE, prot))


def _truncate(w: World, pages: int) -> None:
    _record(w, lambda: os.ftruncate(w.file, pages * PAGE))


def _discard(w: World, buffer: int, page: int, count: int) -> None:
    _record(w, lambda: w.buffers[buffer].advise(libc.MADV_DONTNEED, page * PAGE, count * PAGE))


def _move(w: World, buffer: int, page: int, count: int, to: int, to_page: int) -> None:
    _record(w, lambda: move(w.address(buffer, page), w.address(to, to_page), count * PAGE))


def _put(w: World, buffer: int, offset: int, value: int) -> None:
    _record(w, lambda: w.buffers[buffer].put64(offset, value))


def _put_guest(w: World, offset: int, data: str) -> None:
    """Write into slot 0's free memory."""
    w.m.memory.put(FREE + offset, bytes.fromhex(data))


def _page_table_entry(w: World, page: int, entry: int) -> None:
    """Change the entry of a page of the 2 MiB around ``layout.TEST``; the guest has to reload CR3 to be sure of it."""
    w.m.memory.put64(PAGE_TABLE + 8 * page, entry)


def _gmem_close(w: World, gmem: int) -> None:
    _record(w, lambda: w.close_gmem(gmem))


def _gmem_allocate(w: World, gmem: int, mode: int, page: int, count: int) -> None:
    _record(w, lambda: fallocate(w.gmem(gmem), mode, page * PAGE, count * PAGE))


def _gmem_map(w: World, gmem: int, buffer: int, page: int, count: int) -> None:
    _record(w, lambda: w.buffers[buffer].map_file(w.gmem(gmem), page * PAGE, count * PAGE))


def _memory(w: World) -> None:
    w.note(**w.memory())


def _record(w: World, call: Callable[[], int | None]) -> None:
    w.note(e=attempt(call).errno)


OPS: Final[dict[str, Callable[..., Any]]] = {
    "unmap": _unmap,
    "protect": _protect,
    "fresh": _fresh,
    "map_file": _map_file,
    "truncate": _truncate,
    "discard": _discard,
    "move": _move,
    "put": _put,
    "put_guest": _put_guest,
    "page_table_entry": _page_table_entry,
    "gmem_close": _gmem_close,
    "gmem_allocate": _gmem_allocate,
    "gmem_map": _gmem_map,
    "memory": _memory,
}
"""Step -> what does it."""
