"""How the examples start: ``python examples/NAME.py [BACKEND [PROFILE]]``, by default on the soft backend.

They end as the ``anykvm`` command does: one line that says what is wrong, and code 2 for a wrong command line, 3 for a
backend that is not here or cannot do this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import anykvm
from anykvm.backends import select


class Missing(Exception):
    """The backend cannot do this; the text is what it lacks."""


def start(example: Callable[[anykvm.Kvm], None]) -> None:
    """Run an example on the backend the command line names, and say which that is."""
    if len(sys.argv) > 3:
        _end(2, "usage: [BACKEND [PROFILE]]")
    try:
        backend = select(*(sys.argv[1:] or ["soft"])).backend
    except ValueError as error:
        _end(2, str(error))
    except (ImportError, RuntimeError) as error:
        _end(3, str(error))
    try:
        kvm = anykvm.open(backend)
    except OSError as error:
        _end(3, f"{backend.name} backend: {error}; see `anykvm doctor`")
    print(f"backend {backend.name}, profile {backend.profile}", flush=True)
    with kvm:
        try:
            example(kvm)
        except Missing as missing:
            _end(3, f"the {backend.name} backend lacks {missing}")


def _end(code: int, text: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(code)
