"""Files that are written as open-for-writing writes them: every type of file, every error, nothing destroyed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anykvm.host import outfile
from anykvm.host.outfile import OutFile

OLD, NEW = b"old content, which is longer", b"new"
ROOT = os.geteuid() == 0


def put(path: str | Path, data: bytes = NEW) -> None:
    with OutFile(path) as out:
        out.write(data)


def refused(path: str | Path) -> int | None:
    """Give the errno with which a path is refused before anything is written."""
    with pytest.raises(OSError) as info, OutFile(path):
        pass
    assert info.value.filename == str(path)
    return info.value.errno


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for folder, _, names in os.walk(tmp_path):
        assert not [name for name in names if name.startswith(".anykvm-")], folder


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Act as a user who is not root, in this folder."""
    if not ROOT:
        yield
        return
    for parent in (folder, *folder.parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    os.chown(folder, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_a_new_file_has_the_umask_s_mode() -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0, 0o666)):
        before = os.umask(mask)
        try:
            put(f"new{mask}")
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.stat(f"new{mask}").st_mode) == mode
        assert Path(f"new{mask}").read_bytes() == NEW


def test_nothing_happens_before_it_is_written() -> None:
    Path("file").write_bytes(OLD)
    os.symlink("nowhere", "dangling")
    with OutFile("file"), OutFile("other"), OutFile("dangling"):
        pass
    assert Path("file").read_bytes() == OLD and sorted(os.listdir()) == ["dangling", "file"]


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755, 0o4711, 0o200])
def test_a_regular_file_keeps_its_mode_and_is_replaced(mode: int) -> None:
    Path("file").write_bytes(OLD)
    os.chmod("file", mode)
    before = os.stat("file")
    reader = os.open("file", os.O_RDONLY) if ROOT or mode & 0o400 else None
    put("file")
    after = os.stat("file")
    kept = mode if ROOT else mode & ~0o6000  # the kernel takes these away when another than root writes
    assert stat.S_IMODE(after.st_mode) == kept and after.st_ino != before.st_ino and after.st_size == len(NEW)
    if reader is not None:
        assert os.read(reader, 100) == OLD  # who reads the old one is not disturbed
        os.close(reader)


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
def test_owner_and_attributes_are_kept() -> None:
    Path("file").write_bytes(OLD)
    os.chown("file", 1234, 2345)
    with contextlib.suppress(OSError):  # not every file system has them
        os.setxattr("file", "user.note", b"kept")
    attributes = os.listxattr("file")
    put("file")
    after = os.stat("file")
    assert (after.st_uid, after.st_gid, os.listxattr("file")) == (1234, 2345, attributes)


@pytest.mark.skipif(not ROOT, reason="only root can make a file of another owner")
def test_a_file_of_another_owner_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    os.chown(path, 1234, 2345)
    path.chmod(0o666)
    inode = path.stat().st_ino
    with as_nobody(tmp_path):
        put(path)
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_ino, path.read_bytes()) == (1234, 2345, inode, NEW)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "file"
    path.write_bytes(OLD)
    path.chmod(0o666)
    with as_nobody(folder):
        folder.chmod(0o555)
        try:
            put(path)
            assert refused(folder / "new") == errno.EACCES
        finally:
            folder.chmod(0o755)
    assert path.read_bytes() == NEW


def test_a_read_only_file_is_refused_to_a_user(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(0o444)
    with as_nobody(tmp_path):
        assert refused(path) == errno.EACCES
    assert path.read_bytes() == OLD


def test_hard_links_stay_one_file() -> None:
    Path("file").write_bytes(OLD)
    os.link("file", "twin")
    put("file")
    assert os.path.samefile("file", "twin") and Path("twin").read_bytes() == NEW


@pytest.mark.parametrize("depth", [1, 3])
def test_symbolic_links_are_followed(depth: int) -> None:
    os.mkdir("sub")
    Path("sub/target").write_bytes(OLD)
    os.symlink("sub/target", "link0")
    for number in range(1, depth):
        os.symlink(f"link{number - 1}", f"link{number}")
    put(f"link{depth - 1}")
    assert os.path.islink("link0") and os.path.islink(f"link{depth - 1}")
    assert Path("sub/target").read_bytes() == NEW and os.listdir("sub") == ["target"]


def test_a_dangling_link_makes_its_target() -> None:
    os.mkdir("sub")
    os.symlink("sub/new", "link")
    put("link")
    assert os.path.islink("link") and Path("sub/new").read_bytes() == NEW
    os.symlink("nowhere/new", "lost")
    assert refused("lost") == errno.ENOENT


def test_what_open_refuses_is_refused_so() -> None:
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    Path("file").write_bytes(OLD)
    os.mkdir("folder")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    cases = {
        "loop1": errno.ELOOP,
        "folder": errno.EISDIR,
        "folder/": errno.EISDIR,
        ".": errno.EISDIR,
        "": errno.ENOENT,
        "nowhere/file": errno.ENOENT,
        "file/file": errno.ENOTDIR,
        "new/": errno.EISDIR,
        "x" * 300: errno.ENAMETOOLONG,
        "socket": errno.ENXIO,
        **({"/proc/new": errno.ENOENT} if ROOT else {}),  # to others /proc is a folder that cannot be written to
    }
    for path, code in cases.items():
        assert refused(path) == code, path
        with pytest.raises(OSError) as info, open(path, "wb"):
            pass
        assert info.value.errno == code, path
    server.close()
    assert stat.S_ISSOCK(os.lstat("socket").st_mode)


def test_devices_are_written_to_and_stay() -> None:
    put("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError) as info:
        put("/dev/full")
    assert (info.value.errno, info.value.filename) == (errno.ENOSPC, "/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    os.symlink("/dev/null", "link")
    put("link")
    assert os.path.islink("link") and stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not ROOT, reason="only root can make a device node")
def test_a_device_node_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    put(path)
    assert stat.S_ISCHR(path.stat().st_mode) and path.stat().st_rdev == os.makedev(1, 3)


def test_a_fifo_gets_all_of_it() -> None:
    os.mkfifo("fifo")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("fifo").read_bytes()))
    reader.start()
    put("fifo", b"x" * 200_000)
    reader.join(20)
    assert got == [b"x" * 200_000] and stat.S_ISFIFO(os.stat("fifo").st_mode)


