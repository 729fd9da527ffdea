"""The soft backend against what a real Linux 7.3 did: ``golden_scope.toml`` says which scenarios, and must be true."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from anykvm.conformance import Difference, compare_scenario, golden, load
from anykvm.conformance.golden_file import Record
from vmm_helpers import record_on_soft

PROFILE: Final = "linux-7.3"
GOLDEN: Final = golden("linux-7.3-npt")
SCOPE: Final[dict[str, dict[str, Any]]] = tomllib.loads(Path(__file__).with_name("golden_scope.toml").read_text())
COMPARED: Final = [name for name, entry in SCOPE.items() if entry["status"] == "compared"]
NOT_YET: Final = [name for name, entry in SCOPE.items() if entry["status"] == "not yet"]
EXCEPTIONS: Final = [
    (name, step, field)
    for name in COMPARED
    for part in SCOPE[name].get("except", ())
    for step in part["steps"]
    for field in part.get("fields", ("*",))
]
SECONDS: Final = 8
"""What a scenario may take at most here; one that is not implemented may hang."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Run every golden scenario that does not change the machine, in a process of its own, as a user would."""
    return record_on_soft(PROFILE, GOLDEN, SECONDS, tmp_path_factory.mktemp("golden"))


def left_out(name: str) -> list[tuple[str, str]]:
    return [(step, field) for scenario, step, field in EXCEPTIONS if scenario == name]


def told(differences: list[Difference]) -> str:
    return "\n".join(map(str, differences))


def test_the_table_names_every_golden_scenario_once() -> None:
    assert sorted(SCOPE) == sorted(GOLDEN)
    assert sorted(COMPARED + NOT_YET) == sorted(GOLDEN)


@pytest.mark.parametrize("name", SCOPE)
def test_what_is_left_out_has_a_reason(name: str) -> None:
    entry = SCOPE[name]
    parts = entry.get("except", []) if entry["status"] == "compared" else [entry]
    assert all(part["reason"] for part in parts)


@pytest.mark.parametrize("name", COMPARED)
def test_compared(name: str, recorded: dict[str, list[Record]]) -> None:
    differences = compare_scenario(name, GOLDEN[name], recorded[name], left_out(name))
    assert not differences, told(differences)


@pytest.mark.parametrize(("name", "step", "field"), EXCEPTIONS)
def test_an_exception_is_needed(name: str, step: str, field: str, recorded: dict[str, list[Record]]) -> None:
    without = [pair for pair in left_out(name) if pair != (step, field)]
    assert compare_scenario(name, GOLDEN[name], recorded[name], without), "this agrees now: take it off the table"


@pytest.mark.parametrize("name", [name for name in NOT_YET if not load()[name].intrusive])
def test_not_yet_is_still_true(name: str, recorded: dict[str, list[Record]]) -> None:
    assert compare_scenario(name, GOLDEN[name], recorded[name]), "this agrees now: compare it"
