"""Every command where something is not as usual: streams closed or full, odd names, odd numbers, signals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from anykvm.abi.names import CAP_NAMES
from anykvm.cli import app, main
from anykvm.cli import doctor as doctor_module
from anykvm.conformance import load
from vmm_helpers import HELLO, command, elf64, environment, require_soft

ODD = os.fsdecode("é中\x1b[31m\n".encode() + b"\xff<i>")
"""A name with characters of two scripts, an escape sequence, a line feed, a byte that is not UTF-8, and a tag."""
STORE = elf64(bytes.fromhex("48c7c708700000 488907 f4"))  # mov rdi,0x7008; mov [rdi],rax; hlt
SOFT = ("--backend", "soft")


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require_soft()
    monkeypatch.chdir(tmp_path)
    for name in ("file", ODD):
        Path(name).write_bytes(HELLO)
        Path(f"{name}.elf").write_bytes(STORE)
    about = {"n": "ABOUT", "date": "2026-01-01", "backend": "device", "kernel": "9.9-é\x1b\udcff", "modules": []}
    record = {"n": "unmapped_read", "s": "a\x1b[31m\n", "ret": 1}
    for name, ret in (("records", 1), (f"{ODD}.records", 2)):
        lines = (about, {**record, "ret": ret}, {"n": "END"})
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Give every kind of command that prints to stdout, and its usual code."""
    odd = str(folder / ODD)
    return {
        "--help": (["--help"], 0),
        "--version": (["--version"], 0),
        "caps": (["caps"], 0),
        "list": (["conformance", "list"], 0),
        "compare --all -v": (["conformance", "compare", str(folder / "records"), f"{odd}.records", "--all", "-v"], 1),
        "compare --html -": (["conformance", "compare", str(folder / "records"), f"{odd}.records", "--html", "-"], 1),
        "postcopy": (["postcopy", odd, *SOFT, "--html", f"{odd}.html"], 0),
        "postcopy --json": (["postcopy", odd, *SOFT, "--no-html", "--json"], 0),
        "postcopy --html -": (["postcopy", odd, *SOFT, "--html", "-"], 0),
        "exec": (["exec", odd, *SOFT], 0),
        "explain": (["explain", f"{odd}.elf", *SOFT, "--unmap", "0x7000"], 0),
        "explain --json": (["explain", f"{odd}.elf", *SOFT, "--unmap", "0x7000", "--json"], 0),
        "explore": (["explore", "--depth", "2", "--arch", "x86"], 0),
        "explore --json": (["explore", "--depth", "2", "--arch", "x86", "--policy", "P1", "--json"], 0),
        "explore --trace": (["explore", "--trace", "T1"], 0),
    }


def test_every_command_is_there(tmp_path: Path) -> None:
    tried = {arguments[0] for arguments, _ in (*commands(tmp_path).values(), *mistakes(tmp_path).values())}
    assert {one.name or one.callback.__name__ for one in app.app.registered_commands if one.callback} <= tried | {
        "doctor"
    }


def mistakes(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Give commands that fail in one line with an odd name in it."""
    odd = str(folder / ODD)
    return {
        "exec of nothing": (["exec", f"{odd}.missing"], 2),
        "exec --html": (["postcopy", odd, "--html", f"{odd}/nowhere"], 2),
        "compare with nothing": (["conformance", "compare", f"{odd}.missing"], 2),
        "no such scenario": (["conformance", "compare", "--scenario", ODD], 2),
        "an odd option": ([f"--{ODD}"], 2),
        "an odd backend": (["exec", odd, "--backend", ODD], 2),
        "an odd kernel": (["oracle", "--kernel", f"/{ODD}", "true"], 3),
        "the file itself": (["postcopy", odd, *SOFT, "--html", odd], 2),
    }


def run(
    cases: dict[str, tuple[list[str], int]], conditions: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Run commands under conditions, all from one program; gives the names of both, and what came of it."""
    asked = {(how, name): {"arguments": cases[name][0], **conditions[how]} for how in conditions for name in cases}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "cli_conditions.py")],
        input=json.dumps([*asked.values()]),
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
        check=True,
    )
    for (how, name), result in zip(asked, json.loads(done.stdout), strict=True):
        assert "Traceback" not in result["errors"] and result["code"] < 90, (how, name, result)
        assert "\x1b" not in result["out"] + result["errors"] or "html" in name, (how, name, result)
        yield how, name, result


