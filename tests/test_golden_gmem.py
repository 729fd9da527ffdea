"""The recorded scenario of mapped guest_memfd, with the poisoned page injected: poisoning a page of the machine needs
root, a kernel that can, and a page to lose."""

from __future__ import annotations

import errno
import os

import pytest

from anykvm.abi import EHWPOISON
from anykvm.backends.soft import SoftBackend
from anykvm.backends.soft.guest_memfd import fail_page
from anykvm.conformance import by_scenario, compare_scenario, golden, load
from anykvm.conformance.host import Host
from anykvm.conformance.host import fallocate as real_fallocate
from anykvm.conformance.host import file_mapping as real_mapping
from anykvm.conformance.record import record_scenario
from anykvm.conformance.scenarios import guest_memfd_mapped
from conftest import probe

RAW = [("mmap_MAP_PRIVATE", "ret"), ("mmap_MAP_PRIVATE", "errno")]  # mmap(2) of a memfd, which nobody refuses
MADVISE = [("madvise_hwpoison_gmem", "sigbus")]  # and the host's own look at the page


@pytest.mark.skipif(not probe("soft").usable, reason="no soft backend")
def test_gmem_mmap(monkeypatch: pytest.MonkeyPatch) -> None:
    file = 0

    def bound(fd: int, size: int, **options: bool) -> Host:
        nonlocal file
        file = fd
        return real_mapping(fd, size, **options)

    def poison(self: Host, advice: int, offset: int, length: int) -> None:
        fail_page(file, offset, EHWPOISON)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def punch(fd: int, mode: int, offset: int, length: int) -> int:
        fail_page(fd, offset, 0)  # the poisoned page has left the file
        return real_fallocate(fd, mode, offset, length)

    monkeypatch.setattr(guest_memfd_mapped, "file_mapping", bound)
    monkeypatch.setattr(guest_memfd_mapped, "fallocate", punch)
    monkeypatch.setattr(Host, "advise", poison)
    expected = golden("linux-7.3-npt")["gmem_mmap"]
    found = by_scenario(record_scenario(load()["gmem_mmap"], lambda: SoftBackend("linux-7.3")))["gmem_mmap"]
    differences = compare_scenario("gmem_mmap", expected, found, RAW + MADVISE)
    assert not differences, "\n".join(map(str, differences))
    assert len(found) == len(expected) == 27
