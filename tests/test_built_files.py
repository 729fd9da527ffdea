"""The compiled files hold no directory of the machine that built them: not to load from, and not as a name."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

import anykvm

PACKAGE = Path(anykvm.__file__).parent
LIBRARIES = sorted(PACKAGE.rglob("*.so"))


def search_path(library: Path) -> list[str]:
    """Where the loader looks for what a library needs, before the system's directories."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        assert isinstance(dynamic, DynamicSection)
        found = [tag for tag in dynamic.iter_tags() if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        names: list[str] = [getattr(tag, tag.entry.d_tag.removeprefix("DT_").lower()) for tag in found]
    return [place for name in names for place in name.split(":")]


def test_the_engine_and_the_contract_are_there() -> None:
    assert {"libanykvm_engine", "run"} <= {library.name.split(".")[0] for library in LIBRARIES}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_libraries_are_looked_for_beside_the_one_that_needs_them_only(library: Path) -> None:
    assert all(place.startswith("$ORIGIN") for place in search_path(library)), search_path(library)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_no_directory_of_the_build_is_named(library: Path) -> None:
    places = [PACKAGE.parents[1], Path(sysconfig.get_path("include"))]
    unicorn = importlib.util.find_spec("unicorn")
    if unicorn is not None and unicorn.origin is not None:
        places.append(Path(unicorn.origin).parent)
    content = library.read_bytes()
    assert not [str(place) for place in places if str(place).encode() in content]
