"""Post-copy end to end on the soft backend: the guest's CRC is zlib's, and every page came by a memory fault."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import time
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest

import anykvm
from anykvm.backends import Backend
from anykvm.backends.probe import emulated
from anykvm.cli import main
from anykvm.vmm.postcopy import FILE_GPA, FileError, Result, Source, run, visiting_order
from anykvm.vmm.report import heat_map, histogram, render, write_report
from anykvm.vmm.resolvers import FileResolver, Unresolvable
from conftest import probe
from vmm_helpers import anykvm as run_command
from vmm_helpers import assert_one_line, command, environment, require_soft

PAGE = 4096


Make = Callable[[int], Path]


@pytest.fixture(scope="module")
def soft() -> Backend:
    return require_soft()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def file(size: int) -> Path:
        path = tmp_path / f"file-{size}"
        path.write_bytes(random.Random(size).randbytes(size))
        return path

    return file


def postcopy(backend: Backend, path: Path, **options: Any) -> Result:
    with anykvm.open(backend) as kvm, Source(str(path)) as source:
        return run(kvm, source, **options)


@pytest.mark.parametrize("order", ["random", "sequential"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 4096, 4097, 5 * PAGE, 37 * PAGE + 1234])
def test_the_guests_crc_is_zlibs(soft: Backend, make: Make, size: int, order: Literal["random", "sequential"]) -> None:
    path = make(size)
    result = postcopy(soft, path, order=order)
    assert result.crc_guest == result.crc_zlib == zlib.crc32(path.read_bytes())
    assert result.correct
    assert result.pages == -(-size // PAGE)
    assert list(result.faults.page) == list(visiting_order(result.pages, order, 0))
    assert len(result.faults.time_ns) == len(result.faults.latency_ns) == result.pages
    assert sorted(result.faults.time_ns) == list(result.faults.time_ns)
    assert (result.backend, result.profile) == ("soft", "documented")


def test_each_seed_has_its_order(soft: Backend, make: Make) -> None:
    path = make(40 * PAGE)
    first, second, again = (postcopy(soft, path, seed=seed) for seed in (1, 2, 1))
    assert first.correct and second.correct
    assert list(first.faults.page) == list(again.faults.page) != list(second.faults.page)
    assert sorted(first.faults.page) == list(range(40))


def test_prefetch_saves_faults(soft: Backend, make: Make) -> None:
    path = make(64 * PAGE)
    result = postcopy(soft, path, order="sequential", prefetch=7)
    assert result.correct
    assert list(result.faults.page) == list(range(0, 64, 8))
    scattered = postcopy(soft, path, order="random", prefetch=7)
    assert scattered.correct and len(scattered.faults.page) < 64
    everything = postcopy(soft, path, order="random", prefetch=1000, seed=3)
    assert everything.correct and len(everything.faults.page) < 10


def test_progress_ends_with_all_pages(soft: Backend, make: Make) -> None:
    seen: list[int] = []
    postcopy(soft, make(5 * PAGE), progress=seen.append)
    assert seen[-1] == 5


def test_a_kernel_that_gives_a_bare_efault_is_said(make: Make) -> None:
    backend = require_soft("linux-7.3")
    with pytest.raises(OSError, match="does not say which"):
        postcopy(backend, make(PAGE))


def test_a_file_that_shrinks_meanwhile(soft: Backend, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(20 * PAGE)
    truncate_at_fault(monkeypatch, path, 10, 3 * PAGE)
    with pytest.raises(FileError, match="became shorter while the guest ran") as info:
        postcopy(soft, path, order="sequential")
    assert info.value.while_running


def test_a_file_that_is_deleted_meanwhile_is_still_there(
    soft: Backend, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(20 * PAGE)
    at_fault(monkeypatch, 10, path.unlink)
    assert postcopy(soft, path).correct
    assert not path.exists()


def test_nothing_is_left_behind(soft: Backend, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(20 * PAGE)
    postcopy(soft, path)
    before = sorted(os.listdir("/proc/self/fd"))
    postcopy(soft, path)
    truncate_at_fault(monkeypatch, path, 10, 3 * PAGE)
    with pytest.raises(FileError):
        postcopy(soft, path, order="sequential")
    assert sorted(os.listdir("/proc/self/fd")) == before


def at_fault(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something to the world just before a fault is resolved."""
    original = FileResolver.resolve
    count = 0

    def resolve(self: FileResolver, fault: anykvm.MemoryFault) -> int:
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(self, fault)

    monkeypatch.setattr(FileResolver, "resolve", resolve)


def truncate_at_fault(monkeypatch: pytest.MonkeyPatch, path: Path, number: int, size: int) -> None:
    at_fault(monkeypatch, number, lambda: os.truncate(path, size))


# The report


