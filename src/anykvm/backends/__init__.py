"""Backends: what stands behind the waist, and how one is chosen."""

from __future__ import annotations

import functools
import logging
from typing import Final, NamedTuple

from anykvm.backends.base import Backend as Backend
from anykvm.backends.device import DeviceBackend as DeviceBackend
from anykvm.backends.probe import Probe as Probe
from anykvm.backends.probe import probe_device as probe_device
from anykvm.backends.probe import probe_soft as probe_soft

NAMES = ("auto", "soft", "device")
"""What ``backend(name)`` accepts."""

_LOG: Final = logging.getLogger("anykvm")


class Selection(NamedTuple):
    """A chosen backend, and why it was chosen."""

    backend: Backend
    reason: str
    probes: tuple[Probe, ...]
    """What was probed to choose; empty when the caller named the backend."""


def soft_backend(profile: str | None = None) -> Backend:
    """Make the soft backend with a profile (default: its own default, ``documented``).

    Raises ImportError when its compiled part is not there, ValueError for a profile it does not know.
    """
    # Imported only here: the CPU engine is large, and a user of /dev/kvm needs none of it.
    from anykvm.backends.soft import SoftBackend

    made: Backend = SoftBackend() if profile is None else SoftBackend(profile=profile)
    return made


def select(name: str = "auto", profile: str | None = None) -> Selection:
    """Choose a backend and say why.

    ``auto`` takes the kernel's KVM if it passes the self-test, else the soft backend. The kernel's KVM is tried once a
    process, by a child (``anykvm.backends.child``). A profile other than ``kernel`` is something only the soft backend
    has, so with one ``auto`` means soft.
    Raises ValueError for an unknown name or a profile the backend cannot have; ImportError as ``soft_backend``.
    """
    if name not in NAMES:
        raise ValueError(f"no backend named {name!r}; there are {', '.join(NAMES)}")
    if name == "device" or (name == "auto" and profile == "kernel"):
        if profile not in (None, "kernel"):
            raise ValueError(f"profile {profile!r} needs the soft backend; /dev/kvm does what the running kernel does")
        return Selection(DeviceBackend(), "asked for", ())
    if name == "soft":
        return Selection(soft_backend(profile), "asked for", ())
    if profile is not None:
        return Selection(soft_backend(profile), f"profile {profile} exists only in the soft backend", ())
    probe = _probed()
    if probe.usable:
        return Selection(DeviceBackend(), probe.reason, (probe,))
    return Selection(soft_backend(), f"device: {probe.reason}", (probe,))


_tried: list[Probe] = []


def _probed() -> Probe:
    """Try the kernel's KVM, once a process. Until it came to that (no file, no process for it), ask again."""
    if not _tried:
        probe = probe_device()
        if not probe.tried:
            return probe
        _tried.append(probe)
    return _tried[0]


@functools.cache
def _announce(line: str) -> None:
    _LOG.warning(line)


def backend(name: str = "auto", profile: str | None = None) -> Backend:
    """Make a backend by name: ``auto``, ``soft`` or ``device``; ``profile`` as in ``select``.

    What ``auto`` took is said once a process, with the reason, as a warning of the logger ``anykvm``: on stderr, unless
    the program has set up logging otherwise. Whoever names the backend is told nothing.

    >>> backend("device").profile
    'kernel'
    >>> backend("xen")
    Traceback (most recent call last):
    ...
    ValueError: no backend named 'xen'; there are auto, soft, device
    """
    selection = select(name, profile)
    if selection.probes:
        _announce(f"anykvm: backend {selection.backend.name} ({selection.reason})")
    return selection.backend
