"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from _pytest.terminal import TerminalReporter

import anykvm
from anykvm.abi import KVM_CAP_GUEST_MEMFD_FLAGS
from anykvm.backends import Backend, Probe, probe_device, probe_soft, soft_backend
from anykvm.backends.device import DeviceBackend
from anykvm.backends.soft.profiles import PROFILES
from anykvm.layers.contract import Contract
from anykvm.testing.machine import Machine

_PROBES: dict[str, Probe] = {}


def pytest_configure() -> None:
    """Signals as in a terminal, also for who runs us in the background or under nohup, where they are ignored."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def probe(name: str) -> Probe:
    """Probe a backend once a session."""
    if name not in _PROBES:
        _PROBES[name] = probe_device() if name == "device" else probe_soft()
    return _PROBES[name]


def under_contract(backend: Backend) -> Iterator[Backend]:
    """Give the backend; with ANYKVM_CONTRACT=1 under the contract layer, and fail if the kernel's side broke a rule.

    Tests err on purpose as VMMs do, so a VMM's mistake is no failure.
    """
    if os.environ.get("ANYKVM_CONTRACT") != "1":
        yield backend
        return
    contract = Contract(backend)
    yield contract
    broken = [str(violation) for violation in contract.violations if violation.rule.whose == "kernel"]
    assert not broken, "\n".join(broken)


@pytest.fixture(params=["soft", "device"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn; one that cannot be used here skips the test, and says why."""
    found = probe(request.param)
    if not found.usable:
        pytest.skip(f"{found.name} backend: {found.reason}")
    yield from under_contract(DeviceBackend() if request.param == "device" else soft_backend())


@pytest.fixture(params=list(PROFILES))
def each_profile(request: pytest.FixtureRequest) -> str:
    """The soft backend's profiles in turn: what KVM_RUN promises, and what kernels do of it."""
    return str(request.param)


@pytest.fixture(
    params=[name for name, made in PROFILES.items() if made.capabilities.get(KVM_CAP_GUEST_MEMFD_FLAGS) != 0]
)
def mapping_profile(request: pytest.FixtureRequest) -> str:
    """Those with guest_memfds that can be mapped, and be slots' of an ordinary VM."""
    return str(request.param)


@pytest.fixture
def profile() -> str | None:
    """The profile of `machine`: the soft backend's own; a module that wants both gives its tests `each_profile`."""
    return None


@pytest.fixture
def machine(profile: str | None) -> Iterator[Machine]:
    """A long-mode machine on the soft backend."""
    for backend in under_contract(soft_backend(profile)):
        with anykvm.open(backend) as kvm, Machine(kvm) as made:
            yield made


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """SIGALRM's handler counts; no timer is left behind."""
    with _counted(signal.SIGALRM) as seen:
        yield seen
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def sigbus() -> Iterator[list[int]]:
    """SIGBUS's handler counts."""
    with _counted(signal.SIGBUS) as seen:
        yield seen


@contextmanager
def _counted(number: signal.Signals) -> Iterator[list[int]]:
    seen: list[int] = []
    old = signal.signal(number, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(number, old)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Name what was not tested, backends and what this machine lacks: it must not look like what was."""
    for found in _PROBES.values():
        if not found.usable:
            terminalreporter.write_line(f"NOT TESTED: {found.name} backend: {found.reason}", yellow=True, bold=True)
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if "NOT TESTED" in reason:
            terminalreporter.write_line(reason.removeprefix("Skipped: "), yellow=True, bold=True)
