"""Which backends can be used here, and why not the others."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from anykvm.backends.child import SECONDS, NotTried, try_device
from anykvm.backends.selftest import self_test

_VENDOR: Final = ("kvm_intel", "kvm_amd", "kvm_pvm")
_MISC_MAJOR: Final = 10


class Probe(NamedTuple):
    """What was found out about one backend.

    >>> probe = probe_device("/nonexistent/kvm")
    >>> probe.usable, probe.reason.startswith("/nonexistent/kvm does not exist")
    (False, True)
    """

    name: str
    """``"device"`` or ``"soft"``."""
    usable: bool
    """It opens and passes the self-test."""
    reason: str
    """Why it is or is not usable, one line."""
    notes: tuple[str, ...] = ()
    """What a user should know about it even so, one line each."""
    tried: bool = False
    """A guest was run, or the attempt failed. False if it did not come to that: the answer may be another soon."""


class Kernel(NamedTuple):
    """Where the running kernel tells of its KVM."""

    modules: str = "/sys/module"
    misc: str = "/proc/misc"

    def loaded(self) -> list[str]:
        """Name the KVM modules for a kind of processor that are loaded, or built in."""
        return [name for name in _VENDOR if os.path.isdir(os.path.join(self.modules, name))]

    def minor(self) -> int | None:
        """Find the device number's minor (the major is misc's, 10); None if there is no KVM to be opened.

        >>> Kernel(misc="/dev/null").minor() is None
        True
        """
        try:
            with open(self.misc) as lines:
                found = [line.split() for line in lines]
        except OSError:
            return None
        return next((int(number) for number, name in found if name == "kvm"), None)


KERNEL: Final = Kernel()


def device_notes(kernel: Kernel = KERNEL) -> tuple[str, ...]:
    """Describe the KVM modules loaded here, and what their kind means for a user."""
    loaded = ", ".join(kernel.loaded()) or f"none of {', '.join(_VENDOR)}"
    return (f"kernel {os.uname().release}, modules: {loaded}", *emulated(kernel))


def emulated(kernel: Kernel = KERNEL) -> tuple[str, ...]:
    """Say what it means if KVM has no hardware virtualization; nothing if it has."""
    if "kvm_pvm" not in kernel.loaded():
        return ()
    return (
        "kvm_pvm: no hardware virtualization; ordinary guests run in KVM's instruction emulator, so a guest access "
        "to a host page that is not there becomes KVM_EXIT_MMIO instead of EFAULT",
    )


def probe_device(path: str = "/dev/kvm", kernel: Kernel = KERNEL, seconds: float = SECONDS) -> Probe:
    """Find out whether the kernel's KVM is usable: it exists, opens, and runs a two-instruction guest.

    A child process tries it, for at most ``seconds``: a kernel that kills or hangs its caller is an answer too.
    Where no child can be started it is not tried, and counts as not usable.
    """
    notes = device_notes(kernel)
    if not os.path.exists(path):
        return Probe("device", False, f"{path} does not exist: {_missing(path, kernel)}", notes)
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        return Probe("device", False, f"no permission to read and write {path}: {_permission(path)}", notes)
    try:
        failure = try_device(path, seconds)
    except NotTried as error:
        return Probe("device", False, f"{path} was not tried: {error}", notes)
    reason = f"self-test failed: {failure}" if failure else f"{path} runs guests"
    return Probe("device", failure is None, reason, notes, tried=True)


def _missing(path: str, kernel: Kernel) -> str:
    """Say why there is no such file, and what to do."""
    minor = kernel.minor()
    if minor is not None:
        named = ", ".join(kernel.loaded()) or "KVM"
        return (
            f"the kernel has {named}, only the file is missing; a container needs --device {path}, "
            f"elsewhere as root: mknod {path} c {_MISC_MAJOR} {minor}"
        )
    if os.path.isdir(os.path.join(kernel.modules, "kvm")):
        return f"the module kvm is loaded, but none for this processor ({', '.join(_VENDOR)})"
    return "no KVM in this kernel, or its module is not loaded"


def _permission(path: str) -> str:
    """Say whose the file is, and who this process is.

    >>> _permission("/").startswith("owner root (0), group root (0), mode 0755; this process is uid ")
    True
    """
    try:
        found = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    groups = sorted({os.getegid(), *os.getgroups()})
    return (
        f"owner {_named(found.st_uid, _user)}, group {_named(found.st_gid, _group)}, "
        f"mode {stat.S_IMODE(found.st_mode):04o}; this process is uid {os.geteuid()}, "
        f"groups {' '.join(map(str, groups))}"
    )


def _named(number: int, name: Callable[[int], str]) -> str:
    try:
        return f"{name(number)} ({number})"
    except KeyError:
        return str(number)


def _user(number: int) -> str:
    return pwd.getpwuid(number).pw_name


def _group(number: int) -> str:
    return grp.getgrgid(number).gr_name


def probe_soft(profile: str | None = None) -> Probe:
    """Find out whether the soft backend is usable: it imports, knows the profile, and runs a two-instruction guest."""
    from anykvm.backends import soft_backend

    try:
        backend = soft_backend(profile)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return Probe("soft", False, str(error))
    failure = self_test(backend)
    reason = f"self-test failed: {failure}" if failure else f"runs guests, profile {backend.profile}"
    return Probe("soft", failure is None, reason, tried=True)