def told(result: dict[str, Any]) -> list[str]:
    return [line for line in result["errors"].splitlines() if line.startswith("anykvm: ")]


USUAL: dict[str, dict[str, Any]] = {
    "ASCII": {"encoding": "ascii"},
    "Latin-1": {"encoding": "latin-1"},
    "one column": {"env": {"COLUMNS": "1", "LINES": "1"}},
    "no stdin, no home, no directory": {
        "closed": ["stdin"],
        "env": {"COLUMNS": "wide"},
        "unset": ["HOME", "USER", "LOGNAME", "PATH", "TERM", "LANG"],
        "deleted": True,
    },
}


def test_conditions_under_which_all_works(tmp_path: Path) -> None:
    cases = commands(tmp_path)
    for how, name, result in run(cases, {**USUAL, "stderr closed": {"closed": ["stderr"]}}):
        assert result["code"] == cases[name][1] and not told(result), (how, name, result)
        assert result["out"], (how, name)
    assert "é中" in (tmp_path / f"{ODD}.html").read_text("utf-8")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    cases = mistakes(tmp_path)
    for how, name, result in run(cases, {how: USUAL[how] for how in USUAL if how not in ("Latin-1", "one column")}):
        assert len(told(result)) == len(result["errors"].splitlines()) == 1, (how, name, result)
        assert result["code"] == cases[name][1] and result["out"] == "", (how, name, result)


WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "stdout closed": ({"closed": ["stdout"]}, 7, "anykvm: standard output: Bad file descriptor"),
    "all closed": ({"closed": ["stdin", "stdout", "stderr"]}, 7, ""),
    "stdout full": ({"to": {"stdout": "/dev/full"}}, 7, "anykvm: standard output: No space left on device"),
    "both full": ({"to": {"stdout": "/dev/full", "stderr": "/dev/full"}}, 7, ""),
    "nobody reads": ({"to": {"stdout": "closed pipe"}}, 1, ""),
    "nobody reads either": ({"to": {"stdout": "closed pipe", "stderr": "closed pipe"}}, 1, ""),
}


def test_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    chosen = (
        "--help",
        "caps",
        "compare --html -",
        "compare --all -v",
        "postcopy",
        "postcopy --json",
        "exec",
        "explain",
    )
    cases = {name: case for name, case in commands(tmp_path).items() if name in chosen}
    for how, name, result in run(cases, {name: condition for name, (condition, _, _) in WRONG.items()}):
        _, code, line = WRONG[how]
        assert (result["code"], result["out"]) == (code, ""), (how, name, result)
        assert told(result) == ([line] if line else []), (how, name, result)


def test_a_guest_without_output_needs_no_stdout(tmp_path: Path) -> None:
    (tmp_path / "quiet").write_bytes(b"\xf4")
    cases = {"exec": (["exec", str(tmp_path / "quiet"), *SOFT], 0)}
    ((_, _, result),) = run(cases, {"stdout closed": {"closed": ["stdout"]}})
    assert result["code"] == 0


