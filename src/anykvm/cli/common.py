"""What the commands share: exit codes, errors that are one line, and the choice of a backend."""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Iterator
from typing import Annotated, Final

import typer

import anykvm
from anykvm.backends import NAMES, Selection, select, soft_backend
from anykvm.backends.probe import emulated
from anykvm.backends.soft.profiles import PROFILES, RESEARCH

LONGEST: Final = 1_000_000_000
"""Seconds; 31 years. Beyond it the kernel's timers and Python's overflow."""


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
    """KVM_RUN, another ioctl, or writing the output failed with an errno."""
    LIMIT = 8
    FILE = 9
    """The file changed while the guest ran."""
    AMBIGUOUS = 10
    """Explained, by more than one possible cause."""
    NOTHING = 11
    """There was no failure to explain."""
    BUG = 70
    """anykvm itself is wrong. With ANYKVM_DEBUG=1 the traceback is shown."""
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


def choose_for_faults(name: str, profile: str | None) -> Selection:
    """Choose as ``choose``, but ``auto`` does not take a KVM that cannot report faults on guest memory."""
    selection = choose(name, profile)
    if name == "auto" and profile is None and selection.backend.name == "device" and (why := emulated()):
        return Selection(soft_backend(), f"device: {why[0].split(';')[0]}, so no faults", selection.probes)
    return selection


def seconds(text: str) -> float:
    """Read a time in seconds. Raises typer.BadParameter for what is none that can be waited for.

    >>> seconds("0.5")
    0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST:  # also false for nan
        raise typer.BadParameter(f"{text!r} is not a number of seconds from 0 to {LONGEST:,}")
    return value


@contextlib.contextmanager
def opened(selection: Selection) -> Iterator[anykvm.Kvm]:
    """Open KVM on a chosen backend, failing in one line."""
    try:
        kvm = anykvm.open(selection.backend)
    except OSError as error:
        raise Fail(ExitCode.BACKEND, f"{selection.backend.name} backend: {error}; try `anykvm doctor`") from None
    with kvm:
        yield kvm
