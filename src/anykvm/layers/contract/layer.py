"""The layer: a backend that forwards everything, and holds what happens against the rules."""

from __future__ import annotations

import errno as _errno
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from ctypes import addressof
from dataclasses import dataclass
from typing import Final, Literal
from weakref import WeakKeyDictionary

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.names import decode_request
from anykvm.abi.reading import reader, span
from anykvm.abi.structures import kvm_regs, kvm_run
from anykvm.backends.base import Backend
from anykvm.host.atomic import client_thread
from anykvm.host.libc import copy_out
from anykvm.layers.base import Layer
from anykvm.layers.contract.events import Called, End, History, Ran, Returned
from anykvm.layers.contract.rules import RULES, ContractRule
from anykvm.layers.shadow import LEARNED, Shadow, ShadowVcpu

_KVM_RUN: Final = n.KVM_RUN
_REASON: Final = span(kvm_run, "exit_reason").start
_SUSPECT: Final = bytes(reason in (c.KVM_EXIT_MEMORY_FAULT, c.KVM_EXIT_INTR) for reason in range(256))
"""By exit reason: whether a KVM_RUN that succeeds never has it."""
_END: Final = reader(kvm_run, "exit_reason", "memory_fault.flags", "memory_fault.gpa", "memory_fault.size").unpack_from
_CANARY: Final = 0xFFFFFF39
"""Stands in exit_reason for a KVM_EXIT_MEMORY_FAULT that was there before KVM_RUN. x86 does not read it: ABI.md 7.5."""
_WATCHED: Final = frozenset(
    (
        n.KVM_PRE_FAULT_MEMORY,
        n.KVM_ENABLE_CAP,
        n.KVM_SET_MEMORY_ATTRIBUTES,
        n.KVM_SET_USER_MEMORY_REGION,
        n.KVM_SET_USER_MEMORY_REGION2,
    )
)
_KEPT: Final = 1000
_BACK: Final = frozenset((_errno.EINTR, _errno.EAGAIN))  # nothing has failed


@dataclass(frozen=True)
class Violation:
    """A rule that was broken."""

    rule: type[ContractRule]
    text: str
    """What happened."""
    vcpu: int
    """The vCPU's id; -1: it was no vCPU's call."""

    def __str__(self) -> str:
        """One line: whose mistake, which rule, what happened, where the rule is written."""
        where = f" on vCPU {self.vcpu}" if self.vcpu >= 0 else ""
        rule = self.rule
        return f"{rule.whose} breaks {rule.name}{where}: {self.text}. {rule.text} ({rule.document})"


class ContractError(RuntimeError):
    """A rule was broken, and the layer was told to raise."""

    def __init__(self, violation: Violation) -> None:
        """Carry the violation."""
        super().__init__(str(violation))
        self.violation = violation


class ContractWarning(RuntimeWarning):
    """A rule was broken, and the layer was told to warn."""


