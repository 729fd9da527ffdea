#!/usr/bin/env python3
"""Demand 100 % branch coverage of KVM_RUN's contract (run.py, as plain Python) and of the contract layer's rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: File -> the tests that take all its branches, and the environment they need.
WANTED: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "src/anykvm/backends/soft/run.py": (
        (
            "tests/test_run_contract.py",
            "tests/test_hypercall.py",
            "tests/test_dirty_ring.py",
            "tests/test_device_handlers.py",
        ),
        {"ANYKVM_PURE": "1"},
    ),
    "src/anykvm/layers/contract/rules.py": (("tests/test_contract.py",), {}),
}


def main() -> int:
    """0 when every line and branch was taken; says which were not."""
    return max([covered(path, *how) for path, how in WANTED.items()])


def covered(path: str, tests: tuple[str, ...], environment: dict[str, str]) -> int:
    """Run the tests of one file; 0 when they pass and take all of it."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data"), Path(folder, "report.json")
        env = os.environ | environment | {"COVERAGE_FILE": str(data)}
        coverage = [sys.executable, "-m", "coverage"]
        ran = subprocess.run([*coverage, "run", f"--include={path}", "-m", "pytest", *tests], cwd=root, env=env)
        if ran.returncode:
            return ran.returncode
        subprocess.run([*coverage, "json", "-q", "-o", str(report)], cwd=root, env=env, check=True)
        found = json.loads(report.read_text())["files"][path]
    seen = found["summary"]
    name = path.removeprefix("src/anykvm/")
    print(f"{name}: {seen['covered_lines']} lines, {seen['covered_branches']} of {seen['num_branches']} branches taken")
    if found["missing_lines"] or found["missing_branches"]:
        print(f"not taken: lines {found['missing_lines']}, branches {found['missing_branches']}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
