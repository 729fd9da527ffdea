"""``anykvm conformance``: list, record, compare, and its page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from anykvm.backends import Probe
from anykvm.cli import main
from anykvm.conformance import golden, load, read_records
from anykvm.conformance import record as recorder
from anykvm.conformance.golden_file import ABOUT, END
from anykvm.conformance.records_of import Records, kernel_records
from anykvm.conformance.report import compare, html
from vmm_helpers import anykvm, assert_one_line, command, environment, require_soft

NEW = next(name for name in load() if name not in golden("linux-7.3-npt"))


def records(**steps: int) -> Records:
    made = [{"n": "unmapped_read", "s": step, "ret": ret} for step, ret in steps.items()]
    return Records("a <title>", {"unmapped_read": made}, "label")


def test_list_names_every_scenario_and_kernel() -> None:
    done = anykvm("conformance", "list", "--json")
    found = json.loads(done.stdout)
    assert {entry["name"] for entry in found["scenarios"]} == set(load())
    assert set(found["kernels"]) == {"linux-6.12", "linux-7.3"} and "kvm_amd" in found["kernels"]["linux-7.3"]
    (entry,) = [entry for entry in found["scenarios"] if entry["name"] == "unmapped_read"]
    assert entry["steps"]["linux-7.3"] == 3
    table = anykvm("conformance", "list")
    assert table.returncode == 0 and "unmapped_read" in table.stdout and "linux-7.3: Linux 7.3.4" in table.stdout


def test_record_then_compare_agrees(tmp_path: Path) -> None:
    require_soft()
    path = tmp_path / "soft.jsonl"
    options = ("--backend", "soft", "--profile", "linux-7.3", "--scenario", "unmapped_read")
    assert anykvm("conformance", "record", path, *options).returncode == 0
    written = read_records(path)
    assert (written[0]["n"], written[0]["profile"], written[-1]["n"]) == (ABOUT, "linux-7.3", END)
    done = anykvm("conformance", "compare", "linux-7.3", path, "--scenario", "unmapped_read", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["agreeing"] == [1]


def test_compare_records_now_and_finds_what_a_profile_does_otherwise(tmp_path: Path) -> None:
    require_soft()
    page = tmp_path / "page.html"
    command = ("conformance", "compare", "linux-7.3", "soft:linux-7.3", "soft:documented")
    done = anykvm(*command, "--scenario", "unmapped_read", "--html", page, "--verbose")
    assert done.returncode == 1
    assert "unmapped_read.read8.exit_reason: expected 0, got 39" in done.stdout
    assert re.search(r"soft:linux-7.3: soft, profile linux-7.3 \(.*\): scenarios that agree: 1 of 1\n", done.stdout)
    assert "MEMORY_FAULT" in page.read_text()


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{\n")
    (tmp_path / "other").write_text('{"a": 1}\n')
    assert_one_line(anykvm("conformance", "compare", "linux-9.9"), 2, "linux-9.9", "names are linux-6.12, linux-7.3")
    assert_one_line(anykvm("conformance", "compare", tmp_path / "bad"), 2, "bad:1")
    assert_one_line(anykvm("conformance", "compare", tmp_path / "other"), 2, "not a file of records")
    assert_one_line(anykvm("conformance", "compare", "--scenario", "no_such"), 2, "no scenario is named no_such")
    assert_one_line(anykvm("conformance", "compare", "linux-7.3", "soft:xyz"), 2, "no profile named 'xyz'")
    assert_one_line(anykvm("conformance", "record", tmp_path / "x", "--scenario", "no_such"), 2, "no_such")


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    for arguments, words in (
        (("record", "/nonexistent/x"), "OUTPUT /nonexistent/x: cannot be written there"),
        (("record", tmp_path), "cannot be written there"),
        (("compare", "linux-7.3", "soft", "--html", "/nonexistent/x.html"), "--html /nonexistent/x.html: cannot"),
    ):
        done = anykvm("conformance", *arguments)
        assert_one_line(done, 2, words)
        assert len(done.stderr.splitlines()) == 1 and not done.stdout  # nothing was recorded


def test_record_takes_the_kernel_s_kvm_only_by_name(tmp_path: Path) -> None:
    require_soft()
    path = tmp_path / "x"
    assert anykvm("conformance", "record", path, "--scenario", "unmapped_read").returncode == 0
    assert read_records(path)[0]["backend"] == "soft"
    assert_one_line(anykvm("conformance", "record", path, "--backend", "auto"), 2, "auto")


def test_a_kvm_that_cannot_be_used_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    monkeypatch.setattr(recorder, "probe_device", lambda: Probe("device", False, "no permission"))
    for arguments in (("record", str(path), "--backend", "device"), ("compare", "linux-7.3", "device")):
        with pytest.raises(SystemExit) as info:
            main(["conformance", *arguments, "--scenario", "unmapped_read"])
        assert info.value.code == 3
        assert capsys.readouterr() == ("", "anykvm: device backend: no permission\n")
    assert not path.exists()
    with pytest.raises(SystemExit) as info:
        recorder.main(["--backend", "device", "--output", str(path)])
    assert info.value.code == 2 and "device backend: no permission" in capsys.readouterr().err


def test_a_scenario_that_is_not_recorded_is_no_agreement() -> None:
    done = anykvm("conformance", "compare", "linux-7.3-npt", "linux-7.3", "--scenario", "caps", "--scenario", NEW)
    assert_one_line(done, 2, f"linux-7.3-npt has no records of {NEW}")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "at_work"),
    [
        (("compare", "linux-7.3", "soft:linux-7.3"), "soft:linux-7.3: "),
        (("record", "records"), "soft: "),
        (("random", "--jobs", "2"), "soft: 100 of 4000"),
    ],
)
def test_signals_end_it_orderly(
    arguments: tuple[str, ...], at_work: str, number: signal.Signals, code: int, line: str, tmp_path: Path
) -> None:
    require_soft()
    with subprocess.Popen(
        command("conformance", *arguments),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr
        assert process.stderr.readline().startswith(at_work)
        # Ctrl-C is for all of them, the others for the one.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=30)
    *listed, last = errors.splitlines()
    assert (process.returncode, last) == (code, f"anykvm: {line}")
    assert all(text.startswith("soft") for text in listed), errors
    assert os.listdir(tmp_path) == []


def test_a_kernel_is_compared_with_its_own_profile() -> None:
    require_soft()
    done = anykvm("conformance", "compare", "linux-6.12", "--scenario", "sync_valid_bits")
    assert done.returncode == 0 and re.search(r"soft:linux-6.12: .*: scenarios that agree: 1 of 1\n", done.stdout)
    done = anykvm("conformance", "compare", "linux-6.12", "soft:linux-7.3", "--scenario", "sync_valid_bits")
    assert done.returncode == 1 and "1 differs" in done.stdout


def test_the_page_needs_nothing_else_and_escapes() -> None:
    same, other = records(read8=0), records(read8=-1)
    page = html(compare(same, [same, other._replace(label="<other>")]))
    assert "&lt;title&gt;" in page and "<other>" not in page
    assert "agrees" in page and "1 difference" in page and "read8" in page
    assert not re.search(r"(src|href)=(?!\"#)", page)
    assert re.search(
        r"read8</td><td>ret</td><td>0</td>\s*<td class=\"agrees\">same</td>\s*<td class=\"differs\">-1</td>", page
    )


def test_areas_count_and_differences_of_several_are_side_by_side() -> None:
    expected, other, third = records(a=0, b=0), records(a=0, b=1), records(a=2, b=3)
    comparison = compare(expected, [expected, other, third])
    (area,) = comparison.areas
    agreeing = [tally.agrees for tally in area.tallies]
    assert (area.name, agreeing, area.tallies) == ("unmapped", [1, 0, 0], comparison.tallies)
    lines = {
        (line.step, line.field): (line.expected, [shown.text for shown in line.got]) for line in area.rows[0].lines
    }
    assert lines == {("b", "ret"): (0, ["same", "1", "3"]), ("a", "ret"): (0, ["same", "same", "2"])}
    assert area.rows[0].differs and not area.rows[0].settled


def test_a_scenario_without_records_is_not_an_agreement() -> None:
    comparison = compare(records(read8=0), [Records("empty", {})])
    assert comparison.rows[0].cells[0].verdict == "not recorded"
    assert (comparison.tallies[0].text, comparison.differing) == ("0 of 1, 1 not recorded", 0)
    assert compare(records(read8=0), [records(read8=0)], names=["other"]).rows == []


def test_beside_one_that_differs_one_without_records_is_not_the_same() -> None:
    comparison = compare(records(read8=0), [records(read8=1), Records("empty", {})])
    (line,) = comparison.rows[0].lines
    assert [(shown.kind, shown.text) for shown in line.got] == [("differs", "1"), ("none", "not recorded")]
    assert re.search(r'<td class="differs">1</td>\s*<td class="none">not recorded</td>', html(comparison))


def test_known_differences_have_a_reason_and_are_no_failure(tmp_path: Path) -> None:
    """A file as of soft:linux-7.3 with one value of `fpu` that is known to differ, then with one that is not."""
    written = [record.copy() for record in kernel_records("linux-7.3").scenarios["fpu"]]
    (step,) = [record for record in written if record["s"] == "fresh_guest_sees"]
    step["rax"] = "0x123"
    about = {"n": ABOUT, "date": "2026-11-22", "backend": "soft", "profile": "linux-7.3"}

    def compared() -> subprocess.CompletedProcess[str]:
        path.write_text("".join(json.dumps(line) + "\n" for line in (about, *written, {"n": END})))
        return anykvm("conformance", "compare", "linux-7.3", path, "--scenario", "fpu", "-v", "--all", "--html", page)

    path, page = tmp_path / "soft.jsonl", tmp_path / "page.html"
    done = compared()
    assert done.returncode == 0 and "scenarios that agree: 0 of 1, 1 known\n" in done.stdout
    assert re.search(r"known: fpu\.fresh_guest_sees\.rax: expected 0x\w+, got 0x123: KVM_SET_FPU does not", done.stdout)
    assert re.search(r'<td class="known">0x123</td>\s*<td class="why">KVM_SET_FPU does not', page.read_text())
    step["rip"] = "0x456"
    done = compared()
    assert done.returncode == 1 and "agree: 0 of 1, 1 differs\n" in done.stdout
    assert re.search(r"1 difference, 1 known", done.stdout)
    assert re.search(r"soft.jsonl: fpu\.fresh_guest_sees\.rip: expected 0x\w+, got 0x456\n", done.stdout)
    about["profile"] = "documented"  # of which nothing is known
    assert "2 differences" in compared().stdout
