"""The oracle's records: against the golden file, and the soft backend against them; ``records_scope.toml`` says how."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from anykvm.conformance import Difference, compare_scenario, golden, load, read_records
from anykvm.conformance.golden_file import ABOUT, END, Record
from anykvm.conformance.records_of import kernel_names, kernel_records
from vmm_helpers import record_on_soft

FOLDER: Final = Path(__file__).parent.parent / "src/anykvm/conformance/records"
ORACLE: Final = kernel_records("linux-7.3").scenarios
GOLDEN: Final = golden("linux-7.3-npt")
SCOPE: Final[dict[str, dict[str, dict[str, Any]]]] = tomllib.loads(
    Path(__file__).with_name("records_scope.toml").read_text()
)
IN_BOTH: Final = [name for name in GOLDEN if "skip" not in SCOPE["golden"].get(name, {})]
COMPARED: Final = [name for name, entry in SCOPE["soft"].items() if entry["status"] == "compared"]
NOT_YET: Final = [name for name, entry in SCOPE["soft"].items() if entry["status"] == "not yet"]
SECONDS: Final = 5


def exceptions(side: str) -> list[tuple[str, str, str]]:
    return [
        (name, step, field)
        for name, entry in SCOPE[side].items()
        for part in entry.get("except", ())
        for step in part["steps"]
        for field in part.get("fields", ("*",))
    ]


def left_out(side: str, name: str) -> list[tuple[str, str]]:
    return [(step, field) for scenario, step, field in exceptions(side) if scenario == name]


def told(differences: list[Difference]) -> str:
    return "\n".join(map(str, differences))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Run the scenarios that only the oracle has on the soft backend."""
    return record_on_soft("linux-7.3", COMPARED + NOT_YET, SECONDS, tmp_path_factory.mktemp("records"))


@pytest.mark.parametrize("name", kernel_names())
def test_a_file_says_of_which_kernel_and_when_and_is_whole(name: str) -> None:
    records = read_records(FOLDER / f"{name}.jsonl")
    about = records[0]
    assert about["n"] == ABOUT and about["kernel"].startswith(name.removeprefix("linux-") + ".")
    assert about["backend"] == "device" and about["modules"] == ["kvm_amd"] and len(about["date"]) == 10
    assert records[-1] == {"n": END}


@pytest.mark.parametrize("name", kernel_names())
def test_a_file_has_every_scenario_of_the_golden_one(name: str) -> None:
    assert not GOLDEN.keys() - kernel_records(name).scenarios.keys()
    assert kernel_records(name).scenarios.keys() <= load().keys()


def test_the_table_is_whole_and_has_reasons() -> None:
    assert sorted(SCOPE["soft"]) == sorted(ORACLE.keys() - GOLDEN.keys())
    assert SCOPE["golden"].keys() <= GOLDEN.keys()
    for entry in (*SCOPE["golden"].values(), *SCOPE["soft"].values()):
        assert all(part["reason"] for part in entry.get("except", ()))
        assert entry.get("skip", entry.get("reason")) or entry.get("except") or entry["status"] == "compared"


@pytest.mark.parametrize("name", IN_BOTH)
def test_the_python_scenario_and_the_c_program_saw_the_same(name: str) -> None:
    differences = compare_scenario(name, GOLDEN[name], ORACLE[name], left_out("golden", name))
    assert not differences, told(differences)


@pytest.mark.parametrize(("name", "step", "field"), exceptions("golden"))
def test_an_exception_from_the_golden_file_is_needed(name: str, step: str, field: str) -> None:
    without = [pair for pair in left_out("golden", name) if pair != (step, field)]
    assert compare_scenario(name, GOLDEN[name], ORACLE[name], without), "this agrees: take it off the table"


@pytest.mark.parametrize("name", COMPARED)
def test_soft_agrees(name: str, recorded: dict[str, list[Record]]) -> None:
    differences = compare_scenario(name, ORACLE[name], recorded[name], left_out("soft", name))
    assert not differences, told(differences)


@pytest.mark.parametrize(("name", "step", "field"), exceptions("soft"))
def test_an_exception_of_soft_is_needed(name: str, step: str, field: str, recorded: dict[str, list[Record]]) -> None:
    without = [pair for pair in left_out("soft", name) if pair != (step, field)]
    assert compare_scenario(name, ORACLE[name], recorded[name], without), "this agrees now: take it off the table"


@pytest.mark.parametrize("name", NOT_YET)
def test_not_yet_is_still_true(name: str, recorded: dict[str, list[Record]]) -> None:
    assert compare_scenario(name, ORACLE[name], recorded[name]), "this agrees now: compare it"
