"""The ``anykvm`` command. One module a subcommand; ``common`` has what they share."""

from __future__ import annotations

from anykvm.cli.main import main as main
