"""The ``anykvm`` command. One module a subcommand; ``app`` joins them, ``common`` has what they share."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (``sys.argv`` if not given), and exit with an ``ExitCode``."""
    try:
        # Only here: Ctrl-C while this is imported is to end in one line too.
        from anykvm.cli.app import run

        code = run(sys.argv[1:] if arguments is None else list(arguments))
        if arguments is None:
            _quiet_end()
    except KeyboardInterrupt:
        if arguments is None:
            _quiet_end()
        with contextlib.suppress(OSError):
            print("anykvm: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _quiet_end() -> None:
    """Let Ctrl-C kill the process from here on: in the interpreter's own end it would only give a traceback.

    The output that is left is not lost: it was flushed. If the streams cannot be flushed, that was told.
    """
    with contextlib.suppress(ValueError):  # another thread than the main one
        signal.signal(signal.SIGINT, signal.SIG_DFL)
