"""Writing a file: where open-for-writing would write, and a regular file whole or not at all.

What ``open(path, "w")`` means by a path is kept. Symbolic links are followed. A device, a FIFO or a terminal is written
to, and never replaced. Errors are the kernel's. Two things are better than with ``open``:

* Whether the path can be written is found out when the ``OutFile`` is made, before the work whose result goes there.
  Nothing is created or changed then.
* A regular file is replaced by rename(2), so that whoever reads it meets the old content or the new. The new file has
  the owner, the mode and the extended attributes of the old. If anything fails the old content stays, and no other
  file is left behind.

A regular file is written in place where a rename would not do: it has several hard links, it is a mount point, its
folder cannot be written to, or its owner or attributes cannot be given to another file. Space is then allocated
first, and the old content is put back after an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import stat
import sys
from collections.abc import Iterator
from typing import Final

from anykvm.host.closing import Closing

_OPEN: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
_HELD: Final = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))
_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM))
"""Errors that writing in place would meet as well, or that must not cost the old content."""
_NO_TMPFILE: Final = frozenset((errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT))


class OutFile(Closing):
    """A file that will be written, once. A context manager.

    >>> with OutFile("/dev/null") as out:
    ...     out.write(b"text")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Find out where to write. A FIFO without a reader is waited for, as by ``open``.

        Raises OSError, with the path in it, as opening the path for writing would.
        """
        self.path = os.fspath(path)
        self._fd = -1
        try:
            self._fd = self._opened()
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), self.path) from None

    def write(self, data: bytes) -> None:
        """Write all of it: to a regular file whole or not at all. Raises OSError with the path in it."""
        try:
            if self._fd >= 0 and not stat.S_ISREG(os.fstat(self._fd).st_mode):
                self._flush_standard()
                _write_all(self._fd, data)
                return
            # Once more, for who has moved or removed it meanwhile.
            self.close()
            self._fd = self._opened()
            if self._fd < 0:
                _create(os.path.realpath(self.path), data)
            elif _standard(self.path) is not None:
                self._flush_standard()
                _write_all(self._fd, data)
            else:
                _replace(self._fd, os.path.realpath(self.path), data)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), self.path) from None

    def close(self) -> None:
        """Let go of it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _opened(self) -> int:
        """Open what is there; -1 if nothing is, and it can be created."""
        number = _standard(self.path)
        if number is not None:
            return os.dup(number)
        try:
            return os.open(self.path, _OPEN)
        except FileNotFoundError:
            if not self.path:
                raise
        if self.path.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _check_folder(os.path.dirname(os.path.realpath(self.path)))
        return -1

    def _flush_standard(self) -> None:
        # What was printed before comes before.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()


def _standard(path: str) -> int | None:
    """Tell whether a path is the pipe, socket or regular file that is standard output or error.

    Such a file is written to through the descriptor that is open: a second one would begin at its start, and sockets
    cannot be opened at all.
    """
    for number in (1, 2):
        try:
            status = os.fstat(number)
            if stat.S_ISCHR(status.st_mode) or not os.path.samestat(os.stat(path), status):
                continue
        except OSError:
            continue
        return number
    return None


def _check_folder(folder: str) -> None:
    """Raise the OSError that creating a file in a folder would raise."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    with _signals_held():
        fd, name = _temporary(folder, 0o600)
        os.close(fd)
        os.unlink(name)


def _temporary(folder: str, mode: int) -> tuple[int, str]:
    name = os.path.join(folder, f".anykvm-{secrets.token_hex(8)}")
    return os.open(name, _OPEN | os.O_CREAT | os.O_EXCL, mode), name


def _create(target: str, data: bytes) -> None:
    with _signals_held():
        # The kernel applies the umask, or the folder's default ACL.
        fd, name = _temporary(os.path.dirname(target), 0o666)
        _put_in_place(fd, name, target, data)


def _replace(old: int, target: str, data: bytes) -> None:
    """Give the regular file ``old``, whose name is ``target``, new content."""
    with _signals_held():
        try:
            made = _twin(old, target)
            if made is not None:
                _put_in_place(*made, target, data)
                return
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
        _overwrite(old, data)


def _twin(old: int, target: str) -> tuple[int, str] | None:
    """Make an empty file beside ``target`` that differs from it in content alone. None, or OSError, if it cannot be."""
    status = os.fstat(old)
    if status.st_nlink != 1 or not os.path.samestat(os.lstat(target), status):
        return None
    fd, name = _temporary(os.path.dirname(target), 0o600)
    try:
        made = os.fstat(fd)
        if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(fd, status.st_uid, status.st_gid)
        for attribute in os.listxattr(old):
            os.setxattr(fd, attribute, os.getxattr(old, attribute))
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        if set(os.listxattr(fd)) == set(os.listxattr(old)):
            return fd, name
    except BaseException:
        _forget(fd, name)
        raise
    _forget(fd, name)
    return None


def _put_in_place(fd: int, name: str, target: str, data: bytes) -> None:
    """Write a temporary file, and give it its name. It is gone if that fails."""
    try:
        _write_all(fd, data)
        _sync(fd)
        os.rename(name, target)
    except BaseException:
        _forget(fd, name)
        raise
    os.close(fd)


def _forget(fd: int, name: str) -> None:
    os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)


def _overwrite(fd: int, data: bytes) -> None:
    """Write into the file itself; after an error put back what was there, as far as it can be read."""
    size = os.fstat(fd).st_size
    before = _start_of(fd, min(size, len(data)))
    try:
        try:
            if data:
                os.posix_fallocate(fd, 0, len(data))
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
        _write_all(fd, data)
        _sync(fd)
        # Last: what it cuts off could not be put back.
        os.ftruncate(fd, len(data))
    except BaseException:
        with contextlib.suppress(OSError):
            os.lseek(fd, 0, os.SEEK_SET)
            _write_all(fd, before)
            os.ftruncate(fd, size)
        raise


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not every file system has it
            raise


def _start_of(fd: int, length: int) -> bytes:
    """Read the start of a file that is open for writing; nothing if it may not be read."""
    try:
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return file.read(length)
    except OSError:
        return b""


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keep the signals that end a program until the file is whole or gone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
