"""The sdist is the checkout; requirements have lower bounds, which tools/check_dist.sh installs and tries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
GENERATED: Final = {"PKG-INFO", "setup.cfg"}
"""What an sdist has beyond the checkout, with src/anykvm.egg-info."""
BUILT: Final = (".so", ".o", ".a", ".pyc", ".whl", ".tar.gz")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that git knows and that are there."""
    if shutil.which("git") is None:
        pytest.skip("NOT TESTED: the sdist's content: there is no git")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: the sdist's content: git ls-files: {done.stderr.strip()}")
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist made from a copy of the checkout, where no earlier build has left anything."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def test_the_sdist_is_the_checkout(tracked: list[str], sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    assert sorted(name for name in names if name not in GENERATED and ".egg-info/" not in name) == tracked


def test_its_scripts_can_be_executed(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        modes = {member.name.partition("/")[2]: member.mode for member in archive}
    scripts = [name for name in modes if name == ".ci/run" or (name.startswith("tools/") and name.endswith(".sh"))]
    assert len(scripts) > 3 and all(modes[name] & 0o111 == 0o111 for name in scripts), modes


def test_nothing_built_and_no_place_of_this_machine_is_kept(tracked: list[str]) -> None:
    assert not [name for name in tracked if name.endswith(BUILT)]
    assert not [name for name in tracked if str(ROOT).encode() in (ROOT / name).read_bytes()]


@pytest.mark.parametrize("what", ["run", "build", "dev"])
def test_every_requirement_has_a_lower_bound(what: str) -> None:
    line = [sys.executable, str(ROOT / "tools/lower_bounds.py"), what]
    found = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    declared = {
        "run": PROJECT["project"]["dependencies"],
        "build": PROJECT["build-system"]["requires"],
        "dev": PROJECT["project"]["optional-dependencies"]["dev"],
    }[what]
    assert len(found) == len(declared)
    for pinned, requirement in zip(found, declared, strict=True):
        name, _, version = pinned.partition("==")
        assert requirement.startswith((f"{name}>={version}", f"{name}=={version}"))


@pytest.mark.parametrize("requirement", ["typer", "typer<1", "typer!=0.20", "typer>0.19", "typer @ file:typer.whl"])
def test_one_without_a_lower_bound_is_refused(requirement: str) -> None:
    code = f"from lower_bounds import lower_bounds; lower_bounds([{requirement!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"{requirement}: no lower bound" in done.stderr


def test_to_develop_needs_what_to_build_needs() -> None:
    """The sdist here is built without an environment of its own."""
    assert set(PROJECT["build-system"]["requires"]) <= set(PROJECT["project"]["optional-dependencies"]["dev"])
