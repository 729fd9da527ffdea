"""The soft backend against what a real Linux 7.3 did; what is known to differ must be true and needed."""

from __future__ import annotations

from typing import Final

import pytest

from anykvm.conformance import Difference, compare_scenario, golden, load
from anykvm.conformance.golden_file import Record
from anykvm.conformance.known import Known, judge, known, table
from vmm_helpers import record_on_soft, skip_without

PROFILE: Final = "linux-7.3"
EXPECTED: Final = "linux-7.3-npt"
GOLDEN: Final = golden(EXPECTED)
DIFFERENCES: Final = table(EXPECTED, "soft")
NOT_YET: Final = [name for name, entry in DIFFERENCES.items() if "status" in entry]
COMPARED: Final = [name for name in GOLDEN if name not in NOT_YET]
EXCEPTIONS: Final = [(name, entry) for name in COMPARED for entry in known(EXPECTED, f"soft:{PROFILE}", name)]
SECONDS: Final = 8
"""What a scenario may take at most here; one that is not implemented may hang."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Run every golden scenario that does not change the machine, in a process of its own, as a user would."""
    return record_on_soft(PROFILE, GOLDEN, SECONDS, tmp_path_factory.mktemp("golden"))


def told(differences: list[Difference]) -> str:
    return "\n".join(map(str, differences))


def test_the_table_is_of_golden_scenarios_and_says_why() -> None:
    assert not DIFFERENCES.keys() - GOLDEN.keys()
    for entry in DIFFERENCES.values():
        assert all(part["reason"].strip() for part in entry.get("except", ())) and set(entry) <= {
            "except",
            "status",
            "reason",
            "issue",
        }
        assert entry.get("except") or (entry["status"] == "not yet" and entry["reason"].strip())


@pytest.mark.parametrize("name", COMPARED)
def test_compared(name: str, recorded: dict[str, list[Record]]) -> None:
    skip_without(recorded[name])
    judged = judge(name, GOLDEN[name], recorded[name], known(EXPECTED, f"soft:{PROFILE}", name))
    assert not judged.unknown, told(judged.unknown)


@pytest.mark.parametrize(("name", "exception"), EXCEPTIONS)
def test_an_exception_is_needed(name: str, exception: Known, recorded: dict[str, list[Record]]) -> None:
    skip_without(recorded[name])
    others = [entry for entry in known(EXPECTED, f"soft:{PROFILE}", name) if entry != exception]
    assert judge(name, GOLDEN[name], recorded[name], others).unknown, "this agrees now: take it off the table"


@pytest.mark.parametrize("name", [name for name in NOT_YET if not load()[name].intrusive])
def test_not_yet_is_still_true(name: str, recorded: dict[str, list[Record]]) -> None:
    skip_without(recorded[name])
    assert compare_scenario(name, GOLDEN[name], recorded[name]), "this agrees now: compare it"
