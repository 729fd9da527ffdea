"""The examples about memory run as their texts say, each as a user would run it, on every backend."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import probe
from vmm_helpers import SRC, require_soft

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "start")
OUTPUT = {
    "convert": [".ps.k"],
    "poison": [
        "SIGBUS: the guest's page 0x2000 is broken, rip 0x0",
        "the guest goes on: it has counted to 6, and missed nothing",
    ],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    env = {"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)


def lines(name: str, *arguments: str) -> list[str]:
    done = run(name, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("profile", "where"),
    [("documented", "guest page 0x106000"), ("linux-7.3", "the store at rip 0xc (KVM does not say where)")],
)
def test_vepc(profile: str, where: str) -> None:
    require_soft()
    head, *told = lines("vepc", "soft", profile)
    assert head == f"backend soft, profile {profile}"
    assert told[0] == f"EPC full: 6 pages, none free; fault: {where}; adding 5"
    assert [line.split(":")[1] for line in told[:-1]] == [" 6 pages, none free; fault", " 11 pages, none free; fault"]
    assert told[-1] == "done: 16 pages stored, 16 of 16 EPC pages in use"


@pytest.mark.parametrize("profile", ["documented", "linux-7.3"])
@pytest.mark.parametrize("name", OUTPUT)
def test_what_the_others_print(name: str, profile: str) -> None:
    require_soft()
    assert lines(name, "soft", profile) == [f"backend soft, profile {profile}", *OUTPUT[name]]


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_on_soft_by_default(name: str) -> None:
    require_soft()
    assert lines(name)[0] == "backend soft, profile documented"


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_on_the_device_or_says_in_a_line_what_is_missing(name: str) -> None:
    if not probe("device").usable:
        pytest.skip(f"device backend: {probe('device').reason}")
    done = run(name, "device")
    assert done.stdout.splitlines()[0] == "backend device, profile kernel"
    if done.returncode:
        (told,) = done.stderr.splitlines()
        assert done.returncode == 3 and told.startswith(f"{name}.py: the device backend lacks ")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_kvm_lacks_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_soft()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # As of a kernel without any of what they need.
    kvm = SimpleNamespace(backend=SimpleNamespace(name="device"), check_extension=lambda number: 0)
    with pytest.raises(importlib.import_module("start").Missing) as missing:
        importlib.import_module(name).main(kvm)
    assert {
        "convert": "KVM_X86_SW_PROTECTED_VM, guest_memfd, exits for KVM_HC_MAP_GPA_RANGE",
        "poison": "injected errors",
        "vepc": "an EPC that can be made to run out",
    }[name] in str(missing.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("xen",), "no backend named 'xen'"), (("soft", "x"), "no profile named 'x'"), (("a", "b", "c"), "usage: ")],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run("convert", *arguments)
    (told,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and told.startswith("convert.py: ") and words in told
