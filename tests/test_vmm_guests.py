"""The guests' bytes are what their sources say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from anykvm.vmm import guests

SOURCES = sorted(Path(guests.__file__).parent.glob("*.S"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_source_assembles_to_the_bytes(source: Path, tmp_path: Path) -> None:
    if not shutil.which("as") or not shutil.which("objcopy"):
        pytest.skip("needs GNU as and objcopy (binutils)")
    subprocess.run(["as", "--64", "-o", tmp_path / "guest.o", source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "guest.o", tmp_path / "guest.bin"], check=True)
    assert (tmp_path / "guest.bin").read_bytes() == guests.guest(source.stem)


def test_there_are_sources_and_nothing_without_one() -> None:
    binaries = sorted(path.stem for path in Path(guests.__file__).parent.glob("*.bin"))
    assert binaries == [source.stem for source in SOURCES] == ["crc32"]
