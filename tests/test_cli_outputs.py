"""Every option that names a file to write, with every type of file: as opening for writing has it, in one line."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from anykvm.cli import main
from vmm_helpers import require_soft

OLD = b"old"
WRITERS = {
    "postcopy --html": (["postcopy", "file", "--backend", "soft", "--html"], []),
    "compare --html": (["conformance", "compare", "linux-7.3", "linux-6.12", "--scenario", "caps", "--html"], []),
    "record": (["conformance", "record"], ["--scenario", "unmapped_read"]),
}
REFUSERS = {
    **WRITERS,
    "random --archive": (["conformance", "random", "--kernel", "/no/kernel", "--archive"], []),
    "random --records": (["conformance", "random", "--kernel", "/no/kernel", "--records"], []),
    "oracle --console": (["oracle", "--kernel", "/no/kernel", "--console"], ["true"]),
}


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_soft()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("file").write_bytes(b"x" * 5000)


def run(options: tuple[list[str], list[str]], path: str) -> int:
    with pytest.raises(SystemExit) as info:
        main([*options[0], path, *options[1]])
    assert isinstance(info.value.code, int)
    return info.value.code


@pytest.mark.parametrize("name", REFUSERS)
def test_what_cannot_be_written_is_said_before_the_work(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("folder")
    os.symlink("loop", "loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        before = sorted(os.listdir())
        for path, words in {
            "folder": "Is a directory",
            "nowhere/out": "No such file or directory",
            "file/out": "Not a directory",
            "loop": "Too many levels of symbolic links",
            "x" * 300: "File name too long",
            "socket": "No such device or address",
        }.items():
            if name == "random --records" and path in ("folder", "socket"):
                words = "not a regular file"
            assert run(REFUSERS[name], path) == 2, path
            out, errors = capsys.readouterr()
            assert out == "" and len(errors.splitlines()) == 1 and words in errors and path in errors, errors
        assert sorted(set(os.listdir()) - {"cache"}) == before


@pytest.mark.parametrize("name", WRITERS)
def test_each_type_of_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("target", "hard"):
        Path(path).write_bytes(OLD)
        os.chmod(path, 0o640)
    os.link("hard", "twin")
    os.symlink("target", "link")
    os.symlink("made", "dangling")
    for path, real in (
        ("target", "target"),
        ("link", "target"),
        ("dangling", "made"),
        ("new", "new"),
        ("hard", "twin"),
    ):
        if Path(real).exists():
            Path(real).write_bytes(OLD)
        assert run(WRITERS[name], path) in (0, 1), (path, capsys.readouterr())
        assert len(Path(real).read_bytes()) > len(OLD) and not os.path.islink(real), path
    assert os.path.islink("link") and os.path.islink("dangling") and os.path.samefile("hard", "twin")
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in ("target", "hard")} == {0o640}
    capsys.readouterr()
    assert run(WRITERS[name], "/dev/null") in (0, 1)
    assert run(WRITERS[name], "/dev/full") == 7
    assert capsys.readouterr().err.splitlines()[-1].endswith("/dev/full: No space left on device")
    assert all(stat.S_ISCHR(os.stat(path).st_mode) for path in ("/dev/null", "/dev/full"))
    os.mkfifo("fifo")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("fifo").read_bytes()))
    reader.start()
    assert run(WRITERS[name], "fifo") in (0, 1)
    reader.join(20)
    assert len(got[0]) > 100 and stat.S_ISFIFO(os.stat("fifo").st_mode)
    assert not [found for found in os.listdir() if found.startswith(".")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device node")
def test_a_device_node_is_never_replaced(tmp_path: Path) -> None:
    try:
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    for options in WRITERS.values():
        assert run(options, "null") in (0, 1)
        assert stat.S_ISCHR(os.stat("null").st_mode)


def test_standard_output_gets_the_page_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(WRITERS["postcopy --html"], "-") == 0
    out, errors = capsys.readouterr()
    assert out.startswith("<!doctype html>") and out.rstrip().endswith("</html>") and "CRC-32    guest" in errors
    assert run(WRITERS["compare --html"], "-") in (0, 1)
    out, errors = capsys.readouterr()
    assert out.startswith("<!doctype html>") and errors.startswith("expected: ")
    assert run(WRITERS["record"], "-") == 0
    out, errors = capsys.readouterr()
    assert json.loads(out.splitlines()[0])["n"] == "ABOUT"
    assert run((["postcopy", "file", "--json", "--html"], []), "-") == 2
    assert run((["conformance", "compare", "--json", "--html"], []), "-") == 2


def test_what_is_read_is_not_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("file", "link")
    os.link("file", "twin")
    for path in ("file", "link", "twin", "./file"):
        assert run(WRITERS["postcopy --html"], path) == 2
        assert "that is the file to be read" in capsys.readouterr().err
    assert Path("file").read_bytes() == b"x" * 5000


def test_a_result_is_shown_even_if_its_report_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(WRITERS["postcopy --html"], "/dev/full") == 7
    out, errors = capsys.readouterr()
    assert "CRC-32    guest" in out and "report" not in out
    assert errors == "anykvm: --html /dev/full: No space left on device\n"