class Contract(Layer):
    """Checks at run time that the KVM it wraps, and the VMM that uses it, keep the ABI; see ``anykvm.backends.base``.

    ``report``: ``collect`` keeps violations in ``violations``; ``warn`` also warns (ContractWarning); ``raise`` raises
    ContractError from the call. ``limit`` is how often in a row the same failure may come. It knows vCPUs from the
    ioctls that pass through it, by descriptor. A KVM_RUN that succeeds costs one look at exit_reason; after one that
    failed, registers are read, and exit_reason is marked to see who writes it.
    """

    def __init__(
        self,
        inner: Backend,
        report: Literal["collect", "warn", "raise"] = "collect",
        *,
        limit: int = 64,
        rules: Iterable[type[ContractRule]] = RULES,
    ) -> None:
        """Wrap ``inner``. Raises ValueError for another way to report, or a limit below 3."""
        if report not in ("collect", "warn", "raise"):
            raise ValueError(f"no report {report!r}; there are collect, warn, raise")
        if limit < 3:
            raise ValueError(f"limit {limit} is below 3")
        super().__init__(inner)
        self.report = report
        self.limit = limit
        self.rules = tuple(rule() for rule in rules)
        self.violations: list[Violation] = []
        """The first 1000, in order."""
        self.counts: Counter[str] = Counter()
        """How often each rule was broken, by name."""
        self._inner_ioctl = inner.ioctl
        self._shadow = Shadow(inner)
        self._clean: dict[int, memoryview] = {}  # descriptors whose last KVM_RUN succeeded, and their pages
        self._histories: WeakKeyDictionary[ShadowVcpu, History] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self.ioctl = self._hot_path()  # type: ignore[method-assign]

    def _hot_path(self) -> Callable[..., int]:
        """Make ``ioctl`` as a closure: a KVM_RUN that succeeds after one that did costs half of what a method costs."""
        run, inner, clean, other = _KVM_RUN, self.inner.ioctl, self._clean, self.ioctl
        at, suspect = _REASON, _SUSPECT

        def ioctl(fd: int, request: int, arg: int = 0) -> int:
            if request != run:
                return other(fd, request, arg)
            try:
                page = clean[fd]  # it stays mapped, if fd is closed meanwhile
            except KeyError:
                return other(fd, request, arg)
            try:
                result = inner(fd, request, arg)
            except OSError as error:
                self._failed(fd, error)
                raise
            if suspect[page[at]]:  # the low byte: both reasons fit into it
                self._failed(fd, None)
            return result

        return ioctl

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """Forward; see ``Backend.ioctl``. Raises ContractError too, if that was asked for."""
        if request == _KVM_RUN:
            return self._run(fd, arg)
        if request in _WATCHED:
            return self._watched(fd, request, arg)
        try:
            result = self._inner_ioctl(fd, request, arg)
        except OSError as error:
            self._check_return(Returned(request, error.errno or 0, b"", b""), fd, error)
            raise
        if request in LEARNED:
            self._clean.pop(result, None)
            self._shadow.learn(fd, request, arg, result)
        return result

    def close(self, fd: int) -> None:
        """Forward, and forget the descriptor; see ``Backend.close``."""
        self._clean.pop(fd, None)
        self._shadow.close(fd)
        self.inner.close(fd)

    def _history(self, vcpu: ShadowVcpu) -> History:
        with self._lock:
            return self._histories.setdefault(vcpu, History())

    def _run(self, fd: int, arg: int) -> int:
        """Do KVM_RUN after one that did not simply succeed, or on a descriptor that was not seen being made."""
        vcpu = self._shadow.vcpu(fd)
        if vcpu is None or not vcpu.page:
            return self._inner_ioctl(fd, _KVM_RUN, arg)
        page = vcpu.run
        marked = page.exit_reason == c.KVM_EXIT_MEMORY_FAULT
        if marked:
            page.exit_reason = _CANARY
        try:
            result = self._inner_ioctl(fd, _KVM_RUN, arg)
        except OSError as error:
            self._ended(fd, vcpu, error, _unmark(page, marked))
            raise
        self._ended(fd, vcpu, None, _unmark(page, marked))
        return result

    def _failed(self, fd: int, error: OSError | None) -> None:
        if vcpu := self._shadow.vcpu(fd):
            self._ended(fd, vcpu, error, False)

    def _ended(self, fd: int, vcpu: ShadowVcpu, error: OSError | None, stale: bool) -> None:
        """Hold a KVM_RUN that ended against the rules, and remember it."""
        reason, *fault = _END(vcpu.view)
        errno = 0 if error is None else error.errno or 0
        end = End(errno, reason, (fault[0], fault[1], fault[2]), client_thread(), stale)
        before = self._history(vcpu)
        after = History(end, 1, before.succeeded) if errno else History(succeeded=True)
        if errno and errno not in _BACK:
            after.registers = self._registers(fd)
            same = before.last is not None and _same(before.last, end) and before.registers == after.registers
            after.repeats = before.repeats + 1 if same else 1
        with self._lock:
            self._histories[vcpu] = after
        if errno:
            self._clean.pop(fd, None)
        elif self._shadow.vcpu(fd) is vcpu:
            self._clean[fd] = vcpu.view
        immediate_exit = bool(vcpu.run.immediate_exit)
        run = Ran(end, before, immediate_exit, self.limit, after.repeats, lambda: self._completes(fd, vcpu))
        self._report([(rule, rule.ran(run)) for rule in self.rules], vcpu.vcpu_id, error)

    def _registers(self, fd: int) -> bytes:
        regs = kvm_regs()
        try:
            self._inner_ioctl(fd, n.KVM_GET_REGS, addressof(regs))
        except OSError:
            return b""
        return bytes(regs)

    def _completes(self, fd: int, vcpu: ShadowVcpu) -> bool:
        before = self._registers(fd)
        page = vcpu.run
        reason, wanted = page.exit_reason, page.immediate_exit
        page.immediate_exit = 1
        try:
            self._inner_ioctl(fd, _KVM_RUN, 0)
        except OSError:
            page.exit_reason = reason
        finally:
            page.immediate_exit = wanted
        return self._registers(fd) != before

    def _watched(self, fd: int, request: int, arg: int) -> int:
        """Do an ioctl in which a VMM's mistake, or KVM's, can show."""
        vcpu = self._shadow.vcpu(fd)
        before = _structure(request, arg)
        for history in self._concerned(fd, vcpu):
            pending = -1 if vcpu is None else _pending(vcpu, history)
            call = Called(request, before, history, pending, client_thread())
            self._report([(rule, rule.called(call)) for rule in self.rules], -1 if vcpu is None else vcpu.vcpu_id, None)
        try:
            result = self._inner_ioctl(fd, request, arg)
        except OSError as error:
            self._after_pre_fault(fd, vcpu, request)
            self._check_return(Returned(request, error.errno or 0, before, _structure(request, arg)), fd, error)
            raise
        self._after_pre_fault(fd, vcpu, request)
        if request in LEARNED:
            self._shadow.learn(fd, request, arg, result)
        self._check_return(Returned(request, 0, before, _structure(request, arg)), fd, None)
        return result

    def _concerned(self, fd: int, vcpu: ShadowVcpu | None) -> list[History]:
        """List the vCPUs that an ioctl may be about: the one it is on, or those of the VM it is on."""
        if vcpu is not None:
            return [self._history(vcpu)]
        vm = self._shadow.vm(fd)
        with self._lock:
            of_vm = [history for other, history in self._histories.items() if other.vm is vm and history.last]
        return of_vm or [History()]

    def _after_pre_fault(self, fd: int, vcpu: ShadowVcpu | None, request: int) -> None:
        """KVM_PRE_FAULT_MEMORY may leave KVM_EXIT_MEMORY_FAULT: what the next KVM_RUN says is looked at."""
        if request == n.KVM_PRE_FAULT_MEMORY and vcpu is not None and vcpu.page:
            self._clean.pop(fd, None)

    def _check_return(self, call: Returned, fd: int, error: OSError | None) -> None:
        vcpu = self._shadow.vcpu(fd)
        self._report([(rule, rule.returned(call)) for rule in self.rules], -1 if vcpu is None else vcpu.vcpu_id, error)

    def _report(self, found: list[tuple[ContractRule, str]], vcpu: int, error: OSError | None) -> None:
        for rule, text in found:
            if not text:
                continue
            violation = Violation(type(rule), text, vcpu)
            with self._lock:
                self.counts[rule.name] += 1
                if len(self.violations) < _KEPT:
                    self.violations.append(violation)
            if self.report == "raise":
                raise ContractError(violation) from error
            if self.report == "warn":
                warnings.warn(str(violation), ContractWarning, stacklevel=4)

    def summary(self) -> str:
        """One line for each rule that was broken, with how often, and its first case; empty: none was."""
        first: dict[str, Violation] = {}
        for violation in self.violations:
            first.setdefault(violation.rule.name, violation)
        return "\n".join(f"{self.counts[name]} x {violation}" for name, violation in first.items())


def _unmark(page: kvm_run, marked: bool) -> bool:
    """Take the mark away; whether it was still there."""
    if not marked or page.exit_reason != _CANARY:
        return False
    page.exit_reason = c.KVM_EXIT_MEMORY_FAULT
    return True


def _same(last: End, end: End) -> bool:
    fault = not end.annotated or last.fault == end.fault
    return fault and (last.errno, last.reason) == (end.errno, end.reason)


def _pending(vcpu: ShadowVcpu, history: History) -> int:
    """Give the exit that waits for an answer which lies where memory_fault is (ABI.md 1.4); -1: none."""
    if not vcpu.page or history.last is not None or not history.succeeded:
        return -1
    page = vcpu.run
    reason: int = page.exit_reason
    reads = reason == c.KVM_EXIT_MMIO and not page.mmio.is_write
    return reason if reads or reason in (c.KVM_EXIT_X86_RDMSR, c.KVM_EXIT_X86_WRMSR) else -1


def _structure(request: int, arg: int) -> bytes:
    """Copy an ioctl's argument; empty if it cannot be read."""
    try:
        return copy_out(arg, decode_request(request).size)
    except OSError:
        return b""
