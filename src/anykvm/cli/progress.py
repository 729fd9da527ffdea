"""How the oracle's machine gets on, on stderr: lines, and on a terminal how long it has been booting."""

from __future__ import annotations

import contextlib
import sys

_CLEAR = "\r\x1b[K"


class Progress:
    """Says what the oracle does. One that is quiet says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        """Say it, or be quiet."""
        self._quiet = quiet
        self._moving = not quiet and sys.stderr.isatty()
        self._shown = ""

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            print(f"{self._erased()}oracle: {text}", file=sys.stderr, flush=True)

    def booting(self, seconds: float) -> None:
        """Show how long it has taken so far; only on a terminal, in a line that the next one takes the place of."""
        text = f"oracle: booting, {seconds:.0f} s"
        if self._moving and text != self._shown:
            print(f"{self._erased()}{text}", end="", file=sys.stderr, flush=True)
            self._shown = text

    def end(self) -> None:
        """Leave no unfinished line behind, if the terminal is still there."""
        if erased := self._erased():
            with contextlib.suppress(OSError):
                print(erased, end="", file=sys.stderr, flush=True)

    def _erased(self) -> str:
        shown, self._shown = self._shown, ""
        return _CLEAR if shown else ""
