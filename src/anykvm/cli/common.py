"""What the commands share: exit codes, errors that are one line, and the choice of a backend."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import anykvm
from anykvm.backends import NAMES, Selection, select
from anykvm.backends.soft.profiles import PROFILES, RESEARCH


class ExitCode(enum.IntEnum):
    """How an ``anykvm`` command ends."""

    OK = 0
    FAILED = 1
    """It ran, and the result is wrong."""
    USAGE = 2
    """A wrong option, or a file that cannot be used."""
    BACKEND = 3
    """There is no such backend here, or it does not work."""
    SHUTDOWN = 4
    MEMORY_FAULT = 5
    INTERNAL = 6
    """KVM gave up: internal error, failed entry, an exit nothing here can serve."""
    ERRNO = 7
    """KVM_RUN or another ioctl failed with an errno that is not an exit."""
    LIMIT = 8
    FILE = 9
    """The file changed while the guest ran."""
    AMBIGUOUS = 10
    """Explained, by more than one possible cause."""
    NOTHING = 11
    """There was no failure to explain."""
    TIMEOUT = 124
    HUNG_UP = 129
    """SIGHUP: the terminal is gone."""
    INTERRUPTED = 130
    TERMINATED = 143


class Fail(Exception):
    """End the command with this one line on stderr and this code."""

    def __init__(self, code: ExitCode, text: str) -> None:
        """Take the text without ``anykvm:`` in front."""
        super().__init__(text)
        self.code = code


_KNOWN = f"{', '.join(PROFILES)}; for research {', '.join(RESEARCH)}"
BackendOption = Annotated[
    str, typer.Option("--backend", metavar="|".join(NAMES), help="Whose KVM: the kernel's, or the one in user space.")
]
ProfileOption = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"Whose behaviour, with the soft backend: {_KNOWN}.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")]


def choose(name: str, profile: str | None) -> Selection:
    """Choose a backend as ``anykvm.backends.select``, failing in one line."""
    try:
        return select(name, profile)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, str(error)) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise Fail(ExitCode.BACKEND, f"{name} backend: {error}") from None


@contextlib.contextmanager
def opened(selection: Selection) -> Iterator[anykvm.Kvm]:
    """Open KVM on a chosen backend, failing in one line."""
    try:
        kvm = anykvm.open(selection.backend)
    except OSError as error:
        raise Fail(ExitCode.BACKEND, f"{selection.backend.name} backend: {error}; try `anykvm doctor`") from None
    with kvm:
        yield kvm


def check_writable(option: str, path: str | Path, *, replaced: bool = False) -> None:
    """Fail in one line if a file cannot be written: before the work whose result goes there, not behind it.

    ``replaced``: it is renamed into its place, so what counts is the folder.
    """
    path = Path(path)
    there = path if path.exists() and not replaced else path.parent
    if path.is_dir() or not (there is path or there.is_dir()) or not os.access(there, os.W_OK):
        raise Fail(ExitCode.USAGE, f"{option} {path}: cannot be written there")


def print_json(value: Any) -> None:
    """Print to stdout, for a machine."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
