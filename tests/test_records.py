"""The oracle's records: against the golden file; soft and this machine's KVM against them; `differences`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from anykvm.backends.soft import PROFILES
from anykvm.conformance import Difference, by_scenario, compare_scenario, golden, load, read_records
from anykvm.conformance.golden_file import ABOUT, END, Record
from anykvm.conformance.known import WHOLE, Known, judge, known, table, tables
from anykvm.conformance.records_of import kernel_names, kernel_records
from conftest import probe
from vmm_helpers import record_on_soft, skip_without

FOLDER: Final = Path(__file__).parent.parent / "src/anykvm/conformance/records"
DOCUMENTATION: Final = Path(__file__).parent.parent / "docs/kernels.md"
GOLDEN: Final = golden("linux-7.3-npt")
KERNEL: Final = "linux-7.3"
"""The golden file's kernel."""
OTHER: Final = "linux-6.12"
KERNELS: Final = (KERNEL, OTHER)
"""Each is a profile, too."""
ORACLE: Final = {kernel: kernel_records(kernel).scenarios for kernel in KERNELS}
NAMES: Final = [name for name, scenario in load().items() if not scenario.intrusive]
OF_GOLDEN: Final = table("linux-7.3-npt", KERNEL)
OF_SOFT: Final = table(KERNEL, "soft")
"""For 6.12 as well, which is like it."""
OF_OTHER: Final = table(KERNEL, OTHER)
IN_BOTH: Final = [name for name in GOLDEN if "status" not in OF_GOLDEN.get(name, {})]
NOT_YET: Final = [name for name, entry in OF_SOFT.items() if entry.get("status") == "not yet"]
SECONDS: Final = 10
LIMIT: Final = 900
"""Seconds for all of them, which take 13 of processor time a kernel; a machine may have other work."""
pytestmark = pytest.mark.timeout(LIMIT)
OLDEST: Final = (6, 12)
"""The oldest kernel of which there are records."""


def of_golden(name: str) -> list[Known]:
    return known("linux-7.3-npt", KERNEL, name)


def of_soft(kernel: str, name: str) -> list[Known]:
    return known(kernel, f"soft:{kernel}", name)


def of_other(name: str) -> list[Known]:
    return known(KERNEL, OTHER, name)


COMPARED: Final = [
    (kernel, name) for kernel in KERNELS for name in NAMES if all(e.step != WHOLE for e in of_soft(kernel, name))
]
EXCEPTIONS: Final = [
    (kernel, name, entry) for kernel, name in COMPARED if name not in GOLDEN for entry in of_soft(kernel, name)
]
"""But those from the golden file, which tests/test_golden.py finds needed."""


def told(differences: list[Difference]) -> str:
    return "\n".join(map(str, differences))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Record]]]:
    """Run the scenarios on the soft backend, with each kernel's profile."""
    return {kernel: record_on_soft(kernel, NAMES, SECONDS, tmp_path_factory.mktemp(kernel)) for kernel in KERNELS}


@pytest.mark.parametrize("name", kernel_names())
def test_a_file_says_of_which_kernel_and_when_and_is_whole(name: str) -> None:
    records = read_records(FOLDER / f"{name}.jsonl")
    about = records[0]
    assert about["n"] == ABOUT and about["kernel"].startswith(name.removeprefix("linux-") + ".")
    assert about["backend"] == "device" and about["modules"] == ["kvm_amd"] and len(about["date"]) == 10
    assert records[-1] == {"n": END}


@pytest.mark.parametrize("name", kernel_names())
def test_a_file_has_every_scenario_and_none_broke_off(name: str) -> None:
    scenarios = kernel_records(name).scenarios
    assert sorted(scenarios) == sorted(load())
    broken = [key for key, records in scenarios.items() for record in records if record["s"].startswith("<")]
    assert not broken


def test_there_are_records_of_these_kernels() -> None:
    assert sorted(KERNELS) == kernel_names() and set(KERNELS) < set(PROFILES)


def test_the_tables_are_whole_and_have_reasons() -> None:
    assert OF_SOFT.keys() <= load().keys() - GOLDEN.keys() and OF_GOLDEN.keys() <= GOLDEN.keys()
    assert OF_OTHER.keys() <= load().keys() and tables(OTHER) == {"like": KERNEL}
    assert {entry.get("status") for entry in OF_SOFT.values()} == {None, "not yet", "out"}
    for entry in (*OF_GOLDEN.values(), *OF_SOFT.values(), *OF_OTHER.values()):
        assert all(part["reason"] for part in entry.get("except", ()))
        assert entry.get("reason") or entry.get("except")


