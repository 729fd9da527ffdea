"""``--inject`` of the commands: failures on demand between the guest's machine and KVM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from anykvm.backends import Selection
from anykvm.cli.common import ExitCode, Fail
from anykvm.cli.guest import say
from anykvm.layers.inject import Inject, rules

InjectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--inject",
        metavar="FILE|RULE",
        help="Let something fail: a rule such as KVM_RUN:errno=EFAULT,nth=2, or a file of them (*.toml).",
    ),
]


@contextlib.contextmanager
def injecting(selection: Selection, wanted: list[str] | None) -> Iterator[Selection]:
    """Give the backend with the failures in front of it; say at the end, on stderr, what was injected.

    Fails in one line for a wrong rule or file.
    """
    if not wanted:
        yield selection
        return
    try:
        inject = Inject(selection.backend, rules(wanted))
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"--inject {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"--inject: {error}") from None
    try:
        yield selection._replace(backend=inject)
    finally:
        for fired in inject.fired:
            say(f"injected {fired}")
        if not inject.fired:
            say("injected nothing: no call matched")
