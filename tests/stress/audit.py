"""The end: everybody has stopped, and memory must be as the board says."""

from __future__ import annotations

import struct

from stress import board as b
from stress.area import Area


def check(areas: list[Area]) -> int:
    """Compare every word of every channel; returns how many. AssertionError names the first that is wrong."""
    return sum(check_page(area, page) for area in areas for page in range(b.PAGES))


def check_page(area: Area, page: int) -> int:
    """One page."""
    data = area.read(page)
    count = 0
    for channel, offsets in b.words(page).items():
        if channel in (b.HEAD, b.TAIL) and "write_across" not in area.operations:
            continue
        latest, purged, floor, loss = area.board.channel(area.first + page, channel)
        kept = floor if loss == area.board.loss(area.first + page) else 0
        for offset in offsets:
            (value,) = struct.unpack_from("<I", data, offset)
            if not kept <= value <= latest or (value and value <= purged):
                raise AssertionError(
                    f"{area.name}, page {page}, channel {channel}: {value} at {offset:#x};"
                    f" latest {latest}, purged {purged}, floor {kept}"
                )
            count += 1
    return count
