"""The ``anykvm`` command. One module a subcommand; ``app`` joins them, ``common`` has what they share."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (``sys.argv`` if not given), and exit with an ``ExitCode``."""
    try:
        # Only here: Ctrl-C while this is imported is to end in one line too.
        from anykvm.cli.app import run

        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("anykvm: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
