"""Fixtures that all tests share."""

from __future__ import annotations

import pytest

from anykvm.backends import Backend, Probe, probe_device, probe_soft, soft_backend
from anykvm.backends.device import DeviceBackend

_PROBES: dict[str, Probe] = {}


def probe(name: str) -> Probe:
    """Probe a backend once a session."""
    if name not in _PROBES:
        _PROBES[name] = probe_device() if name == "device" else probe_soft()
    return _PROBES[name]


@pytest.fixture(params=["soft", "device"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn; one that cannot be used here skips the test, and says why."""
    found = probe(request.param)
    if not found.usable:
        pytest.skip(f"{found.name} backend: {found.reason}")
    return DeviceBackend() if request.param == "device" else soft_backend()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was not tested, backends and what this machine lacks: it must not look like what was."""
    for found in _PROBES.values():
        if not found.usable:
            terminalreporter.write_line(f"NOT TESTED: {found.name} backend: {found.reason}", yellow=True, bold=True)
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if "NOT TESTED" in reason:
            terminalreporter.write_line(reason.removeprefix("Skipped: "), yellow=True, bold=True)