@pytest.mark.parametrize("variables", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C"}])
def test_the_locale_c_and_a_name_beyond_ascii(variables: dict[str, str], tmp_path: Path) -> None:
    for arguments in (
        ("postcopy", ODD, *SOFT, "--html", "report.html"),
        ("conformance", "compare", "records", f"{ODD}.records", "--html", "page.html"),
    ):
        done = subprocess.run(
            command(*arguments), env={**environment(), **variables}, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == arguments[0].count("conf") and b"Traceback" not in done.stderr, done
    for name in ("report.html", "page.html"):
        assert "<i>" not in Path(name).read_text("utf-8")


def test_pythonioencoding_ascii() -> None:
    done = subprocess.run(
        command("postcopy", ODD, *SOFT),
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"") and rb"\xe9\u4e2d\x1b[31m\n\udcff<i>" in done.stdout


def test_a_closed_stdout_of_a_shell_and_a_reader_that_goes_away() -> None:
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        text = line.replace("anykvm", " ".join(command()))
        return subprocess.run(["sh", "-c", text], env=environment(), capture_output=True, text=True, timeout=60)

    done = shell("anykvm caps >&-")
    assert (done.returncode, done.stderr) == (7, "anykvm: standard output: Bad file descriptor\n")
    assert shell("anykvm caps >&- 2>&-").returncode == 7
    done = shell("anykvm conformance list | head -1")
    assert done.stderr == "" and done.stdout.startswith("scenario ")


# Numbers

NUMBERS = (
    "inf",
    "-inf",
    "nan",
    "1e999",
    "-1",
    str(1 << 64),
    "0x10",
    "",
    " ",
    "one",
    "9" * 5000,
    "1e400",
    "\udcff",
    "٣",
)


def numeric_options() -> list[tuple[list[str], str]]:
    """Give each option of each command that takes a number, with the arguments its command needs."""
    return [
        *((["exec", "file", *SOFT], name) for name in ("--timeout", "--max-exits", "--load", "--entry", "--memory")),
        *((["exec", "file", *SOFT], name) for name in ("--no-access", "--read-only", "--unmap", "--beyond-file")),
        *((["explain", "file", *SOFT], name) for name in ("--timeout", "--max-exits", "--memory", "--hole")),
        *((["postcopy", "file", *SOFT, "--no-html"], name) for name in ("--prefetch", "--seed")),
        *((["conformance", "record", "out", "--scenario", "no_such"], name) for name in ("--timeout",)),
        *((["conformance", "random", "--kernel", "/no"], name) for name in ("--timeout", "--jobs", "--seeds")),
        *((["oracle", "--kernel", "/no"], name) for name in ("--timeout", "--smp", "--memory")),
    ]


@pytest.mark.parametrize(("arguments", "option"), numeric_options(), ids=lambda value: str(value)[:40])
def test_every_number(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    for number in NUMBERS:
        tail = ["true"] if arguments[0] == "oracle" else []
        with pytest.raises(SystemExit) as info:
            main([*arguments, option, number, *tail])
        out, errors = capsys.readouterr()
        assert info.value.code != 70 and "Traceback" not in errors, (number, errors)
        if info.value.code != 0:
            lines = [line for line in errors.splitlines() if line.startswith("anykvm: ")]
            assert len(lines) == 1, (number, errors)
        if number in ("inf", "nan", "1e999", "", "one", "-1") and option != "--seed":
            assert info.value.code == 2 and "see anykvm" in errors or "--seeds" in errors, (number, errors)


# Bugs, and signals


def test_a_bug_is_one_line_and_its_traceback_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("some\nlines")

    monkeypatch.setattr(doctor_module, "probe_soft", broken)
    monkeypatch.delenv("ANYKVM_DEBUG", raising=False)
    with pytest.raises(SystemExit) as info:
        main(["doctor"])
    errors = capsys.readouterr().err
    assert info.value.code == 70 and len(errors.splitlines()) == 1
    assert "a bug of anykvm: ZeroDivisionError: some lines (test_cli_conditions.py:" in errors
    assert "ANYKVM_DEBUG=1" in errors
    monkeypatch.setenv("ANYKVM_DEBUG", "1")
    with pytest.raises(SystemExit) as info:
        main(["doctor"])
    errors = capsys.readouterr().err
    assert info.value.code == 70 and errors.startswith("Traceback") and "in broken" in errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device"), 7, "anykvm: No space left on device"),
        (OSError(2, "No such file", "a\nb"), 7, "anykvm: a b: No such file"),
        (OSError(2, "No such file", b"a\xff"), 7, r"anykvm: a\udcff: No such file"),
        (MemoryError(), 7, "anykvm: out of memory"),
        (KeyboardInterrupt(), 130, "anykvm: interrupted"),
    ],
)
def test_what_the_machine_can_cause_is_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr(doctor_module, "probe_soft", failing)
    with pytest.raises(SystemExit) as info:
        main(["doctor"])
    assert (info.value.code, capsys.readouterr().err) == (code, f"{line}\n")


def test_ctrl_c_while_the_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    with pytest.raises(SystemExit) as info:
        main(["caps"])
    assert (info.value.code, capsys.readouterr()) == (130, ("", "anykvm: interrupted\n"))


def test_ctrl_c_at_the_interpreter_s_end_is_quiet() -> None:
    program = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["anykvm", "--version"]
from anykvm.cli import main
main()
"""
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "") and done.stdout.startswith("anykvm ")


# Terminals


def on_a_terminal(columns: int, *arguments: object) -> tuple[int, str]:
    """Run a command whose stdout and stderr are a terminal so wide; gives its code and what it wrote."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**environment(), "TERM": "xterm-256color"}
    del env["COLUMNS"], env["NO_COLOR"]
    with subprocess.Popen(command(*arguments), env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                text += os.read(ours, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
        os.close(ours)
        return process.wait(30), text.decode()


@pytest.mark.parametrize("columns", [1, 40])
def test_nothing_is_cut_on_a_terminal(columns: int) -> None:
    code, text = on_a_terminal(columns, "caps", "--all")
    assert code == 0 and "\x1b[1mcapability" in text
    for name in CAP_NAMES.values():
        assert f"\n{name.removeprefix('KVM_CAP_')} " in text
    code, text = on_a_terminal(columns, "postcopy", "file", *SOFT)
    assert code == 0 and "\x1b[32mequal\x1b[0m" in text and "Traceback" not in text
    code, text = on_a_terminal(columns, "--help")
    assert code == 0 and "..." not in text.partition("Commands:")[2]


# Pipes


def test_in_a_pipe_a_line_a_thing() -> None:
    for columns in ("20", "200"):
        env = {**environment(), "COLUMNS": columns, "FORCE_COLOR": "1"}
        texts = {
            arguments: subprocess.run(command(*arguments), env=env, capture_output=True, text=True, check=True).stdout
            for arguments in (("conformance", "list"), ("caps", "--all"))
        }
        first, *lines = texts["conformance", "list"].splitlines()
        rows = [line.split() for line in lines]
        assert first.split()[:3] == ["scenario", "area", "needs"]
        assert sorted(row[0] for row in rows if not row[0].endswith(":")) == sorted(load())
        assert all(len(row) == len(first.split()) for row in rows if not row[0].endswith(":"))
        first, *lines = texts["caps", "--all"].splitlines()
        names = [line.split()[0] for line in lines if "cannot be asked" not in line]
        assert names == [name.removeprefix("KVM_CAP_") for name in CAP_NAMES.values()]
        assert "\x1b" not in "".join(texts.values())


def test_help_has_whole_summaries() -> None:
    for columns in ("30",):
        env = {**environment(), "COLUMNS": columns}
        for arguments in ((), ("conformance",)):
            text = subprocess.run(command(*arguments, "--help"), env=env, capture_output=True, text=True).stdout
            assert "..." not in text.partition("Commands:")[2]
    words = " ".join(text.split())
    assert "record Run scenarios on a backend and write a file of records." in words


def test_compare_prints_what_differs_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    def compared(*arguments: str) -> tuple[object, list[str]]:
        try:
            main(["conformance", "compare", *arguments])
        except SystemExit as end:
            out, errors = capsys.readouterr()
            assert errors == ""
            return end.code, out.splitlines()
        raise AssertionError

    code, differing = compared("linux-7.3", "linux-6.12")
    assert code == 0 and len(differing) == 2
    assert len(compared("linux-7.3", "linux-6.12", "-v")[1]) > 20
    code, lines = compared("records", f"{ODD}.records")
    assert code == 1 and len(lines) == 3 and lines[1].endswith("ret: expected 1, got 2")
    everything = compared("records", f"{ODD}.records", "--all")[1]
    assert everything[:2] == lines[:2] and everything[-1] == lines[-1]
    assert [line.split()[:2] for line in everything[2:5]] == [
        ["area", "scenario"],
        ["unmapped", "all"],
        ["unmapped", "unmapped_read"],
    ]
