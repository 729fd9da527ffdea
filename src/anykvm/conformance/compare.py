"""Compare records of a scenario with those of a golden file, step by step and field by field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from anykvm.conformance.golden_file import Record
from anykvm.conformance.ignored import ignored, is_descriptor

Key: TypeAlias = tuple[str, int]
"""A step's name, and which of the steps of that name it is."""
MISSING: Final = "<missing>"
"""Stands for a step or field that is not there."""
_DELIVERY: Final = 3  # KVM_INTERNAL_ERROR_DELIVERY_EV
_DELIVERY_GPA: Final = 3
_INSTRUCTION_BYTES: Final = 1
_EMULATION_WORDS: Final = 2  # instruction size and bytes: two 64-bit words behind the flags word


class Difference(NamedTuple):
    """A field in which a record is not the golden one; ``field`` is empty for a whole step."""

    scenario: str
    step: str
    field: str
    expected: object
    got: object

    def __str__(self) -> str:
        """Say it in a line."""
        where = f"{self.scenario}.{self.step}" + (f".{self.field}" if self.field else "")
        return f"{where}: expected {self.expected}, got {self.got}"


def compare_scenario(
    name: str, expected: Iterable[Record], got: Iterable[Record], without: Collection[tuple[str, str]] = ()
) -> list[Difference]:
    """Compare a scenario's records with the golden ones; returns the differences, [] if there is none.

    ``without`` leaves out (step, field) pairs; field ``*`` leaves out a step, wherever it is and whether it is there.
    ``step#2`` is the second step of that name.

    >>> golden, mine = {"n": "x", "s": "read", "ret": 0, "rax": "0x1"}, {"n": "x", "s": "read", "ret": 0, "rax": "0x2"}
    >>> [str(difference) for difference in compare_scenario("x", [golden], [mine])]
    ['x.read.rax: expected 0x1, got 0x2']
    >>> compare_scenario("x", [golden], [mine], without=[("read", "rax")])
    []
    """
    left_out = set(without)
    wanted, found = _steps(expected, left_out), _steps(got, left_out)
    differences: list[Difference] = []
    for key, record in wanted.items():
        if key not in found:
            differences.append(Difference(name, _label(key), "", "the step", MISSING))
            continue
        differences += _fields(name, key, record, found[key], left_out)
    differences += [
        Difference(name, _label(key), "", MISSING, _short(record)) for key, record in found.items() if key not in wanted
    ]
    order = [key for key in found if key in wanted]
    if not differences and order != list(wanted):
        differences.append(Difference(name, "", "", [_label(key) for key in wanted], [_label(key) for key in order]))
    return differences


def labelled(records: Iterable[Record]) -> dict[str, Record]:
    """Give a scenario's records by the names that differences have for them: ``read``, ``read#2`` for the second.

    >>> list(labelled([{"n": "x", "s": "read"}, {"n": "x", "s": "read"}]))
    ['read', 'read#2']
    """
    return {_label(key): record for key, record in _steps(records, set()).items()}


def _steps(records: Iterable[Record], left_out: set[tuple[str, str]]) -> dict[Key, Record]:
    seen: Counter[str] = Counter()
    steps: dict[Key, Record] = {}
    for record in records:
        step = record["s"]
        seen[step] += 1
        key = (step, seen[step])
        if not _left_out(key, "*", left_out):
            steps[key] = record
    return steps


def _fields(name: str, key: Key, expected: Record, got: Record, left_out: set[tuple[str, str]]) -> list[Difference]:
    step = key[0]
    mine, theirs = _flat(_without_vendor(got)), _flat(_without_vendor(expected))
    differences: list[Difference] = []
    for field in theirs | mine:
        if ignored(name, step, field) or _left_out(key, field, left_out):
            continue
        want, have = theirs.get(field, MISSING), mine.get(field, MISSING)
        if is_descriptor(name, step, field) and isinstance(want, int) and isinstance(have, int):
            want, have = want >= 0, have >= 0
        if want != have:
            differences.append(Difference(name, _label(key), field, want, have))
    return differences


def _left_out(key: Key, field: str, left_out: set[tuple[str, str]]) -> bool:
    return (key[0], field) in left_out or (f"{key[0]}#{key[1]}", field) in left_out


def _flat(record: Record) -> dict[str, Any]:
    """Name fields inside fields with a dot; lists stay whole."""
    flat: dict[str, Any] = {}
    for field, value in record.items():
        if isinstance(value, dict):
            flat.update({f"{field}.{inner}": part for inner, part in value.items()})
        else:
            flat[field] = value
    return flat


def _without_vendor(record: Record) -> Record:
    """Leave out of an internal error the processor's own description of its exit, which is SVM's or VMX's, not KVM's.

    Of an emulation failure that is what comes after its flags and instruction bytes (prepare_emulation_failure_exit());
    of a failed delivery all but the address of what could not be reached (kvm_prepare_event_vectoring_exit()).
    """
    internal = record.get("internal")
    if not internal or not internal["data"]:
        return record
    if internal["suberror"] == _DELIVERY:
        address = internal["data"][_DELIVERY_GPA : _DELIVERY_GPA + 1]
        return {**record, "internal": {**internal, "data": address}, "union24": record["union24"][:8]}
    words = 1 + (_EMULATION_WORDS if int(internal["data"][0], 16) & _INSTRUCTION_BYTES else 0)
    vendor_free = {**internal, "data": internal["data"][:words], "ndata": f"at least {words}"}
    if internal["ndata"] < words:
        vendor_free["ndata"] = internal["ndata"]
    # union24 is suberror, ndata, the flags word and half an instruction word.
    shown = record["union24"][:8] + record["union24"][16 : 16 + 16 * min(words, 2)]
    return {**record, "internal": vendor_free, "union24": shown}


def _label(key: Key) -> str:
    step, occurrence = key
    return step if occurrence == 1 else f"{step}#{occurrence}"


def _short(record: Record) -> str:
    return " ".join(f"{field}={value}" for field, value in record.items() if field not in ("n", "s", "errname"))
