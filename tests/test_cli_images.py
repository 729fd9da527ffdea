"""``exec`` and ``explain`` on files of all kinds: what is recognised is named and not run; what is not, is run."""

from __future__ import annotations

import gzip
import os
import socket
import sys
from pathlib import Path

import pytest

from anykvm.cli import main
from anykvm.vmm import formats, loaders
from image_files import CODE, DAMAGED, ELVES, FLAT, FOREIGN
from vmm_helpers import require_soft


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], command: str, path: str, *options: str) -> tuple[int, list[str]]:
    """Run a command in this process; gives its code and its lines on stderr."""
    with pytest.raises(SystemExit) as info:
        main([command, path, "--backend", "soft", "--max-exits", "5", "--timeout", "20", *options])
    out, errors = capsys.readouterr()
    assert out in ("", "Hi")
    assert isinstance(info.value.code, int)
    return info.value.code, errors.splitlines()


def refused(capsys: pytest.CaptureFixture[str], path: str, *options: str) -> str:
    """Check that both commands refuse a file in one line, the same one, and give it."""
    first, second = (run(capsys, command, path, *options) for command in ("exec", "explain"))
    assert first == second
    code, lines = first
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"anykvm: {formats_shown(path)}: ")
    return lines[0]


def formats_shown(path: str) -> str:
    return path.encode("ascii", "backslashreplace").decode() if not path.isprintable() else path


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_recognised_is_named_and_not_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, what, runs = FOREIGN[name]
    Path("image").write_bytes(data)
    line = refused(capsys, "image")
    assert what in line and runs in line.partition(what)[2]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_elf_file_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    Path("image").write_bytes(DAMAGED[name])
    for command in ("exec", "explain"):
        code, lines = run(capsys, command, "image")
        # One that is recognised only when it does not fit into memory has named the backend before.
        assert code == 2 and len([line for line in lines if not line.startswith("backend ")]) == 1, lines


@pytest.mark.parametrize("name", [*FLAT, *ELVES])
def test_what_is_not_recognised_is_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    Path("image").write_bytes({**FLAT, **ELVES}[name])
    assert formats.recognise({**FLAT, **ELVES}[name]) is None
    code, lines = run(capsys, "exec", "image", "--timeout", "0.05", "-q")
    assert code != 2 and lines[0].startswith("backend soft")


def test_format_insists(capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    for name in ("disk", "ext4", "tar", "multiboot", "text"):
        data = FOREIGN[name][0]
        Path("image").write_bytes(data)
        assert "--format flat runs it here nevertheless" in refused(capsys, "image"), name
        Path("image").write_bytes(b"\xf4" + data[1:])
        assert run(capsys, "exec", "image", "--format", "flat")[0] == 0, name
    for name in ("vmlinux without its banner", "PVH", "multiboot ELF", "static Linux program"):
        Path("image").write_bytes(FOREIGN[name][0])
        assert "--format elf runs it here nevertheless" in refused(capsys, "image"), name
        code, lines = run(capsys, "exec", "image", "--format", "elf", "--memory", "32M")
        assert (code, lines[-1]) == (0, "hlt"), name
    for name in ("PIE", "AArch64", "dynamic", "core dump"):  # nothing can
        Path("image").write_bytes(FOREIGN[name][0])
        assert "--format" not in refused(capsys, "image"), name
        assert run(capsys, "exec", "image", "--format", "elf")[0] == 2


def test_an_elf_file_as_a_flat_binary_and_the_reverse(capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    Path("image").write_bytes(ELVES["ELF64"])
    assert run(capsys, "exec", "image", "--format", "flat", "--entry", hex(0x7C00 + 120))[0] == 0
    Path("image").write_bytes(CODE)
    code, lines = run(capsys, "exec", "image", "--format", "elf")
    assert code == 2 and "ELF" in lines[-1]


def test_what_is_no_regular_file(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("folder")
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path, words in {
            "folder": "not a regular file: a directory",
            "fifo": "not a regular file: a FIFO",
            "/dev/zero": "not a regular file: a character device",
            "socket": "No such device or address",
            "loop": "Too many levels of symbolic links",
            "dangling": "No such file",
            "missing": "No such file",
            "missing/image": "No such file",
            "x" * 300: "File name too long",
        }.items():
            assert words in refused(capsys, path), path


def test_an_empty_file_and_an_empty_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("image").write_bytes(b"")
    assert "the image is empty" in refused(capsys, "image")
    assert run(capsys, "exec", "") == (2, ["anykvm: '': No such file or directory"])


@pytest.mark.parametrize(("head", "words"), [(b"", "zeros"), (b"QFI\xfb", "a qcow2 disk image"), (CODE, "1 GiB")])
def test_a_huge_file_is_recognised_without_reading_it(
    head: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("image", "wb") as file:
        file.write(head)
        file.truncate(1 << 40)
    line = refused(capsys, "image")
    assert "larger than 1 GiB" in line and words in line


def test_python_itself_and_a_compressed_one(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, sys.executable)
    assert "dynamically linked" in line or "position-independent" in line or "static Linux program" in line
    Path("image.gz").write_bytes(gzip.compress(Path(sys.executable).read_bytes()[:100_000]))
    assert "gzip" in refused(capsys, "image.gz")


def test_the_library_s_loader_says_the_same(tmp_path: Path) -> None:
    for name in ("PIE", "shared library", "object file", "core dump", "AArch64", "x32", "ELF64 for the 386", "dynamic"):
        data, what, _ = FOREIGN[name]
        with pytest.raises(loaders.ImageError) as info:
            loaders.elf(data)
        assert what in str(info.value)
