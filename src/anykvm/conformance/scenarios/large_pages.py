"""Host memory of huge pages (hugetlb), whose pool can be empty when the guest asks."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from anykvm.conformance import guest_code as code
from anykvm.conformance.host import READ_WRITE, Host
from anykvm.conformance.layout import TEST
from anykvm.conformance.outcome import Outcome
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host import libc
from anykvm.host.libc import MADV_DONTNEED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE

AREA = "large_pages"
_HUGE = 0x200000
_MAP_HUGETLB = getattr(mmap, "MAP_HUGETLB", 0x40000)
_POOL = Path("/proc/sys/vm/nr_hugepages")


@scenario("hugetlb", area=AREA, needs=("hugetlb",))
def hugetlb(lab: Lab) -> None:
    """The second of two huge pages is refused while the pool has one, and is there when it has grown.

    Changes the machine's number of huge pages and sets it back to 0: run it in a virtual machine.
    """
    m = lab.machine()
    _pool(1)
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | _MAP_HUGETLB
    try:
        host = Host(libc.mmap(0, 2 * _HUGE, READ_WRITE, flags), 2 * _HUGE)
    except OSError as error:
        lab.step("mmap_hugetlb", Outcome(-1, error.errno or 0))
        return
    m.slot(1, TEST, 2 * _HUGE, host)
    for guest, address, step in (
        (code.READ8, TEST, "first_hugepage_read"),
        (code.WRITE8, TEST, "first_hugepage_write"),
        (code.WRITE8, TEST + _HUGE, "second_hugepage_pool_empty"),
    ):
        m.at(guest, address)
        m.run(step)
    _pool(2)
    m.run("pool_grown_resume")
    host.advise(MADV_DONTNEED)
    _pool(0)


def _pool(pages: int) -> None:
    with contextlib.suppress(OSError):  # not root: the mapping then shows what the pool has
        _POOL.write_text(f"{pages}\n")
