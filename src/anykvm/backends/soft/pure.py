"""The contract as plain Python instead of its compiled form: to measure its branch coverage, and to step through it.

``ANYKVM_PURE=1`` in the environment asks for it. It needs the ``cython`` package, whose pure-Python mode the contract
is written in, and costs tens of microseconds an exit.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "ANYKVM_PURE"
MODULE: Final = "anykvm.backends.soft.run"


def wanted() -> bool:
    """Say whether the environment asks for plain Python."""
    return os.environ.get(VARIABLE) == "1"


def load() -> None:
    """Put ``run.py`` itself where the compiled module would be. Raises ImportError without the cython package."""
    spec = importlib.util.spec_from_file_location(MODULE, Path(__file__).with_name("run.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{MODULE}: run.py is not beside {__file__}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
