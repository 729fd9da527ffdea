"""How long work gets on, on stderr. On a terminal a line that moves; elsewhere few lines."""

from __future__ import annotations

import contextlib
import shutil
import sys

from anykvm.cli.output import say, shown, write

_CLEAR = "\r\x1b[K"


class Moving:
    """A line on the terminal that the next one takes the place of. Elsewhere it is not shown."""

    def __init__(self, quiet: bool = False) -> None:
        """Show it, or be quiet."""
        self._moving = not quiet and sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        """Show a line. It is cut at the terminal's width: one that wraps could not be erased."""
        fitting = shown(text)[: max(shutil.get_terminal_size().columns - 1, 0)]
        if self._moving and fitting != self._shown:
            write(f"{self.erased()}{fitting}", sys.stderr)
            sys.stderr.flush()
            self._shown = fitting

    def end(self) -> None:
        """Leave no unfinished line behind, if the terminal is still there."""
        if erased := self.erased():
            with contextlib.suppress(OSError):
                print(erased, end="", file=sys.stderr, flush=True)

    def erased(self) -> str:
        """Give what erases the line that is shown, which is then forgotten."""
        was, self._shown = self._shown, ""
        return _CLEAR if was else ""


class Progress:
    """Says what the oracle does. One that is quiet says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        """Say it, or be quiet."""
        self._quiet = quiet
        self._line = Moving(quiet)

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            say(f"{self._line.erased()}oracle: {text}")

    def booting(self, seconds: float) -> None:
        """Show how long it has taken so far."""
        self._line.show(f"oracle: booting, {seconds:.0f} s")

    def end(self) -> None:
        """Leave no unfinished line behind."""
        self._line.end()


class Scenarios:
    """Says which scenario runs: a moving line, a line for all of them, or, if ``verbose``, a line each."""

    def __init__(self, label: str, count: int, verbose: bool = False) -> None:
        """Take whose scenarios, and how many."""
        self._label, self._count, self._verbose = label, count, verbose
        self._number = 0
        self._line = Moving(verbose)

    def started(self, name: str) -> None:
        """Say that a scenario begins."""
        self._number += 1
        if self._verbose:
            say(f"{self._label}: {name}")
        elif sys.stderr.isatty():
            self._line.show(f"{self._label}: {self._number} of {self._count}: {name}")
        elif self._number == 1:
            say(f"{self._label}: running {self._count} scenario{'s' if self._count != 1 else ''}")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave no unfinished line behind."""
        self._line.end()
