"""vCPUs in threads while other threads remap, protect, punch, convert, poison and delete what they access: every value
a guest reads was legal at that moment, no write is missed or done twice, and nothing crashes.

Some seconds as a test; ``ANYKVM_STRESS_SECONDS=300 pytest tests/test_stress.py``, or ``make stress``, for longer. The
``stress`` package says how. The same seed makes the same choices, at other moments.
"""

from __future__ import annotations

import errno
import os

import pytest

from anykvm.conformance import uffd
from anykvm.conformance.host import Host
from stress import board as b
from stress import host_areas
from stress.world import World

SECONDS = float(os.environ.get("ANYKVM_STRESS_SECONDS", "8"))


@pytest.mark.timeout(120 + SECONDS)
@pytest.mark.parametrize("kind", ["bitmaps", "rings"])
def test_every_value_read_was_legal(kind: str) -> None:
    with World(seed=2, rings=kind == "rings") as world:
        report = world.run(SECONDS / 2)
        choices = world.phases.choices
    assert report.checked > 1000 and report.written > 1000 and report.counted > 100
    assert {"MemoryFault", "Mmio", "Intr", "Hlt"} <= set(report.exits)
    assert report.exits["Hlt"] == b.VCPUS
    assert report.changes.total() > len(choices)
    if report.missing:
        pytest.skip(f"NOT TESTED: {report.missing}; the rest of the stress test passed")


def no_userfaultfd(host: Host) -> None:
    raise OSError(errno.EPERM, "userfaultfd: Operation not permitted")


@pytest.mark.parametrize("kind", ["bitmaps", "rings"])
@pytest.mark.parametrize("userfaultfd", [True, False], ids=["all areas", "no userfaultfd"])
def test_a_fault_on_any_page_can_be_looked_at(kind: str, userfaultfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on the last page of all, whatever area that is in: where userfaultfd is missing it is another."""
    if not userfaultfd:
        monkeypatch.setattr(host_areas, "Userfaultfd", no_userfaultfd)
    with World(seed=2, rings=kind == "rings") as world:
        assert userfaultfd or world.missing
        runner = world.runners[0]
        for page in range(len(world.areas) * b.PAGES):
            world.board.put(runner.note + b.NOTE_ADDRESS, page // b.PAGES * b.ADDRESSES)
            world.board.put(runner.note + b.NOTE_PAGE, page)
            runner.look_again()


def test_the_memory_of_an_ordinary_user_s_userfaultfd_can_be_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler is not asked for faults of system calls: process_vm_readv of such a page is EFAULT."""
    allowed = uffd._open

    def ordinary(flags: int) -> int:
        if flags == 0:
            raise PermissionError(errno.EPERM, "userfaultfd: Operation not permitted")
        return allowed(flags)

    monkeypatch.setattr(uffd, "_open", ordinary)
    with World(seed=2, rings=False) as world:
        if world.missing:
            pytest.skip(f"NOT TESTED: {world.missing}")
        area = world.areas[-1]
        assert isinstance(area, host_areas.Userfault)
        with pytest.raises(OSError, match="Bad address"):
            area.host.get(0, b.PAGE)
        area.start()
        for page in range(b.PAGES):
            assert any(area.read(page))
