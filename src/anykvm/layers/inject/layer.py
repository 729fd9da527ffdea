"""The layer: a backend that forwards everything but what a rule makes fail."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable
from typing import Final

from anykvm.abi import ioctls as n
from anykvm.abi.names import ioctl_name
from anykvm.abi.structures import (
    kvm_memory_attributes,
    kvm_pre_fault_memory,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)
from anykvm.backends.base import Backend
from anykvm.host.libc import copy_out
from anykvm.layers.base import Layer
from anykvm.layers.inject import sites
from anykvm.layers.inject.lookups import Lookups
from anykvm.layers.inject.rule import Rule
from anykvm.layers.inject.running import Later, fail_run, race_run
from anykvm.layers.inject.selection import Counter, Fired
from anykvm.layers.shadow import LEARNED, Shadow, ShadowVcpu

_RANGES: Final = {
    n.KVM_SET_USER_MEMORY_REGION: (kvm_userspace_memory_region, "guest_phys_addr", "memory_size"),
    n.KVM_SET_USER_MEMORY_REGION2: (kvm_userspace_memory_region2, "guest_phys_addr", "memory_size"),
    n.KVM_SET_MEMORY_ATTRIBUTES: (kvm_memory_attributes, "address", "size"),
    n.KVM_PRE_FAULT_MEMORY: (kvm_pre_fault_memory, "gpa", "size"),
}


class Inject(Layer):
    """Makes calls of the backend it wraps fail, as rules say; implements ``anykvm.backends.base.Backend``.

    >>> import anykvm
    >>> inject = Inject(anykvm.backend("soft"), ["KVM_CREATE_VCPU:errno=ENOMEM"])
    >>> with anykvm.open(inject) as kvm, kvm.create_vm() as vm:
    ...     try:
    ...         vm.create_vcpu()
    ...     except OSError as error:
    ...         print(error.strerror)
    KVM_CREATE_VCPU(vcpu_id=0): injected ENOMEM; replay: KVM_CREATE_VCPU:errno=ENOMEM
    >>> inject.fired[0].nth
    1

    It knows VMs and vCPUs from the ioctls that pass through it, by descriptor. A KVM_RUN on a duplicate of a descriptor
    fails early only: what is done late needs the vCPU's kvm_run page. May be used from any thread; calls are counted in
    the order in which they come.
    """

    def __init__(self, inner: Backend, rules: Iterable[Rule | str] = ()) -> None:
        """Wrap ``inner``. Rules may be text. Raises RuleError; ValueError if a page look-up is to fail elsewhere than
        on the soft backend.
        """
        super().__init__(inner)
        self.rules = tuple(Rule.parse(rule) if isinstance(rule, str) else rule for rule in rules)
        self.fired: list[Fired] = []
        """What was injected, in order."""
        self.calls: list[str] = []
        """Every ioctl, open and mmap so far, by name, if ``trace`` was set."""
        self.trace = False
        """Whether ``calls`` is kept."""
        self._lock = threading.Lock()
        self._inner_ioctl = inner.ioctl
        self._shadow = Shadow(inner)
        self._any = [Counter(rule) for rule in self.rules if rule.site == sites.ANY_IOCTL]
        self._by_site: dict[str, list[Counter]] = {}
        for rule in self.rules:
            if rule.site != sites.ANY_IOCTL:
                self._by_site.setdefault(rule.site, []).append(Counter(rule))
        self._ioctls = {sites.REQUESTS[site]: made for site, made in self._by_site.items() if site in sites.REQUESTS}
        lookups = [counter for site in sites.LOOKUPS for counter in self._by_site.get(site, ())]
        if lookups and inner.name != "soft":
            raise ValueError(f"{lookups[0].rule.site}: only the soft backend has page look-ups that can be made fail")
        self._lookups = Lookups(lookups, self._note) if lookups else None

    def __repr__(self) -> str:
        """Show what it wraps, and the rules."""
        return f"Inject({self.inner!r}, {[str(rule) for rule in self.rules]})"

    def open(self) -> int:
        """Forward, or fail; see ``Backend.open``."""
        self._system_call("open")
        return self.inner.open()

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Forward, or fail; see ``Backend.mmap``."""
        self._system_call("mmap")
        return self.inner.mmap(fd, length, offset)

    def close(self, fd: int) -> None:
        """Forward, and forget the descriptor; see ``Backend.close``."""
        self._shadow.close(fd)
        self.inner.close(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Forward, or fail; see ``Backend.ioctl``."""
        if self.trace:
            self.calls.append(ioctl_name(request))
        if self._any or request in self._ioctls:
            vcpu = self._shadow.vcpu(fd)
            due = self._due(request, arg, vcpu)
            if due is not None:
                return self._fail(due, (fd, request, arg), vcpu)
        return self._forward(fd, request, arg)

    def _forward(self, fd: int, request: int, arg: int) -> int:
        result = self._inner_ioctl(fd, request, arg)
        if request in LEARNED:
            self._shadow.learn(fd, request, arg, result)
            if request == n.KVM_CREATE_VM and self._lookups is not None:
                self._lookups.watch(result)
        return result

    def _due(self, request: int, arg: int, vcpu: ShadowVcpu | None) -> tuple[Counter, Fired] | None:
        """Count the call with every rule of its site. The first rule that wants it to fail has it."""
        counters = [*self._any, *self._ioctls.get(request, ())]
        vcpu_id = -1 if vcpu is None else vcpu.vcpu_id
        ranged = any(counter.rule.gpa >= 0 for counter in counters)
        gpa, size = _range(request, arg) if ranged else (-1, 0)
        found = None
        for counter in counters:
            met = counter.meets(vcpu_id, gpa, size)
            if met and found is None:
                found = counter, Fired(counter.rule, ioctl_name(request), met, vcpu_id, gpa)
        return found

    def _fail(self, due: tuple[Counter, Fired], call: tuple[int, int, int], vcpu: ShadowVcpu | None) -> int:
        counter, fired = due
        rule = counter.rule
        if rule.delay:
            time.sleep(rule.delay)
        if not rule.errno and not rule.race:  # a delay alone
            self._note(fired)
            return self._forward(*call)
        if call[1] != n.KVM_RUN or rule.site == sites.ANY_IOCTL:
            self._note(fired)
            if rule.number:
                raise self._error(fired)
            return 0
        try:
            if rule.race:
                self._note(fired)
                return race_run(self._inner_ioctl, call[0], vcpu)
            fail_run(rule, self._inner_ioctl, call[0], vcpu)
        except Later as later:  # KVM_RUN had something to say first
            counter.put_off()
            return later.answer()
        self._note(fired)
        if rule.number:
            raise self._error(fired)
        return 0

    def _system_call(self, name: str) -> None:
        if self.trace:
            self.calls.append(name)
        for counter in self._by_site.get(name, ()):
            if met := counter.meets(-1, -1, 0):
                fired = Fired(counter.rule, name, met)
                self._note(fired)
                if counter.rule.delay:
                    time.sleep(counter.rule.delay)
                if counter.rule.number:
                    raise self._error(fired)

    def _note(self, fired: Fired) -> None:
        with self._lock:
            self.fired.append(fired)

    def _error(self, fired: Fired) -> OSError:
        return OSError(fired.rule.number, f"{fired.call}: injected {fired.rule.errno}; replay: {fired.replay}")


def _range(request: int, arg: int) -> tuple[int, int]:
    """Read the guest-physical range that a call is about; (-1, 0) if there is none, or it cannot be read."""
    if request not in _RANGES:
        return -1, 0
    structure, start, size = _RANGES[request]
    try:
        copied = structure.from_buffer_copy(copy_out(arg, ctypes.sizeof(structure)))
    except OSError:
        return -1, 0
    return getattr(copied, start), getattr(copied, size)