@pytest.mark.parametrize("name", IN_BOTH)
def test_the_python_scenario_and_the_c_program_saw_the_same(name: str) -> None:
    unknown = judge(name, GOLDEN[name], ORACLE[KERNEL][name], of_golden(name)).unknown
    assert not unknown, told(unknown)


@pytest.mark.parametrize(("name", "exception"), [(name, entry) for name in IN_BOTH for entry in of_golden(name)])
def test_an_exception_from_the_golden_file_is_needed(name: str, exception: Known) -> None:
    others = [entry for entry in of_golden(name) if entry != exception]
    assert judge(name, GOLDEN[name], ORACLE[KERNEL][name], others).unknown, "this agrees: take it off the table"


@pytest.mark.parametrize("name", load())
def test_the_kernels_differ_as_listed_and_no_otherwise(name: str) -> None:
    entries = of_other(name)
    unknown = judge(name, ORACLE[KERNEL][name], ORACLE[OTHER][name], entries).unknown
    assert not unknown, told(unknown)
    assert known(OTHER, KERNEL, name) == entries
    for entry in entries:
        others = [other for other in entries if other != entry]
        assert judge(name, ORACLE[KERNEL][name], ORACLE[OTHER][name], others).unknown, f"not needed: {entry}"


def test_the_documentation_has_the_kernels_differences_by_reason() -> None:
    by_reason: dict[str, list[str]] = {}
    for name in OF_OTHER:
        for reason in dict.fromkeys(entry.reason for entry in of_other(name)):
            by_reason.setdefault(reason, []).append(name)
    rows = [f"| {reason} | {', '.join(f'`{name}`' for name in names)} |" for reason, names in by_reason.items()]
    text = DOCUMENTATION.read_text()
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == rows
    assert f"They differ in {len(OF_OTHER)} of them" in " ".join(text.split())


@pytest.mark.parametrize(("kernel", "name"), COMPARED)
def test_soft_agrees(kernel: str, name: str, recorded: dict[str, dict[str, list[Record]]]) -> None:
    skip_without(recorded[kernel][name])
    unknown = judge(name, ORACLE[kernel][name], recorded[kernel][name], of_soft(kernel, name)).unknown
    assert not unknown, told(unknown)


@pytest.mark.parametrize(("kernel", "name", "exception"), EXCEPTIONS)
def test_an_exception_of_soft_is_needed(
    kernel: str, name: str, exception: Known, recorded: dict[str, dict[str, list[Record]]]
) -> None:
    skip_without(recorded[kernel][name])
    others = [entry for entry in of_soft(kernel, name) if entry != exception]
    unknown = judge(name, ORACLE[kernel][name], recorded[kernel][name], others).unknown
    assert unknown, "this agrees now: take it off the table"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NOT_YET)
def test_not_yet_is_still_true(kernel: str, name: str, recorded: dict[str, dict[str, list[Record]]]) -> None:
    skip_without(recorded[kernel][name])
    assert compare_scenario(name, ORACLE[kernel][name], recorded[kernel][name]), "this agrees now: compare it"


OWN: Final = [name for name, scenario in load().items() if scenario.area == "ioctls"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Run the ioctl surface on this machine's own KVM."""
    found = probe("device")
    if not found.usable:
        pytest.skip(f"device backend: {found.reason}")
    output = tmp_path_factory.mktemp("own") / "device.jsonl"
    command = [sys.executable, "-m", "anykvm.conformance.record", "--backend", "device", "--timeout", str(SECONDS)]
    subprocess.run([*command, "--output", str(output), *OWN], check=True, timeout=LIMIT)
    return by_scenario(read_records(output))


@pytest.mark.parametrize("name", OWN)
def test_this_machine_s_kvm_has_the_same_ioctls(name: str, own: dict[str, list[Record]]) -> None:
    assert not [record for record in own[name] if record["s"].startswith("<")]
    major, minor = map(int, re.findall(r"\d+", os.uname().release)[:2])
    if (major, minor) >= OLDEST:  # an older kernel may lack some; what it says is then no defect of anybody's
        found = [compare_scenario(name, kernel_records(kernel).scenarios[name], own[name]) for kernel in kernel_names()]
        assert min(found, key=len) == [], told(min(found, key=len))
