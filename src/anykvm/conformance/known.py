"""Known differences: where records may differ from this package's, and why; the files in ``differences`` say so.

A file is named after the expected records; its tables after what is compared with them (``soft`` is the soft backend
with that kernel's profile), then after scenarios::

    [soft.tpr_access]                # the whole scenario
    status = "not yet"               # or "out": these records cannot tell
    reason = "an in-kernel interrupt controller"

    [[soft.fpu.except]]              # steps, in fields (default: all of the step)
    steps = ["fresh_guest_sees"]
    fields = ["rax"]
    reason = "..."

``through`` names other records of the same kernel: what is compared with these is compared with those, and what differs
from those, on either side, is known here as well. ``like`` names another kernel's: what soft does otherwise than that
kernel, with its profile, it does otherwise than this one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any, Final, NamedTuple

from anykvm.conformance.compare import Difference, compare_scenario
from anykvm.conformance.golden_file import Record

WHOLE: Final = "*"
"""As a step: all of the scenario; as a field: all of the step."""
NOT_YET: Final = "not yet"
"""The status of a scenario that the backend does not have."""
_THROUGH: Final = "through"
_LIKE: Final = "like"


class Known(NamedTuple):
    """A field of a step in which records are known to differ, and why."""

    step: str
    field: str
    reason: str

    def covers(self, difference: Difference) -> bool:
        """Whether this is the difference's reason.

        >>> Known("read", "*", "why").covers(Difference("x", "read", "rax", 1, 2))
        True
        """
        if self.field not in (WHOLE, difference.field):
            return False
        first, _, _ = difference.step.rpartition("#")  # "read" is every step of that name, "read#2" the second
        return self.step in (WHOLE, difference.step, f"{difference.step}#1", first) or not difference.step


class Judged(NamedTuple):
    """A scenario's differences: those nobody has explained, and those that are known, with the reason."""

    unknown: list[Difference]
    known: list[tuple[Difference, str]]


@cache
def tables(expected: str) -> dict[str, Any]:
    """Read what is known to differ from these records of the package; {} where there is no such file."""
    folder = resources.files("anykvm.conformance") / "differences"
    found = [entry for entry in folder.iterdir() if entry.name == f"{expected}.toml"]
    return tomllib.loads(found[0].read_text("utf-8")) if found else {}


def table(expected: str, got: str) -> dict[str, dict[str, Any]]:
    """Give the table of one pair, by scenario: ``got`` is ``soft`` or records of this package."""
    found: dict[str, dict[str, Any]] = tables(expected).get(got, {})
    return found


def known(expected: str, got: str, scenario: str) -> list[Known]:
    """List what is known to differ in a scenario between records of this package and others.

    ``got`` is a kernel as in ``linux-7.3``, or ``soft:PROFILE``.

    >>> [entry.step for entry in known("linux-7.3", "soft:linux-7.3", "fpu")]
    ['fresh_guest_sees']
    >>> known("linux-7.3", "soft:documented", "fpu")
    []
    >>> known("linux-6.12", "soft:linux-6.12", "fpu") == known("linux-7.3", "soft:linux-7.3", "fpu")
    True
    """
    through, like = (tables(expected).get(key) for key in (_THROUGH, _LIKE))
    found = [*_direct(expected, got, scenario), *_direct(got, expected, scenario)]
    if through and table(through, got.partition(":")[0]):  # what those are compared with as well
        found += [*_direct(through, expected, scenario), *_direct(through, got, scenario)]
    if like and got == f"soft:{expected}":
        found += known(like, f"soft:{like}", scenario)
    return found


def _direct(expected: str, got: str, scenario: str) -> Iterator[Known]:
    kind, _, profile = got.partition(":")
    if profile and not _is_of(expected, profile):
        return
    entry = table(expected, kind).get(scenario, {})
    if status := entry.get("status"):
        yield Known(WHOLE, WHOLE, f"not built: {entry['reason']}" if status == NOT_YET else entry["reason"])
    for part in entry.get("except", ()):
        for step in part["steps"]:
            for field in part.get("fields", (WHOLE,)):
                yield Known(step, field, part["reason"])


def _is_of(expected: str, profile: str) -> bool:
    """Whether records are of the kernel that a profile is named after: ``linux-7.3-npt`` is of ``linux-7.3``."""
    return expected == profile or expected.startswith(f"{profile}-")


def judge(name: str, expected: list[Record], got: list[Record], entries: Iterable[Known]) -> Judged:
    """Compare a scenario's records, and tell the known differences from the others.

    >>> golden, mine = {"n": "x", "s": "read", "ret": 0, "rax": 1}, {"n": "x", "s": "read", "ret": 5, "rax": 2}
    >>> judged = judge("x", [golden], [mine], [Known("read", "rax", "why")])
    >>> [difference.field for difference in judged.unknown], [reason for _, reason in judged.known]
    (['ret'], ['why'])
    """
    listed = list(entries)
    everything = compare_scenario(name, expected, got)
    if any(entry.step == WHOLE for entry in listed):
        unknown = []
    else:
        unknown = compare_scenario(name, expected, got, [(entry.step, entry.field) for entry in listed])
    explained = [difference for difference in everything if difference not in unknown]
    return Judged(unknown, [(difference, _reason(difference, listed)) for difference in explained])


def _reason(difference: Difference, entries: list[Known]) -> str:
    return next(entry.reason.strip() for entry in entries if entry.covers(difference))
