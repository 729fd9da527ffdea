"""The layer: a backend that forwards everything, remembers slots and vCPUs, and explains a KVM_RUN that failed."""

from __future__ import annotations

import contextlib
import errno
from typing import Final, Literal
from weakref import WeakKeyDictionary

from anykvm.abi import ioctls as n
from anykvm.abi.constants import KVM_EXIT_MEMORY_FAULT
from anykvm.abi.validity import memory_fault_valid
from anykvm.backends.base import Backend
from anykvm.host.atomic import atomically_or_here
from anykvm.layers.annotate.cause import Cause
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.finder import Finder
from anykvm.layers.annotate.hostmap import HostMap
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.base import Layer
from anykvm.layers.shadow import LEARNED, PAGE, Shadow, ShadowVcpu

_KVM_RUN: Final = n.KVM_RUN
_EFAULT: Final = errno.EFAULT
_GRANTED: Final = "the host now grants every page that the instruction is known to need"


class UnresolvedAccess(OSError):
    """KVM_RUN's EFAULT with its explanation: ``errno`` is EFAULT, ``strerror`` has the reason.

    ``Vcpu.run`` and ``Vcpu.ioctl`` raise it as the backend does.
    """

    cause: Cause
    """What was found."""


class _Found:
    """What was found for a vCPU's last EFAULT."""

    def __init__(self) -> None:
        self.cause: Cause | None = None
        self.unexplained = ""


class Annotate(Layer):
    """Explains bare EFAULTs of the backend it wraps; implements ``anykvm.backends.base.Backend``.

    When KVM_RUN fails with EFAULT and kvm_run has no valid memory_fault, the cause is looked for, kept for
    ``last_cause``, and raised with the error (``UnresolvedAccess``, the reason in its text). Where none is found, the
    error stays a plain OSError; its notes, and ``last_unexplained``, say why. Mode ``strict`` changes nothing else.
    Mode ``fill`` also writes ``exit_reason`` KVM_EXIT_MEMORY_FAULT and ``memory_fault`` {flags 0, gpa of the page, size
    4096} into kvm_run, as api.rst promises, unless the cause is ambiguous.

    It knows a VM's slots and vCPUs from the ioctls that pass through it, by descriptor: a VM made elsewhere, or run
    through a duplicate of a descriptor, goes unexplained. A run that succeeds costs one forwarded call.
    """

    def __init__(self, inner: Backend, mode: Literal["strict", "fill"] = "strict") -> None:
        """Wrap ``inner``. Raises ValueError for another mode."""
        if mode not in ("strict", "fill"):
            raise ValueError(f"no mode {mode!r}; there are strict, fill")
        super().__init__(inner)
        self.mode = mode
        self._inner_ioctl = inner.ioctl
        self._shadow = Shadow(inner)
        self._found: WeakKeyDictionary[ShadowVcpu, _Found] = WeakKeyDictionary()

    def __repr__(self) -> str:
        """Show what it wraps."""
        return f"Annotate({self.inner!r}, mode={self.mode!r})"

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Forward; see ``Backend.ioctl``. Raises UnresolvedAccess (an OSError with EFAULT) where it has a cause."""
        if request == _KVM_RUN:
            try:
                return self._inner_ioctl(fd, request, arg)
            except OSError as error:
                if error.errno != _EFAULT:
                    raise
                cause = atomically_or_here(self._explain, fd)
                if cause is None:
                    if unexplained := self.last_unexplained(fd):
                        error.add_note(f"annotate: {unexplained}")
                    raise
                explained = UnresolvedAccess(_EFAULT, f"KVM_RUN: {cause.reason}")
                explained.cause = cause
                raise explained from error.__cause__
        if request in LEARNED:
            return atomically_or_here(self._do_and_learn, fd, request, arg)
        return self._inner_ioctl(fd, request, arg)

    def _do_and_learn(self, fd: int, request: int, arg: int) -> int:
        result = self._inner_ioctl(fd, request, arg)
        self._shadow.learn(fd, request, arg, result)
        return result

    def close(self, fd: int) -> None:
        """Forward, and forget the descriptor; see ``Backend.close``."""
        atomically_or_here(self._close, fd)

    def _close(self, fd: int) -> None:
        self._shadow.close(fd)
        self.inner.close(fd)

    def last_cause(self, fd: int) -> Cause | None:
        """What the last bare EFAULT of a vCPU's descriptor was; None if there was none, or nothing was found."""
        found = self._last(fd)
        return None if found is None else found.cause

    def last_unexplained(self, fd: int) -> str:
        """Why nothing was found for the last EFAULT that was looked at of a vCPU's descriptor; empty if a cause was."""
        found = self._last(fd)
        return "" if found is None else found.unexplained

    def explain(self, fd: int) -> Cause | None:
        """Look for the cause of the EFAULT that KVM_RUN on a vCPU's descriptor has just given, annotated or not.

        None where there is none to be found, or the descriptor is not a vCPU's that this layer saw being made. Raises
        OSError if the vCPU cannot be asked for its registers.
        """
        vcpu = self._shadow.vcpu(fd)
        if vcpu is None:
            return None
        return atomically_or_here(self._find, fd, vcpu, self._found.setdefault(vcpu, _Found()))

    def _last(self, fd: int) -> _Found | None:
        vcpu = self._shadow.vcpu(fd)
        return None if vcpu is None else self._found.get(vcpu)

    def _explain(self, fd: int) -> Cause | None:
        """Find the cause of a KVM_RUN that has just failed with EFAULT on ``fd``."""
        vcpu = self._shadow.vcpu(fd)
        if vcpu is None or not vcpu.page:
            return None
        found = self._found[vcpu] = _Found()
        try:
            run = vcpu.run
            if memory_fault_valid(_EFAULT, run.exit_reason):
                return None
            cause = found.cause = self._find(fd, vcpu, found)
        except OSError as error:  # the vCPU cannot be asked, or there is no /proc: the bare EFAULT stays what it is
            found.unexplained = f"the vCPU or this process's mappings cannot be looked at: {error.strerror}"
            return None
        if cause is not None and self.mode == "fill" and not cause.ambiguous:
            run.exit_reason = KVM_EXIT_MEMORY_FAULT
            run.memory_fault.flags = 0
            run.memory_fault.gpa = cause.page
            run.memory_fault.size = PAGE
        return cause

    def _find(self, fd: int, vcpu: ShadowVcpu, found: _Found) -> Cause | None:
        slots = self._shadow.slots(vcpu.vm)
        with contextlib.closing(HostMap()) as host:
            finder = Finder(Cpu(self.inner, fd), GuestPhysical(slots, host), hardware=self.inner.name == "device")
            cause = finder.find()
        found.unexplained = "" if cause is not None else finder.unknown or _GRANTED
        return cause
