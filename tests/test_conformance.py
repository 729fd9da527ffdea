"""The conformance harness itself: registering, running under the watchdog, comparing."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from anykvm.backends.device import DeviceBackend
from anykvm.conformance import Scenario, by_scenario, compare_scenario, golden, load, read_records
from anykvm.conformance.golden_file import golden_names
from anykvm.conformance.ignored import rules
from anykvm.conformance.observe import exit_name
from anykvm.conformance.record import CHILD, record, record_scenario
from anykvm.conformance.scenario import SCENARIOS, Lab, scenario


def made(run: object, timeout: float = 5.0) -> Scenario:
    return Scenario("made", "tests", frozenset(), timeout, run)  # type: ignore[arg-type]


def no_backend() -> DeviceBackend:
    return DeviceBackend("/nonexistent")


def test_records_come_in_order_with_the_scenario_s_name() -> None:
    def run(lab: Lab) -> None:
        lab.note("first", a=1)
        lab.step("second", lambda: os.close(-1))

    assert record_scenario(made(run), no_backend) == [
        {"n": "made", "s": "first", "a": 1},
        {"n": "made", "s": "second", "ret": -1, "errno": errno.EBADF, "errname": "EBADF"},
    ]


def test_a_crash_is_a_record() -> None:
    def run(lab: Lab) -> None:
        lab.note("before")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before, child = record_scenario(made(run), no_backend)
    assert before["s"] == "before"
    assert (child["s"], int(child["status"], 16) & 0x7F) == (CHILD, signal.SIGTERM)


def test_a_hang_is_ended_and_is_a_record() -> None:
    def run(lab: Lab) -> None:
        lab.note("before")
        time.sleep(30)

    began = time.monotonic()
    before, child = record_scenario(made(run, timeout=0.3), no_backend)
    assert time.monotonic() - began < 5
    assert (before["s"], child["s"], child["killed_after_s"]) == ("before", CHILD, 0.3)


def test_an_exception_is_a_record_with_its_place() -> None:
    def run(lab: Lab) -> None:
        lab.machine()

    error, child = record_scenario(made(run), no_backend)
    assert error["s"] == "<error>" and error["errname"] == "ENOENT"
    assert child["s"] == CHILD


def test_names_are_unique_and_needs_known() -> None:
    load()
    with pytest.raises(ValueError, match="two scenarios"):
        scenario("unmapped_read", area="x")(lambda _: None)
    with pytest.raises(ValueError, match="unknown needs"):
        scenario("new_name", area="x", needs=("luck",))(lambda _: None)
    assert "new_name" not in SCENARIOS


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        list(record(["no_such_scenario"], no_backend))


@pytest.mark.parametrize("name", golden_names())
def test_every_golden_record_has_a_scenario(name: str) -> None:
    assert not golden(name).keys() - load().keys()


def test_every_rule_of_what_is_ignored_covers_a_golden_record() -> None:
    records = [(n, entry) for n, entries in golden("linux-7.3-npt").items() for entry in entries]
    unrecorded = ("gmem_mmap*",)  # partly of scenarios without records
    for rule in rules():
        if rule.scenario in unrecorded:
            continue
        field = rule.field.partition(".")[0]
        assert any(rule.covers(n, r["s"], rule.field) and (field == "*" or field in r) for n, r in records), rule


STEP = {"n": "x", "s": "a", "ret": 0}


def test_compare_finds_missing_extra_and_reordered_steps() -> None:
    other = {**STEP, "s": "b"}
    assert [d.got for d in compare_scenario("x", [STEP, other], [STEP])] == ["<missing>"]
    assert [d.expected for d in compare_scenario("x", [STEP], [STEP, other])] == ["<missing>"]
    assert compare_scenario("x", [STEP, other], [other, STEP])[0].expected == ["a", "b"]
    assert compare_scenario("x", [STEP, other], [STEP], without=[("b", "*")]) == []


def test_compare_tells_repeated_steps_apart() -> None:
    second = {**STEP, "ret": 1}
    (difference,) = compare_scenario("x", [STEP, second], [STEP, STEP])
    assert str(difference) == "x.a#2.ret: expected 1, got 0"
    assert compare_scenario("x", [STEP, second], [STEP, STEP], without=[("a#2", "ret")]) == []
    assert compare_scenario("x", [STEP, second], [STEP, STEP], without=[("a#1", "ret")]) != []


def test_compare_leaves_out_what_is_the_processor_s_own() -> None:
    def failed(*data: str) -> dict[str, object]:
        words = b"".join(int(word, 16).to_bytes(8, "little") for word in data)
        union = (1).to_bytes(4, "little") + len(data).to_bytes(4, "little") + words
        internal = {"suberror": 1, "ndata": len(data), "data": list(data)}
        return {"n": "x", "s": "a", "internal": internal, "union24": union[:24].hex()}

    assert compare_scenario("x", [failed("0x0", "0x400", "0x1")], [failed("0x0", "0x30")]) == []
    shown = failed("0x1", "0xf0f", "0x0", "0x400")
    assert compare_scenario("x", [shown], [failed("0x1", "0xf0f", "0x0")]) == []
    assert compare_scenario("x", [shown], [failed("0x1", "0xf0e", "0x0")]) != []
    assert compare_scenario("x", [shown], [failed("0x0", "0x400")]) != []


def test_compare_of_a_failed_delivery_is_of_the_address() -> None:
    def failed(*data: str) -> dict[str, object]:
        internal = {"suberror": 3, "ndata": len(data), "data": list(data)}
        return {"n": "x", "s": "a", "internal": internal, "union24": "03000000" + "05" * 20}

    expected = failed("0x1", "0x400", "0x2", "0x60", "0x0")
    assert compare_scenario("x", [expected], [failed("0x0", "0x0", "0x0", "0x60", "0x1")]) == []
    assert compare_scenario("x", [expected], [failed("0x1", "0x400", "0x2", "0x68", "0x0")]) != []


def test_several_scenarios_at_a_time_give_the_same_records() -> None:
    names = ["unmapped_read", "unmapped_write", "never_mapped"]  # each ends at once: there is no such device
    one, three = (list(record(names, no_backend, jobs=jobs)) for jobs in (1, 3))
    assert one == three and [entry["n"] for entry in one if entry["s"] == "<error>"] == names


def test_compare_of_a_descriptor_is_of_success() -> None:
    step = {"n": "gmem_basic", "s": "create", "ret": 6, "errno": 0}
    assert compare_scenario("gmem_basic", [step], [{**step, "ret": 9}]) == []
    assert compare_scenario("gmem_basic", [step], [{**step, "ret": -1, "errno": 22}]) != []


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(STEP) + "\n{\n")
    with pytest.raises(ValueError, match=r"records\.jsonl:2"):
        read_records(path)


def test_grouping_keeps_order_and_drops_the_end_mark() -> None:
    assert by_scenario([STEP, {"n": "END"}]) == {"x": [STEP]}


def test_an_unknown_exit_reason_has_a_name() -> None:
    assert exit_name(39) == "MEMORY_FAULT"
    assert exit_name(12345) == "?"
