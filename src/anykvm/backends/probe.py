"""Which backends can be used here, and why not the others."""

from __future__ import annotations

import os
from typing import NamedTuple

from anykvm.backends.device import DeviceBackend
from anykvm.backends.selftest import self_test


class Probe(NamedTuple):
    """What was found out about one backend.

    >>> probe = probe_device("/nonexistent/kvm")
    >>> probe.usable, probe.reason
    (False, '/nonexistent/kvm does not exist: no KVM in this kernel, or its module is not loaded')
    """

    name: str
    """``"device"`` or ``"soft"``."""
    usable: bool
    """It opens and passes the self-test."""
    reason: str
    """Why it is or is not usable, one line."""
    notes: tuple[str, ...] = ()
    """What a user should know about it even so, one line each."""


def device_notes(modules: str = "/sys/module") -> tuple[str, ...]:
    """Describe the KVM modules loaded here, and what their kind means for a user."""
    loaded = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(os.path.join(modules, name))]
    notes = [f"kernel {os.uname().release}, modules: {', '.join(loaded) or 'none of kvm_intel, kvm_amd, kvm_pvm'}"]
    if "kvm_pvm" in loaded:
        notes.append(
            "kvm_pvm: no hardware virtualization; ordinary guests run in KVM's instruction emulator, so a guest access "
            "to a host page that is not there becomes KVM_EXIT_MMIO instead of EFAULT"
        )
    return tuple(notes)


def probe_device(path: str = "/dev/kvm") -> Probe:
    """Find out whether the kernel's KVM is usable: it exists, opens, and runs a two-instruction guest."""
    if not os.path.exists(path):
        return Probe("device", False, f"{path} does not exist: no KVM in this kernel, or its module is not loaded")
    if not os.access(path, os.R_OK | os.W_OK):
        return Probe("device", False, f"no permission to read and write {path} (see its group)", device_notes())
    failure = self_test(DeviceBackend(path))
    reason = f"self-test failed: {failure}" if failure else f"{path} runs guests"
    return Probe("device", failure is None, reason, device_notes())


def probe_soft(profile: str | None = None) -> Probe:
    """Find out whether the soft backend is usable: it imports, knows the profile, and runs a two-instruction guest."""
    from anykvm.backends import soft_backend

    try:
        backend = soft_backend(profile)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return Probe("soft", False, str(error))
    failure = self_test(backend)
    reason = f"self-test failed: {failure}" if failure else f"runs guests, profile {backend.profile}"
    return Probe("soft", failure is None, reason)
