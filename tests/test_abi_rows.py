"""``docs/abi_rows.toml``: every row of ABI.md's tables has claims that the records bear out, or a reason for none."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from anykvm.conformance import golden, load
from anykvm.conformance.compare import labelled
from anykvm.conformance.golden_file import Record
from anykvm.conformance.outcome import errno_name
from anykvm.conformance.records_of import kernel_names, kernel_records

DOCS: Final = Path(__file__).parent.parent / "docs"
Claim = dict[str, Any]
ROWS: Final[dict[str, dict[str, list[str | Claim] | str]]] = tomllib.loads((DOCS / "abi_rows.toml").read_text())
NUMBERED: Final = ("1", "4.1")
BY_NAME: Final = ("1.3", "2.1", "2.3", "3.2", "3.3")
CLAIMED: Final = (
    *NUMBERED,
    *BY_NAME,
    "1.1",
    "1.2",
    "1.4",
    "2.2",
    "2.5",
    "3.4",
    "4.2",
    "4.3",
    "4.4",
    "4.5",
    "4.6",
    "4.7",
)
"""The sections in which a row that has no reason must have a claim, but for rows that only gather scenarios."""
GATHERED: Final = {("4.1", "guest and host ranges at the top")}
RECORDS: Final = {name: kernel_records(name).scenarios for name in kernel_names()} | {
    "linux-7.3-npt": golden("linux-7.3-npt")
}


def first_cells(section: str) -> list[str]:
    """The first cells of a section's table, without its head."""
    text = (DOCS / "ABI.md").read_text()
    found = re.search(rf"^#+ {re.escape(section)}\.? .*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, section
    rows = [line for line in found.group().splitlines() if line.startswith("|")]
    cells = [row.split("|")[1].strip() for row in rows[2:]]
    return [cell for cell in cells if cell != "–"]  # a remark between rows


def named(given: list[str | Claim]) -> list[str]:
    return [entry if isinstance(entry, str) else entry["scenario"] for entry in given]


def claims() -> Iterator[tuple[str, str, Claim]]:
    for section, rows in ROWS.items():
        for row, given in rows.items():
            if isinstance(given, list):
                yield from ((section, row, entry) for entry in given if isinstance(entry, dict))


@pytest.mark.parametrize("section", NUMBERED + BY_NAME)
def test_every_row_is_there(section: str) -> None:
    wanted = first_cells(section)
    assert len(wanted) > 5
    assert not [row for row in wanted if row not in ROWS[section]]


def test_the_tables_of_numbers_are_whole() -> None:
    assert first_cells("1") == [str(number) for number in range(1, 34)]
    assert first_cells("4.1") == [str(number) for number in range(1, 23)]


def test_what_is_named_exists() -> None:
    for section, rows in ROWS.items():
        for row, given in rows.items():
            if isinstance(given, str):
                assert len(given) > 10, (section, row)  # a reason
            else:
                assert given and not set(named(given)) - load().keys(), (section, row)


@pytest.mark.parametrize("section", CLAIMED)
def test_every_row_without_a_reason_has_a_claim(section: str) -> None:
    bare = [row for row, given in ROWS[section].items() if not any(isinstance(entry, dict) for entry in given)]
    bare = [row for row in bare if not isinstance(ROWS[section][row], str)]
    assert {(section, row) for row in bare} <= GATHERED


def test_every_scenario_is_named() -> None:
    found = {
        name for rows in ROWS.values() for given in rows.values() if isinstance(given, list) for name in named(given)
    }
    assert sorted(load().keys() - found) == []


def test_there_are_as_many_as_promised() -> None:
    assert len(load()) >= 150


# -- claims ------------------------------------------------------------------------------------------------------------


def field(record: Record, name: str) -> object:
    """A claim's word for a record's field, and its value there; a dictionary is given as it is."""
    if name == "errno":
        return errno_name(record["errno"])
    return record["er" if name == "exit" else name]


def holds(record: Record, claim: Claim) -> bool:
    for name, wanted in claim.items():
        if name in ("scenario", "step", "of"):
            continue
        got = field(record, name)
        if isinstance(wanted, dict):  # mmio.w = 1: these of its parts
            assert isinstance(got, dict), (name, got)
            got = {part: got[part] for part in wanted}
        if got != wanted:
            return False
    return True


def test_a_claim_says_something_and_has_no_twin_in_its_row() -> None:
    seen: set[str] = set()
    for section, row, claim in claims():
        assert len(claim) > 2 + ("of" in claim), claim
        text = f"{section} {row} {claim}"
        assert text not in seen
        seen.add(text)


@pytest.mark.parametrize("name", RECORDS)
def test_claims_are_true(name: str) -> None:
    checked = 0
    for section, row, claim in claims():
        if name not in claim.get("of", kernel_names()):
            continue
        record = labelled(RECORDS[name][claim["scenario"]])[claim["step"]]
        assert holds(record, claim), (section, row, claim, record)
        checked += 1
    assert checked > 5


def test_a_claim_that_is_not_true_is_found() -> None:
    record = {"n": "x", "s": "read", "ret": -1, "errno": 14, "er": "UNKNOWN", "mmio": {"w": 1, "len": 8}}
    assert holds(record, {"scenario": "x", "step": "read", "errno": "EFAULT", "exit": "UNKNOWN", "mmio": {"w": 1}})
    assert not holds(record, {"scenario": "x", "step": "read", "errno": "EINVAL"})
    assert not holds(record, {"scenario": "x", "step": "read", "mmio": {"w": 0}})