def test_a_fifo_whose_reader_goes_away() -> None:
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    with OutFile("fifo") as out:
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            out.write(b"x" * 200_000)


@contextlib.contextmanager
def largest(size: int) -> Iterator[None]:
    """Allow no file of this process to become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("linked", [False, True], ids=["replaced", "in place"])
def test_a_write_that_fails_leaves_the_old_content(linked: bool) -> None:
    Path("file").write_bytes(OLD)
    if linked:
        os.link("file", "twin")
    with largest(1000), pytest.raises(OSError) as info:
        put("file", b"x" * 5000)
    assert info.value.errno == errno.EFBIG and Path("file").read_bytes() == OLD


def test_a_write_that_fails_makes_no_new_file() -> None:
    with largest(1000), pytest.raises(OSError):
        put("new", b"x" * 5000)
    assert os.listdir() == []


STEPS = ("_write_all", "_sync", "_twin", "os.rename", "os.ftruncate", "os.fchmod", "os.fchown", "os.setxattr")
ERRORS = (
    OSError(errno.EIO, "no"),
    OSError(errno.ENOSPC, "no"),
    OSError(errno.EPERM, "no"),
    OSError(errno.EBUSY, "no"),
    OSError(errno.EROFS, "no"),
    KeyboardInterrupt(),
)


def fails_once(real: Callable[..., object], error: BaseException) -> Callable[..., object]:
    """Make a function that fails the first time only: by the same means the old content is put back."""
    errors = [error]

    def failing(*arguments: object) -> object:
        if errors:
            raise errors.pop()
        return real(*arguments)

    return failing


@pytest.mark.parametrize("linked", [False, True], ids=["replaced", "in place"])
@pytest.mark.parametrize("step", STEPS)
def test_whatever_fails_the_content_is_old_or_new(step: str, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in ERRORS:
        Path("file").write_bytes(OLD)
        if linked:
            Path("twin").unlink(missing_ok=True)
            os.link("file", "twin")
        owner: object = outfile if "." not in step else os
        name = step.removeprefix("os.")
        failing = fails_once(getattr(owner, name), error)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                put("file")
            except (OSError, KeyboardInterrupt):
                assert Path("file").read_bytes() == OLD, error
            else:
                assert Path("file").read_bytes() == NEW, error
        assert len(os.listdir()) == 1 + linked


def test_it_may_be_moved_or_removed_meanwhile() -> None:
    Path("file").write_bytes(OLD)
    with OutFile("file") as out:
        os.unlink("file")
        out.write(NEW)
    assert Path("file").read_bytes() == NEW
    with OutFile("file") as out:
        os.rename("file", "moved")
        Path("file").write_bytes(OLD)
        out.write(b"other")
    assert (Path("file").read_bytes(), Path("moved").read_bytes()) == (b"other", NEW)


PROGRAM = """
import sys
from anykvm.host.outfile import OutFile
with OutFile(sys.argv[1]) as out:
    print("before", flush=True)
    out.write(b"content\\n")
    print("after", flush=True)
"""


def program(path: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", PROGRAM, path], check=True, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_by_its_path(path: str) -> None:
    expected = b"before\ncontent\nafter\n"
    assert program(path, stdout=subprocess.PIPE).stdout == expected
    with open("file", "wb") as file:  # a redirection: what was printed stays
        program(path, stdout=file)
    assert Path("file").read_bytes() == expected
    ours, theirs = socket.socketpair()
    program(path, stdout=theirs)
    theirs.close()
    assert ours.makefile("rb").read() == expected
    ours.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_file_is_whole(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_bytes(OLD)
    real = os.fsync

    def sync(fd: int) -> None:
        os.kill(os.getpid(), number)
        real(fd)

    class CameError(Exception):
        pass

    def came(number: int, frame: object) -> None:
        raise CameError

    before = signal.signal(number, came)
    try:
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(CameError):
            put("file")
    finally:
        signal.signal(number, before)
    assert Path("file").read_bytes() == NEW and os.listdir() == ["file"]
