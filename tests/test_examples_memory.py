"""The examples about failing memory run as their texts say, each as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("profile", "where"),
    [("documented", "guest page 0x106000"), ("linux-7.3", "the store at rip 0xc (KVM does not say where)")],
)
def test_vepc(profile: str, where: str) -> None:
    lines = run("vepc.py", profile).splitlines()
    assert lines[0] == f"EPC full: 6 pages, none free; fault: {where}; adding 5"
    assert [line.split(":")[1] for line in lines[:-1]] == [" 6 pages, none free; fault", " 11 pages, none free; fault"]
    assert lines[-1] == "done: 16 pages stored, 16 of 16 EPC pages in use"


def test_poison() -> None:
    assert run("poison.py").splitlines() == [
        "SIGBUS: the guest's page 0x2000 is broken, rip 0x0",
        "the guest goes on: it has counted to 6, and missed nothing",
    ]
