"""``anykvm doctor`` and ``caps``, and what all commands share."""

from __future__ import annotations

import json

import pytest

from anykvm import __version__, cli
from anykvm.backends import Probe, probe_device
from anykvm.cli import doctor as doctor_module
from conftest import probe
from vmm_helpers import anykvm, assert_one_line, require_soft


def test_doctor_agrees_with_the_probes() -> None:
    done = anykvm("doctor", "--json")
    found = json.loads(done.stdout)
    usable = {name: probe(name).usable for name in ("device", "soft")}
    assert {entry["name"]: entry["usable"] for entry in found["backends"]} == usable
    assert all(entry["reason"] for entry in found["backends"])
    assert found["auto"] == ("device" if usable["device"] else "soft" if usable["soft"] else None)
    assert (done.returncode, done.stderr) == (0 if any(usable.values()) else 3, "")


def test_doctor_names_each_backend_in_its_table() -> None:
    lines = anykvm("doctor").stdout.splitlines()
    for name in ("device", "soft"):
        line = next(line for line in lines if line.startswith(name))
        assert ("not usable" in line) is not probe(name).usable


def test_doctor_without_any_backend_is_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_module, "probe_device", lambda: probe_device("/nonexistent"))
    monkeypatch.setattr(doctor_module, "probe_soft", lambda: Probe("soft", False, "no engine [here]"))
    with pytest.raises(SystemExit) as info:
        cli.main(["doctor"])
    assert info.value.code == 3
    out = capsys.readouterr().out
    assert "/nonexistent does not exist" in out and "no engine [here]" in out and "auto" not in out


def test_caps_of_each_backend_and_profile() -> None:
    require_soft()
    done = anykvm("caps", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    columns = json.loads(done.stdout)["columns"]
    soft = {column["profile"]: column for column in columns if column["backend"] == "soft"}
    assert {"documented", "linux-7.3"} <= set(soft)
    for column in soft.values():
        assert column["usable"] and column["problem"] is None
        assert column["capabilities"]["KVM_CAP_MEMORY_FAULT_INFO"] == 1
        assert column["capabilities"]["KVM_CAP_USER_MEMORY"] == 1
        assert all(column["capabilities"].values())
    device = next(column for column in columns if column["backend"] == "device")
    assert device["usable"] or device["problem"]


def test_caps_table() -> None:
    require_soft()
    short, full = anykvm("caps").stdout, anykvm("caps", "--all").stdout
    assert "documented" in short and "linux-7.3" in short
    assert any(line.startswith("MEMORY_FAULT_INFO ") for line in short.splitlines())
    assert len(full.splitlines()) > len(short.splitlines())


def test_version_and_help() -> None:
    assert anykvm("--version").stdout == f"anykvm {__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        done = anykvm(*arguments)
        assert done.returncode == 0
        for name in ("postcopy", "exec", "doctor", "caps"):
            assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", ["exec", "postcopy"])
def test_help_lists_the_exit_codes(name: str) -> None:
    text = " ".join(anykvm(name, "--help").stdout.split())
    assert "Exit codes: 0 " in text and "130 interrupted" in text


@pytest.mark.parametrize(("arguments", "word"), [(("frob",), "frob"), (("--frob",), "--frob"), (("caps", "x"), "x")])
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], word: str) -> None:
    done = anykvm(*arguments)
    assert_one_line(done, 2, word, "--help)")
    assert len(done.stderr.splitlines()) == 1
