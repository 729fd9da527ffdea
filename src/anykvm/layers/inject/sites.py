"""Sites: where a failure can be injected. Their names are the kernel's: ioctls, system calls, functions."""

from __future__ import annotations

from typing import Final

from anykvm.abi.names import ioctl_name
from anykvm.layers.inject import errnos
from anykvm.layers.inject.errnos import Row

ANY_IOCTL: Final = "ioctl"
"""Every ioctl."""
RUN: Final = "KVM_RUN"
HVA: Final = "hva_to_pfn"
"""The look-up of a page of ordinary host memory, in the page fault path (km:hva_to_pfn())."""
GMEM: Final = "kvm_gmem_get_pfn"
"""The look-up of a page of a guest_memfd, in the page fault path (gm:kvm_gmem_get_pfn())."""
LOOKUPS: Final = (HVA, GMEM)
"""Only the soft backend has these."""

REQUESTS: Final[dict[str, int]] = {ioctl_name(request): request for request in errnos.IOCTLS}
"""Site -> request number."""
WITH_GPA: Final = frozenset(
    (
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_SET_MEMORY_ATTRIBUTES",
        "KVM_PRE_FAULT_MEMORY",
        *LOOKUPS,
    )
)
"""Sites with a guest-physical range to select by."""
FAULTS: Final[dict[str, int]] = {
    "no_vma": 1,
    "denied": 2,
    "device": 1,
    "beyond_file": 3,
    "poisoned": 4,
    "interrupted": 5,
}
"""How a look-up by host address fails -> ``enum ak_host_fault``. ``denied`` is a write to a VMA that may only be read.
``device`` is a fault handler of a VM_IO or VM_PFNMAP mapping that failed (ABI.md 3.2)."""
INTERRUPTED: Final = "interrupted"


def known(site: str) -> bool:
    """Say whether there is such a site."""
    return site in REQUESTS or site in errnos.CALLS or site in LOOKUPS or site == ANY_IOCTL


def all_sites() -> tuple[str, ...]:
    """List every site, the general ones first."""
    return (ANY_IOCTL, *errnos.CALLS, *LOOKUPS, *sorted(REQUESTS))


def row(site: str, when: str = "") -> Row | None:
    """Give what a site can fail with; None where any ioctl's errno may be right, or no errno is.

    ``when`` ("early" or "late") narrows KVM_RUN's. Raises KeyError for an unknown site.
    """
    if site == RUN and when:
        return errnos.LATE if when == "late" else errnos.EARLY
    if site in (ANY_IOCTL, HVA):
        return None
    if site == GMEM:
        return errnos.GMEM
    return errnos.CALLS[site] if site in errnos.CALLS else errnos.IOCTLS[REQUESTS[site]]


def legal(request: int) -> frozenset[int]:
    """Give the errnos that an ioctl by number can give; empty for one that the table does not have.

    >>> sorted(legal(REQUESTS["KVM_TRANSLATE"]))
    [5, 14]
    """
    found = errnos.IOCTLS.get(request)
    return frozenset() if found is None else found.errnos
