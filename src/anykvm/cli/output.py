"""What the commands write: lines and tables on stdout, lines on stderr, and files that options name.

Text that comes from outside (paths, records) is shown with everything that is not printable escaped: it cannot break a
line, move the cursor or fail to be encoded. Lines and cells are never cut. Where stdout is no terminal there is no
colour.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, Self, TextIO

from anykvm.cli.common import ExitCode, Fail
from anykvm.host.closing import Closing
from anykvm.host.outfile import OutFile

_STYLES: Final = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}
_STDOUT: Final = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def prepare_streams() -> None:
    """Make stdout and stderr take any text, and the descriptors 0 to 2 ours alone.

    A character that the encoding lacks is written as an escape. If a descriptor is closed, the next file opened would
    get its number, and what is printed would go there. It is opened such that a write to stdout fails with EBADF, as on
    the closed one, and what goes to stderr is lost.
    """
    for name, mode in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, mode)
            setattr(sys, name, os.fdopen(fd, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shown(text: str | os.PathLike[str]) -> str:
    r"""Make text from outside printable on one line.

    >>> print(shown("a\nb\udcff"), shown(""))
    a\nb\udcff ''
    """
    plain = os.fspath(text)
    if plain.isprintable():
        return plain or "''"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in plain)


def line(text: str = "", stream: TextIO | None = None) -> None:
    """Print a line to stdout, or to ``stream``. Fails in one line if that cannot be written to."""
    write(text + "\n", stream)


def write(text: str | bytes, stream: TextIO | None = None) -> None:
    """Print text, or bytes as they are and at once. Fails in one line; raises BrokenPipeError if nobody reads."""
    to = stream or sys.stdout
    try:
        if isinstance(text, bytes):
            to.flush()
            to.buffer.write(text)
            to.buffer.flush()
        else:
            to.write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Fail(ExitCode.ERRNO, f"standard {_name(to)}: {error.strerror}") from None


def print_json(value: Any) -> None:
    """Print to stdout, for a machine: in ASCII, whatever the locale. A path's undecodable bytes are lone surrogates."""
    line(json.dumps(value, indent=2))


def say(text: str) -> None:
    """Print a line to stderr."""
    line(text, sys.stderr)


def _name(stream: TextIO) -> str:
    return "error" if stream is sys.stderr else "output"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Give text a colour or a weight, if it goes to a terminal that has them and NO_COLOR is not set."""
    to = stream or sys.stdout
    if not to.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), stream: TextIO | None = None
) -> None:
    """Print a table: a line a row, at least two spaces between columns, nothing cut at any width.

    A terminal that is too narrow breaks the lines itself. ``right`` are the columns that are aligned right. An empty
    cell is printed as ``-``, so that a program can count columns.
    """
    lines = [[shown(cell) if cell else "-" for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_right = frozenset(right)
    for number, cells in enumerate(lines):
        padded = [
            cell.rjust(width) if at in to_right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        text = "  ".join(padded).rstrip()
        line(text if number else styled(text, "bold", stream), stream)


class Output(Closing):
    """The file that an option names. Whether it can be written is found out when this is made, before the work.

    ``-`` and ``/dev/stdout`` are standard output.
    """

    def __init__(self, option: str, path: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
        """Take the option's name and value, and the files that the command reads. Fails in one line.

        The fault is the user's if the path cannot be written to, or is one of the sources.
        """
        self.path = os.fspath(path)
        self.is_stdout = self.path in _STDOUT
        self._option = option
        self._file: OutFile | None = None
        if self.is_stdout:
            return
        if any(_same(self.path, source) for source in sources):
            raise Fail(ExitCode.USAGE, f"{option} {shown(path)}: that is the file to be read")
        try:
            self._file = OutFile(self.path)
        except OSError as error:
            why = f"cannot be written there: {error.strerror}"
            raise Fail(ExitCode.USAGE, f"{option} {shown(path)}: {why}") from None

    @classmethod
    def maybe(cls, option: str, path: str | os.PathLike[str] | None, *sources: str | os.PathLike[str]) -> Self | None:
        """Make one if the option was given."""
        return None if path is None else cls(option, path, *sources)

    @property
    def others(self) -> TextIO:
        """Where the rest of what the command prints goes: stdout, unless this is that."""
        return sys.stderr if self.is_stdout else sys.stdout

    def write(self, data: str | bytes) -> None:
        """Write all of it; text in UTF-8, what that cannot hold as escapes. Fails in one line."""
        content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
        if self._file is None:
            write(content)
            return
        try:
            self._file.write(content)
        except OSError as error:
            raise Fail(ExitCode.ERRNO, f"{self._option} {shown(self.path)}: {error.strerror}") from None

    def close(self) -> None:
        """Let go of it."""
        if self._file is not None:
            self._file.close()


class LiveFile(Closing):
    """The file that an option names, written while the work goes on: emptied now, and never replaced."""

    def __init__(self, option: str, path: str | os.PathLike[str]) -> None:
        """Open it for writing. Fails in one line."""
        self._name = f"{option} {shown(path)}"
        try:
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise Fail(ExitCode.USAGE, f"{self._name}: cannot be written there: {error.strerror}") from None

    def write(self, data: bytes) -> int:
        """Write all of it. Fails in one line."""
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            raise Fail(ExitCode.ERRNO, f"{self._name}: {error.strerror}") from None
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Close it."""
        self._file.close()


def _same(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Tell whether both are one regular file."""
    try:
        return os.path.samefile(path, other) and os.path.isfile(path)
    except OSError:
        return False
