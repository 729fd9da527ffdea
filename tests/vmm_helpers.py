"""What the VMM's and the command's tests share: backends by name, commands in a process of their own, ELF files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from anykvm.backends import Backend, soft_backend
from anykvm.conformance import by_scenario, load, read_records
from anykvm.conformance.golden_file import Record
from conftest import probe

SRC = Path(__file__).parent.parent / "src"

# out 0xe9 'H', out 0x3f8 'i', out 0x80 al, hlt; these bytes mean the same in real mode and, but for DX, elsewhere
HELLO = bytes.fromhex("b048 e6e9 baf803 b069 ee e680 f4")
FOREVER = bytes.fromhex("ebfe")  # jmp .


def require_soft(profile: str | None = None) -> Backend:
    """Make the soft backend, or skip the test and have the summary say so."""
    found = probe("soft")
    if not found.usable:
        pytest.skip(f"soft backend: {found.reason}")
    return soft_backend(profile)


def environment() -> dict[str, str]:
    """Give an environment in which ``python -m anykvm`` is this one, with a plain terminal."""
    found = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "PY_COLORS")}
    return {**found, "PYTHONPATH": str(SRC), "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}


def command(*arguments: object) -> list[str]:
    """Give the argument vector of an anykvm command."""
    return [sys.executable, "-m", "anykvm", *(str(argument) for argument in arguments)]


def anykvm(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an anykvm command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env=environment(), cwd=cwd, check=False
    )


def record_on_soft(profile: str, names: Iterable[str], seconds: float, folder: Path) -> dict[str, list[Record]]:
    """Run scenarios that do not change the machine in a process of their own, as a user would: `seconds` for each."""
    require_soft()
    output = folder / "soft.jsonl"
    command = [sys.executable, "-m", "anykvm.conformance.record", "--backend", "soft", "--profile", profile]
    command += ["--timeout", str(seconds), "--jobs", "2", "--output", str(output)]
    subprocess.run([*command, *(name for name in names if not load()[name].intrusive)], check=True, timeout=900)
    return by_scenario(read_records(output))


def skip_without(recorded: list[Record]) -> None:
    """Skip the test of a scenario that this machine, or this user of it, has no userfaultfd for."""
    for record in recorded:
        if record["s"] == "userfaultfd":
            pytest.skip(f"NOT TESTED: {record['n']}: no userfaultfd for this process: {record['errname']}")


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check that a command failed with a code and, behind what it listed, one line with these words."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("anykvm: ")
    for word in words:
        assert word in last


def without_backend(errors: str) -> list[str]:
    """Give the lines on stderr, without the first if that names the backend."""
    lines = errors.splitlines()
    return lines[1:] if lines and lines[0].startswith("backend ") else lines


def elf64(
    code: bytes,
    paddr: int = 0x200000,
    *,
    vaddr: int | None = None,
    entry: int | None = None,
    type: int = 2,
    machine: int = 62,
    p_type: int = 1,
    memsz: int | None = None,
) -> bytes:
    """Make an ELF64 file of one segment, by default a static x86-64 executable."""
    vaddr = paddr if vaddr is None else vaddr
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
        *(type, machine, 1, vaddr if entry is None else entry, 64, 0, 0, 64, 56, 1, 64, 0, 0),
    )
    size = len(code) if memsz is None else memsz
    return header + struct.pack("<IIQQQQQQ", p_type, 7, 120, vaddr, paddr, len(code), size, 4096) + code


def elf32(code: bytes, paddr: int = 0x200000) -> bytes:
    """Make a static ELF32 executable for the 386, of one segment."""
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        b"\x7fELF\x01\x01\x01".ljust(16, b"\0"),
        *(2, 3, 1, paddr, 52, 0, 0, 52, 32, 1, 40, 0, 0),
    )
    return header + struct.pack("<IIIIIIII", 1, 84, paddr, paddr, len(code), len(code), 7, 4096) + code
