"""Records of many sequences in a small file: what the kernel did, for comparing without the kernel.

Lines of JSON, compressed: the first says of which kernel and when, each other is a sequence, whose records are written
as what is different from the record before.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from anykvm.conformance.golden_file import Record
from anykvm.conformance.sequences.batch import Batch

_SUFFIX: Final = ".jsonl.xz"
_SHOWN_BY_PAYLOAD: Final = ("mmio", "io")


def slim(record: Record) -> Record:
    """Leave out of a record what another of its fields says: names of numbers, bytes of a union that is decoded.

    >>> slim({"n": "random_1", "s": "2.run.0", "exit_reason": 5, "er": "HLT", "errname": "0", "union24": "aa"})
    {'s': '2.run.0', 'er': 'HLT', 'union24': 'aa'}
    """
    left_out = {"n", "errname", "exit_reason"}
    if any(payload in record for payload in _SHOWN_BY_PAYLOAD):
        left_out.add("union24")
    return {field: value for field, value in record.items() if field not in left_out}


def archived(batch: Batch) -> bytes:
    """Give the content of a file."""
    lines = [json.dumps(batch.about)]
    for seed, records in sorted(batch.sequences.items()):
        lines.append(json.dumps([seed, _changes(records)], separators=(",", ":")))
    return lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def read_archive(data: bytes) -> Batch:
    """Read what ``archived`` gave. Raises ValueError, lzma.LZMAError for what is none."""
    first, *others = lzma.decompress(data).decode().split("\n")
    return Batch(json.loads(first), {seed: _records(changes) for seed, changes in map(json.loads, others)})


def kernel_archive(name: str) -> Batch:
    """Read this package's file of a kernel, such as ``linux-7.3``. Raises FileNotFoundError for an unknown name."""
    return read_archive((resources.files("anykvm.conformance") / "records" / f"random-{name}{_SUFFIX}").read_bytes())


def _changes(records: list[Record]) -> list[list[Any]]:
    told: list[list[Any]] = []
    before: Record = {}
    for record in records:
        new = {field: value for field, value in record.items() if field not in before or before[field] != value}
        gone = [field for field in before if field not in record]
        told.append([new, gone] if gone else [new])
        before = record
    return told


def _records(changes: list[list[Any]]) -> list[Record]:
    records: list[Record] = []
    now: Mapping[str, Any] = {}
    for new, *gone in changes:
        now = {field: value for field, value in {**now, **new}.items() if not gone or field not in gone[0]}
        records.append(dict(now))
    return records