def open_files(pid: int) -> set[str]:
    """What a process has open."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


class Page(HTMLParser):
    """Collects a page's tags, and fails on what would need the network."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(soft: Backend, make: Make) -> None:
    result = postcopy(soft, make(37 * PAGE + 1))
    text = render("a <b> & c", result)
    page = Page(text)
    assert not page.open and page.tags.count("svg") == 3
    assert "a &lt;b&gt; &amp; c" in text and "<b>" not in text
    assert "Backend soft, profile documented" in text
    assert text.count(f"{result.crc_zlib:08x}") == 2 and "equal" in text
    assert f"{FILE_GPA:#x}" in text and "time since the guest started, ms" in text and "latency, µs" in text
    assert "prefers-color-scheme: dark" in text and "http" not in text


def test_every_fault_is_in_the_pictures(soft: Backend, make: Make) -> None:
    result = postcopy(soft, make(200 * PAGE))
    heat = heat_map(result)
    cells = sum(level.path.count("M") for level in heat.levels)
    assert 0 < cells <= 200
    for level in heat.levels:
        for column, row in re.findall(r"M(\d+) (\d+)h1v1h-1z", level.path):
            assert int(column) < heat.columns and int(row) < heat.rows
    tallest = max(high for _, _, high in histogram(result).bars)
    assert tallest == 1


def test_the_page_of_an_empty_file(soft: Backend, make: Make) -> None:
    page = render("empty", postcopy(soft, make(0)))
    assert "No fault" in page and not Page(page).open


def test_the_page_is_written_whole_or_not_at_all(soft: Backend, make: Make, tmp_path: Path) -> None:
    result = postcopy(soft, make(PAGE))
    out = tmp_path / "out"
    out.mkdir()
    write_report(str(out / "report.html"), "x", result)
    assert os.listdir(out) == ["report.html"]
    (out / "directory").mkdir()
    with pytest.raises(OSError):
        write_report(str(out / "directory"), "x", result)
    assert sorted(os.listdir(out)) == ["directory", "report.html"]


# The command


