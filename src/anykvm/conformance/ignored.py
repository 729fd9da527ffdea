"""What is not compared, and why: as data, so that nothing is left out silently.

A rule names a scenario, a step and a field, each of which may be ``*``; a field with a dot lies inside another.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Final, NamedTuple


class Rule(NamedTuple):
    """A field that is not compared, or only in part."""

    scenario: str
    step: str
    field: str
    reason: str

    def covers(self, scenario: str, step: str, field: str) -> bool:
        """Say whether this rule is about a field of a step.

        >>> Rule("gmem_*", "create", "ret", "").covers("gmem_basic", "create", "ret")
        True
        """
        return fnmatchcase(scenario, self.scenario) and _same(step, self.step) and _same(field, self.field)


def _same(name: str, pattern: str) -> bool:
    # Steps are named "prot_read_ok?" and the like, so only a lone star is a pattern.
    return pattern in ("*", name)


_HOST_ADDRESS: Final = "a host address"
_HOST_DEVICE: Final = "contents and size of a device or of the vDSO, which are the machine's"

IGNORED: Final = (
    Rule("*", "*", "errname", "follows from errno"),
    Rule("*", "*", "sigbus.addr", _HOST_ADDRESS),
    Rule("hwpoison", "hva_base", "h", _HOST_ADDRESS),
    Rule("hwpoison", "dequeued", "addr", _HOST_ADDRESS),
    Rule("caps", "NR_VCPUS", "*", "the number of the machine's CPUs"),
    Rule("pfnmap", "read", "rax", _HOST_DEVICE),
    Rule("pfnmap", "devmem_PROT_READ_read", "rax", _HOST_DEVICE),
    Rule("pfnmap", "devmem_MAP_PRIVATE_read", "rax", _HOST_DEVICE),
    Rule("pfnmap", "pci_bar_read", "rax", _HOST_DEVICE),
    Rule("pfnmap", "len", "len", _HOST_DEVICE),
)
"""Fields that are not compared at all."""

DESCRIPTORS: Final = (
    Rule("gmem_*", "create", "ret", "a descriptor"),
    Rule("gmem_args", "create_flag_bit0_mmap", "ret", "a descriptor"),
    Rule("gmem_args", "create_huge_1TiB", "ret", "a descriptor"),
    Rule("gmem_args", "default_vm_create", "ret", "a descriptor"),
    Rule("gmem_args", "default_vm_create_mmap", "ret", "a descriptor"),
    Rule("gmem_args", "default_vm_create_mmap_initshared", "ret", "a descriptor"),
    Rule("gmem_args", "default_vm_create_initshared_only", "ret", "a descriptor"),
    Rule("gmem_mmap*", "create_mmap_initshared", "ret", "a descriptor"),
    Rule("gmem_mmap*", "swp_create_mmap", "ret", "a descriptor"),
    Rule("gmem_mmap*", "swp_create_mmap_only", "ret", "a descriptor"),
)
"""Results of which only success is compared: which descriptor is free is no fact about KVM."""


def rules() -> Iterator[Rule]:
    """Give every rule."""
    yield from IGNORED
    yield from DESCRIPTORS


def ignored(scenario: str, step: str, field: str) -> bool:
    """Say whether a field is not compared.

    >>> ignored("caps", "NR_VCPUS", "sys"), ignored("caps", "NR_MEMSLOTS", "sys")
    (True, False)
    """
    return any(rule.covers(scenario, step, field) for rule in IGNORED)


def is_descriptor(scenario: str, step: str, field: str) -> bool:
    """Say whether a field is a descriptor, of which only success is compared."""
    return any(rule.covers(scenario, step, field) for rule in DESCRIPTORS)
