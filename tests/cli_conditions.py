"""A program that runs commands under conditions, each in a process forked from one that has imported everything.

It reads a list of cases as JSON from stdin, and writes a list of results as JSON to stdout.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import jinja2.debug  # noqa: F401
import rich.progress  # noqa: F401

import anykvm.cli.app
import anykvm.cli.explanation
import anykvm.layers.annotate
import anykvm.vmm.elf_formats
import anykvm.vmm.report  # noqa: F401
from anykvm.cli import main
from anykvm.conformance import load

_FDS = ("stdin", "stdout", "stderr")


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a case; gives its code and what it wrote."""
    pid = os.fork()
    if pid == 0:
        _child(case, folder)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, errors = ((folder / name).read_bytes().decode("utf-8", "backslashreplace") for name in _FDS[1:])
    return {"code": status, "out": out, "errors": errors}


def _child(case: dict[str, Any], folder: Path) -> NoReturn:
    code = 99
    try:
        signal.alarm(60)
        os.environ.update(case.get("env", {}))
        for name in case.get("unset", ()):
            os.environ.pop(name, None)
        if case.get("deleted"):
            os.mkdir(folder / "deleted")
            os.chdir(folder / "deleted")
            os.rmdir(folder / "deleted")
        targets = {"stdin": os.devnull, "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr")}
        targets |= case.get("to", {})
        for number, name in enumerate(_FDS):
            if name in case.get("closed", ()):
                continue
            if targets[name] == "closed pipe":
                reader, fd = os.pipe()
                os.close(reader)
            else:
                fd = os.open(targets[name], os.O_RDONLY if not number else os.O_WRONLY)
            os.dup2(fd, number)
        for number, name in enumerate(_FDS):  # as the interpreter has them at its start
            if name in case.get("closed", ()):
                os.close(number)
                setattr(sys, name, None)
            elif number:
                errors = "strict" if number == 1 else "backslashreplace"
                raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
                encoding = case.get("encoding", "utf-8")
                setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=number == 2))
        sys.argv = ["anykvm", *case["arguments"]]
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        if sys.stdout is not None:
            sys.stdout.flush()  # as the interpreter does at its end: it must not fail any more
    except BaseException:
        import traceback

        (folder / "stderr").write_text(traceback.format_exc())
        code = 97
    finally:
        os._exit(code)


def _all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        folder = Path(tempfile.mkdtemp())
        for name in _FDS[1:]:
            (folder / name).touch()
        results.append(run(case, folder))
        shutil.rmtree(folder)
    return results


if __name__ == "__main__":
    load()
    json.dump(_all(json.load(sys.stdin)), sys.stdout)