@pytest.mark.usefixtures("soft")
class TestCommand:
    def test_table_and_report(self, make: Make, tmp_path: Path) -> None:
        path = make(20 * PAGE + 5)
        done = run_command("postcopy", path.name, "--backend", "soft", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        crc = f"{zlib.crc32(path.read_bytes()):08x}"
        assert f"guest {crc}, zlib {crc}: equal" in done.stdout
        for words in ("soft, profile documented", "21, visited in random order (seed 0)", "faults/s", "p50", "p99"):
            assert words in done.stdout
        assert (tmp_path / "postcopy.html").read_text().startswith("<!doctype html>")

    def test_json_alone_is_on_stdout(self, make: Make, tmp_path: Path) -> None:
        path = make(20 * PAGE)
        options = (
            "--backend",
            "soft",
            "--json",
            "--order",
            "sequential",
            "--prefetch",
            3,
            "--html",
            tmp_path / "r.html",
        )
        done = run_command("postcopy", path, *options)
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["correct"] and found["faults"] == 5 and found["pages"] == 20 and found["backend"] == "soft"
        assert found["latency_us"]["p50"] <= found["latency_us"]["p99"] <= found["latency_us"]["max"]
        assert (tmp_path / "r.html").exists()

    def test_where_kvm_does_not_name_the_page_annotate_does(self, make: Make, tmp_path: Path) -> None:
        path = make(20 * PAGE + 5)
        done = run_command("postcopy", path, "--profile", "linux-7.3", "--html", tmp_path / "r.html")
        assert (done.returncode, done.stderr) == (0, "")
        crc = f"{zlib.crc32(path.read_bytes()):08x}"
        assert f"guest {crc}, zlib {crc}: equal" in done.stdout
        assert "backend   soft, profile linux-7.3, the Annotate layer finds the pages" in done.stdout
        assert "the Annotate layer works it out" in (tmp_path / "r.html").read_text()
        found = json.loads(run_command("postcopy", path, "--profile", "linux-7.3", "--json", "--no-html").stdout)
        assert (found["layers"], found["faults"]) == (["Annotate"], 21)
        assert (
            json.loads(run_command("postcopy", path, "--json", "--no-html", "--backend", "soft").stdout)["layers"] == []
        )

    def test_a_failure_names_the_backend_and_why(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def unresolvable(self: FileResolver, fault: anykvm.MemoryFault) -> int:
            raise Unresolvable("no")

        def failing(self: FileResolver, fault: anykvm.MemoryFault) -> int:
            raise OSError(errno.ENOMEM, "madvise: no memory")

        path = make(PAGE)
        monkeypatch.setattr(FileResolver, "resolve", unresolvable)
        assert self.in_process(path, "--no-html") == 5
        assert capsys.readouterr().err == "anykvm: backend soft, profile documented: no\n"
        monkeypatch.setattr(FileResolver, "resolve", failing)
        assert self.in_process(path, "--no-html") == 7
        assert capsys.readouterr().err == "anykvm: backend soft, profile documented: madvise: no memory\n"

    def test_on_the_device_it_works_or_says_what_is_in_the_way(self, make: Make) -> None:
        path = make(3 * PAGE)
        done = run_command("postcopy", path, "--backend", "device", "--no-html")
        if not probe("device").usable:
            assert "Traceback" not in done.stderr and "device" in done.stderr and done.returncode in (3, 5, 7)
        elif emulated():
            assert_one_line(done, 5, "backend device, profile kernel", "as MMIO", "kvm_pvm: no hardware virtualization")
        else:
            assert done.returncode == 0 and "device, profile kernel, the Annotate layer" in done.stdout, done.stderr

    def test_no_html(self, make: Make, tmp_path: Path) -> None:
        path = make(PAGE)
        assert run_command("postcopy", path.name, "--backend", "soft", "--no-html", cwd=tmp_path).returncode == 0
        assert os.listdir(tmp_path) == [path.name]

    def test_a_file_name_that_is_not_text(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/\xff[red]<b>"
        Path(os.fsdecode(path)).write_bytes(b"x" * 5000)
        for options in ((), ("--json",)):
            done = run_command("postcopy", os.fsdecode(path), "--backend", "soft", *options, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        assert "&lt;b&gt;" in (tmp_path / "postcopy.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (("missing",), 2, ("missing", "No such file")),
            ((".",), 2, ("not a regular file",)),
            (("/dev/zero",), 2, ("not a regular file",)),
            (("fifo",), 2, ("not a regular file",)),
            (("file", "--html", "nowhere/r.html"), 2, ("nowhere/r.html",)),
            (("file", "--html", "."), 2, ("cannot be written",)),
            (("file", "--order", "backwards"), 2, ("backwards", "postcopy --help")),
            (("file", "--prefetch", "-1"), 2, ("prefetch",)),
            (("file", "--backend", "xen"), 2, ("xen",)),
            (("file", "--profile", "linux-1.0"), 2, ("linux-1.0",)),
            ((), 2, ("FILE",)),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
        (tmp_path / "file").write_bytes(b"x" * 5000)
        os.mkfifo(tmp_path / "fifo")
        done = run_command("postcopy", *arguments, cwd=tmp_path)
        assert_one_line(done, code, *words)
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]

    def test_ctrl_c_is_one_line_and_leaves_nothing(self, tmp_path: Path) -> None:
        with open(tmp_path / "large", "wb") as file:
            file.truncate(2 << 30)
        process = subprocess.Popen(
            command("postcopy", "large", "--backend", "soft", "--order", "sequential"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        large = str(tmp_path / "large")
        while process.poll() is None and large not in open_files(process.pid):
            time.sleep(0.01)  # until it is at work: the file is open
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
        assert (process.returncode, out, errors) == (130, "", "anykvm: interrupted\n")
        assert os.listdir(tmp_path) == ["large"]

    def test_a_file_that_shrinks_is_exit_code_9(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = make(20 * PAGE)
        truncate_at_fault(monkeypatch, path, 10, 3 * PAGE)
        assert self.in_process(path, "--no-html") == 9
        assert re.fullmatch(r"anykvm: .*became shorter while the guest ran.*\n", capsys.readouterr().err)

    def test_a_file_that_changes_is_exit_code_9(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = make(20 * PAGE)
        at_fault(monkeypatch, 10, lambda: path.write_bytes(b"y" * 20 * PAGE))
        assert self.in_process(path, "--no-html") == 9
        assert "it changed while the guest ran, and the CRCs differ" in capsys.readouterr().err

    def test_a_wrong_crc_is_exit_code_1(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Source, "crc32", lambda self: 0x1234)
        assert self.in_process(make(PAGE), "--no-html") == 1
        assert "is not zlib's 00001234" in capsys.readouterr().err

    @staticmethod
    def in_process(*arguments: object) -> int:
        with pytest.raises(SystemExit) as info:
            main(["postcopy", "--backend", "soft", *(str(argument) for argument in arguments)])
        assert isinstance(info.value.code, int)
        return info.value.code


def test_without_memory_faults_it_says_so(make: Make) -> None:
    if not probe("device").usable:
        pytest.skip(f"device backend: {probe('device').reason}")
    # What a kernel does with ordinary memory: a bare EFAULT, or MMIO where KVM's instruction emulator runs the guest.
    with pytest.raises((Unresolvable, OSError), match="as MMIO, not as a memory fault|does not say which"):
        postcopy(anykvm.backend("device"), make(PAGE))
