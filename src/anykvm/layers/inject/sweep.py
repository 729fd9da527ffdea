"""Sweep: fail the first call, then the second, and so on, until a run ends with none left to fail."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from anykvm.abi.names import errno_name
from anykvm.backends import soft_backend
from anykvm.backends.base import Backend
from anykvm.layers.inject import sites
from anykvm.layers.inject.layer import Inject
from anykvm.layers.inject.rule import WHEN, Rule
from anykvm.layers.inject.selection import Fired

Verdict = Literal["told", "recovered", "wrong success", "crash", "hang", "leak", "not fired"]
_GOOD: Final = ("told", "recovered", "not fired")
_LIMIT: Final = 10_000


@dataclass(frozen=True)
class Outcome:
    """One run of the scenario with one failure."""

    rule: Rule
    """What was to fail; ``str`` of it replays the run."""
    fired: tuple[Fired, ...]
    verdict: Verdict
    """``told``: the scenario raised an OSError with the injected errno. ``recovered``: it gave what it gives without
    failures. ``wrong success``: it gave something else. ``crash``: another exception. ``hang``: it took too long.
    ``leak``: it left a descriptor, a vCPU's mapping or a thread. ``not fired``: there are fewer such calls."""
    detail: str
    """The error, the result, or what was left."""

    @property
    def ok(self) -> bool:
        """Whether that is as it should be."""
        return self.verdict in _GOOD

    def __str__(self) -> str:
        """One line, which ends with what replays it."""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.verdict}{detail}; replay: {self.rule}"


@dataclass(frozen=True)
class Sweep:
    """What all runs gave."""

    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The runs that went wrong."""
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    def text(self) -> str:
        """One line of counts, then one for each run that went wrong."""
        counts: dict[str, int] = {}
        for outcome in self.outcomes:
            if outcome.verdict != "not fired":
                counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
        head = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing was injected"
        return "\n".join([head, *map(str, self.failures)])


def sweep(
    scenario: Callable[[Backend], Any],
    backend: Callable[[], Backend] = soft_backend,
    *,
    at: Iterable[str | Rule] | None = None,
    expected: tuple[type[BaseException], ...] = (),
    timeout: float = 10.0,
) -> Sweep:
    """Run ``scenario`` on a backend again and again, each time with another call that fails.

    ``at`` lists sites, or rules whose ``nth`` is counted up. A site stands for all errnos that it can give, of KVM_RUN
    early and late; ``hva_to_pfn`` stands for ``no_vma``, ``denied`` and ``interrupted``. Default: every ioctl that the
    scenario does, ``open`` and ``mmap``. Each run has a fresh backend of ``backend()`` and one failure. For one rule,
    runs are made for n = 1, 2, ... until one ends with nothing injected.

    The scenario gets the backend, closes what it opens, and returns what it found out. Without failures that is the
    same in each run. An OSError with the injected errno is how it says that something failed; so are ``expected``
    exceptions. Raises what the scenario raises without failures. ``timeout`` in seconds is for a run, and works on the
    main thread only.

    >>> import anykvm
    >>> def version(backend):
    ...     with anykvm.open(backend) as kvm:
    ...         return kvm.get_api_version()
    >>> print(sweep(version).text())
    9 told
    """
    plain = Inject(backend())
    plain.trace = True
    result = scenario(plain)
    left = _left(plain.inner)
    outcomes: list[Outcome] = []
    for rule in _rules(sorted(set(plain.calls)) if at is None else at):
        for nth in range(1, _LIMIT):
            outcome = _run(scenario, Inject(backend(), [replace(rule, nth=nth)]), result, expected, timeout, left)
            outcomes.append(outcome)
            if outcome.verdict == "not fired":
                break
            left = _left(plain.inner)
    return Sweep(tuple(outcomes))


def _rules(at: Iterable[str | Rule]) -> Iterator[Rule]:
    for site in at:
        if isinstance(site, Rule):
            yield site
        elif site == sites.HVA:
            yield from (Rule(site=site, fault=fault) for fault in ("no_vma", "denied", "interrupted"))
        elif site == sites.RUN:
            yield from (rule for when in WHEN for rule in _errnos(site, when))
            yield Rule(site=site, race="immediate_exit")
        else:
            yield from _errnos(site, "")


def _errnos(site: str, when: str) -> Iterator[Rule]:
    row = sites.row(site, when)
    if row is None:
        raise ValueError(f"{site}: not one call's; name the calls, or give a rule")
    for number in sorted(row.errnos):
        fault = 0x1000 if errno_name(number) == "EHWPOISON" and site == sites.RUN else -1
        yield Rule(site=site, errno=errno_name(number), when=when, memory_fault=fault)


def _run(
    scenario: Callable[[Backend], Any],
    inject: Inject,
    plain: Any,
    expected: tuple[type[BaseException], ...],
    timeout: float,
    before: dict[str, int],
) -> Outcome:
    rule = inject.rules[0]
    verdict, detail = _perform(scenario, inject, plain, expected, timeout)
    grown = _grown(before, _left(inject.inner))
    if grown:
        gc.collect()  # not each time: it takes longer than the run
        grown = _grown(before, _left(inject.inner))
    if grown and verdict in _GOOD:
        verdict, detail = "leak", ", ".join(grown) + (f", after {detail}" if detail else "")
    if not inject.fired and verdict == "recovered":
        verdict = "not fired"
    return Outcome(rule, tuple(inject.fired), verdict, detail)


def _perform(
    scenario: Callable[[Backend], Any],
    inject: Inject,
    plain: Any,
    expected: tuple[type[BaseException], ...],
    timeout: float,
) -> tuple[Verdict, str]:
    try:
        with _limited(timeout):
            result = scenario(inject)
    except _Hang:
        return "hang", f"more than {timeout:g} s"
    except expected as error:
        return "told", f"{type(error).__name__}: {error}"
    except OSError as error:
        mine = bool(inject.fired) and error.errno in _told(inject.fired)
        return "told" if mine else "crash", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    return ("recovered", "") if result == plain else ("wrong success", f"{result!r}, not {plain!r}")


def _told(fired: Iterable[Fired]) -> set[int]:
    """Give the errnos that may say so."""
    numbers: set[int] = set()
    for one in fired:
        numbers |= {one.rule.number} if one.rule.errno else {errno.EFAULT, errno.EINTR}  # of a page's look-up
    return numbers


class _Hang(BaseException):
    """The scenario took too long."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: object) -> None:
        raise _Hang

    old = signal.signal(signal.SIGALRM, over)
    start = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        if remaining:  # somebody else's, a test runner's
            left = remaining - (time.monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), interval)


def _grown(before: dict[str, int], left: dict[str, int]) -> list[str]:
    return [f"{count - before[what]} more {what}" for what, count in left.items() if count > before[what]]


def _left(backend: Backend) -> dict[str, int]:
    """Count what a scenario could leave behind.

    A mapping that a traceback kept goes after its descriptor. The backend finds that out at the next open and close.
    """
    backend.close(backend.open())
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        vcpus = sum("kvm-vcpu" in line for line in maps)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings of vCPUs": vcpus,
        "threads": threading.active_count(),
    }
