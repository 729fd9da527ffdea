#!/usr/bin/env python3
"""Run the contract's tests with run.py as plain Python and demand 100 % branch coverage of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONTRACT = "src/anykvm/backends/soft/run.py"
TESTS = (
    "tests/test_run_contract.py",
    "tests/test_hypercall.py",
    "tests/test_dirty_ring.py",
    "tests/test_device_handlers.py",
)


def main() -> int:
    """0 when every line and branch of the contract was taken; says which were not."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data"), Path(folder, "report.json")
        env = os.environ | {"ANYKVM_PURE": "1", "COVERAGE_FILE": str(data)}
        coverage = [sys.executable, "-m", "coverage"]
        tests = [*coverage, "run", f"--include={CONTRACT}", "-m", "pytest", *TESTS]
        ran = subprocess.run(tests, cwd=root, env=env)
        if ran.returncode:
            return ran.returncode
        subprocess.run([*coverage, "json", "-q", "-o", str(report)], cwd=root, env=env, check=True)
        found = json.loads(report.read_text())["files"][CONTRACT]
    seen = found["summary"]
    print(f"run.py: {seen['covered_lines']} lines, {seen['covered_branches']} of {seen['num_branches']} branches taken")
    if found["missing_lines"] or found["missing_branches"]:
        print(f"not taken: lines {found['missing_lines']}, branches {found['missing_branches']}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
