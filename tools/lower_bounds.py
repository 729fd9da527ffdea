"""Print the lowest versions that pyproject.toml declares, as constraints for pip: ``typer==0.19``, one a line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lower_bounds(requirements: list[str]) -> list[str]:
    """Turn ``name>=version,<other`` into ``name==version``. Raises ValueError for one without a lower bound.

    >>> lower_bounds(["capstone>=5.0.1,<6"])
    ['capstone==5.0.1']
    """
    pinned = []
    for requirement in requirements:
        found = re.match(r"([A-Za-z0-9_.-]+)>=([0-9a-z.]+)", requirement)
        if not found:
            raise ValueError(f"{requirement}: no lower bound")
        pinned.append(f"{found[1]}=={found[2]}")
    return pinned


if __name__ == "__main__":
    print("\n".join(lower_bounds(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])))
