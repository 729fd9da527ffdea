"""Fixtures for pytest: ``inject`` and ``contract``, with ``pytest_plugins = ["anykvm.testing.fixtures"]``.

pytest is not needed by the package itself, only by who loads this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from anykvm.backends.base import Backend
from anykvm.layers.contract import Contract
from anykvm.layers.inject import Inject, Rule


@pytest.fixture
def inject() -> Iterator[Callable[..., Inject]]:
    """Give ``inject(backend, *rules)``, which makes an ``Inject``. A test in which it injected nothing fails."""
    made: list[Inject] = []

    def make(backend: Backend, *rules: Rule | str) -> Inject:
        made.append(Inject(backend, rules))
        return made[-1]

    yield make
    idle = [layer for layer in made if not layer.fired]
    assert not idle, f"nothing was injected: no call matched {', '.join(map(str, idle[0].rules)) or 'no rule'}"


@pytest.fixture
def contract() -> Iterator[Callable[[Backend], Contract]]:
    """Give ``contract(backend)``, which makes a ``Contract``. A test in which a rule was broken fails with its name."""
    made: list[Contract] = []

    def make(backend: Backend) -> Contract:
        made.append(Contract(backend))
        return made[-1]

    yield make
    broken = "\n".join(filter(None, (layer.summary() for layer in made)))
    assert not broken, broken
