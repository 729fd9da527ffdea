"""How memory is accessed: the word that all of the layer shares."""

from __future__ import annotations

from enum import Enum


class Access(Enum):
    """How the guest touched memory."""

    READ = "read"
    WRITE = "write"
    EXEC = "exec"
