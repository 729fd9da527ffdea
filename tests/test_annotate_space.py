"""A page for which there is no space (a full filesystem, no huge page) is told from one beyond the end of the file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from anykvm.host import libc
from anykvm.layers.annotate import backing
from anykvm.layers.annotate.hostmap import HostMap, Vma

PROGRAM = Path(__file__).parent / "full_filesystem.py"
PAGE, MIB = 4096, 1 << 20
MAP_HUGETLB = 0x40000
FULL = "for which there is no space, ENOSPC: its filesystem has "


@pytest.fixture(scope="module")
def told() -> Callable[[str], dict[str, str]]:
    def run(kind: str) -> dict[str, str]:
        done = subprocess.run([sys.executable, PROGRAM, kind], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 77:
            pytest.skip(f"no {kind} filesystem can be mounted here: {done.stdout.strip()}")
        assert done.returncode == 0, done.stderr
        lines = [line.partition(": ") for line in done.stdout.splitlines()]
        return {name: rest for name, _, rest in lines}

    return run


@pytest.mark.parametrize("kind", ("tmpfs", "tmpfs-user"))
def test_a_full_tmpfs(told: Callable[[str], dict[str, str]], kind: str) -> None:
    answers = told(kind)
    known = 0
    for shared in ("shared", "private"):
        for held in ("open", "closed", "unlinked"):
            for access in ("read", "write", "last"):
                answer = answers[f"{shared} {held} {access}"]
                assert answer.startswith(f"{FULL}0 of 262,144 bytes free"), answer
                known += "beyond" not in answer
            beyond = answers[f"{shared} {held} beyond"]
            assert "beyond the end of the file" in beyond
            assert ("which has 1,048,577 bytes" in beyond) == ("ENOSPC" not in beyond)
    # A file that is closed and has no name can be asked only by a privileged process.
    assert known == 18 if kind == "tmpfs" and not os.geteuid() else known >= 12
    assert answers["guest"].startswith("write to gpa 0x2000: memslot 0 maps it to ") and FULL in answers["guest"]
    assert answers["guest again"] == "Hlt()" and answers["again"] == "None"


def test_a_sparse_file_of_a_full_disk(told: Callable[[str], dict[str, str]]) -> None:
    """A hole is read without space; and a private page is this process's."""
    if os.geteuid():
        pytest.skip("only root can mount a disk image")
    answers = told("ext4")
    for held in ("open", "closed", "unlinked"):
        assert answers[f"shared {held} read"] == "None"
        assert answers[f"shared {held} write"].startswith(FULL)
        assert "beyond the end of the file, which has" in answers[f"shared {held} beyond"]
        assert answers[f"private {held} write"] == "None"
    assert FULL in answers["guest"] and answers["guest again"] == "Hlt()" and answers["again"] == "None"


def huge_pages_free() -> int:
    try:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    except OSError:
        pytest.skip("this kernel has no huge pages of 2 MiB")


@pytest.mark.parametrize("kind", ("memfd", "anonymous"))
@pytest.mark.parametrize("write", (False, True))
def test_no_huge_page_is_free(kind: str, write: bool) -> None:
    if huge_pages_free():
        pytest.skip("huge pages are free here, and a test does not use them up")
    access = libc.PROT_READ | libc.PROT_WRITE
    if kind == "memfd":
        fd = os.memfd_create("huge", os.MFD_HUGETLB)
        at = libc.mmap(0, 4 * MIB, access, libc.MAP_SHARED | libc.MAP_NORESERVE, fd)
        os.ftruncate(fd, 2 * MIB)  # to map it made it larger
        os.close(fd)
    else:
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE | MAP_HUGETLB
        at = libc.mmap(0, 4 * MIB, access, flags)
    try:
        with closing(HostMap()) as host:
            answer = host.ask(at + MIB, write).why
            assert answer is not None and "for which there is no space, ENOSPC: the kernel has " in answer
            assert " huge pages of 2 MiB, 0 of them free, 0 reserved" in answer
            if kind == "memfd" and not os.geteuid():
                beyond = host.ask(at + 2 * MIB, write).why
                assert beyond is not None and "beyond the end of the file, which has 2,097,152 bytes" in beyond
    finally:
        libc.munmap(at, 4 * MIB)


def test_the_end_of_a_file_is_told_with_its_size() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE + 1)
    at = libc.mmap(0, 4 * PAGE, libc.PROT_READ, libc.MAP_SHARED, fd)
    with closing(HostMap()) as host:
        assert host.ask(at + PAGE, False).why is None
        assert host.ask(at + 2 * PAGE, False).why == (
            "which is beyond the end of the file, which has 4,097 bytes (memfd:short)"
        )
    libc.munmap(at, 4 * PAGE)
    os.close(fd)


def test_what_is_neither(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inside the file, and there is space: a quota, a limit, an I/O error. And what cannot be asked at all."""
    file = tmp_path / "file"
    file.write_bytes(bytes(2 * PAGE))
    found = file.stat()
    vma = Vma(0x10000, 0x14000, "rw-s", str(file), 0, found.st_dev, found.st_ino)
    monkeypatch.setattr(backing, "_space", lambda path: backing.Space(MIB, 4 * MIB))
    assert "though it is inside it: a quota, another limit, or an I/O error" in backing.refusal(vma, 0x11000)
    assert "beyond the end of the file, which has 8,192 bytes" in backing.refusal(vma, 0x12000)
    gone = Vma(0x10000, 0x14000, "rw-s", "/nowhere", 0, 0, 1)
    assert "beyond the end of the file, no space for it, or its fault handler failed" in backing.refusal(gone, 0x11000)
    device = os.stat("/dev/null")
    driver = Vma(0x10000, 0x14000, "rw-s", "/dev/null", 0, device.st_dev, device.st_ino)
    for mapping in (driver, Vma(0x10000, 0x14000, "rw-p", "")):
        assert backing.refusal(mapping, 0x11000).startswith("which cannot be had: its fault handler failed")
