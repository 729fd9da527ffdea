"""``docs/abi_rows.toml``: every row of ABI.md's tables has a scenario or a reason, and every scenario has a row."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

import pytest

from anykvm.conformance import load

DOCS: Final = Path(__file__).parent.parent / "docs"
ROWS: Final[dict[str, dict[str, list[str] | str]]] = tomllib.loads((DOCS / "abi_rows.toml").read_text())
NUMBERED: Final = ("1", "4.1")
BY_NAME: Final = ("1.3", "2.1", "2.3", "3.2", "3.3")


def first_cells(section: str) -> list[str]:
    """The first cells of a section's table, without its head."""
    text = (DOCS / "ABI.md").read_text()
    found = re.search(rf"^#+ {re.escape(section)}\.? .*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, section
    rows = [line for line in found.group().splitlines() if line.startswith("|")]
    cells = [row.split("|")[1].strip() for row in rows[2:]]
    return [cell for cell in cells if cell != "–"]  # a remark between rows


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
                assert given and not set(given) - load().keys(), (section, row)


def test_every_scenario_is_named() -> None:
    named = {name for rows in ROWS.values() for given in rows.values() if isinstance(given, list) for name in given}
    assert sorted(load().keys() - named) == []


def test_there_are_as_many_as_promised() -> None:
    assert len(load()) >= 150
