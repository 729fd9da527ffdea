"""Print the lowest versions that pyproject.toml declares, as constraints for pip: ``typer==0.19``, one a line.

``lower_bounds.py run`` prints those of what the package needs to run, ``build`` to be built, ``dev`` to be developed.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lower_bounds(requirements: list[str]) -> list[str]:
    """Turn ``name>=version,<other`` into ``name==version``. Raises ValueError for one without a lower bound.

    >>> lower_bounds(["capstone>=5.0.1,<6", "unicorn==2.1.4"])
    ['capstone==5.0.1', 'unicorn==2.1.4']
    """
    pinned = []
    for requirement in requirements:
        found = re.match(r"([A-Za-z0-9_.-]+)[>=]=([0-9a-z.]+)", requirement)
        if not found:
            raise ValueError(f"{requirement}: no lower bound")
        pinned.append(f"{found[1]}=={found[2]}")
    return pinned


def declared(project: dict[str, Any], what: str) -> list[str]:
    """Return the requirements for ``what``: ``run``, ``build`` or ``dev``."""
    tables: dict[str, list[str]] = {
        "run": project["project"]["dependencies"],
        "build": project["build-system"]["requires"],
        "dev": project["project"]["optional-dependencies"]["dev"],
    }
    return tables[what]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the lowest versions that pyproject.toml declares.")
    parser.add_argument("what", choices=["run", "build", "dev"], nargs="?", default="run")
    print("\n".join(lower_bounds(declared(tomllib.loads(PROJECT.read_text()), parser.parse_args().what))))
