"""KVM_RUN as guarded steps, S0 to S9, under a policy: ABI.md 7.2. And the other writers of the shared page.

Not here, because they add no outcome of their own: EINTR of a fatal signal at the mutex (nobody is left to misread it),
S6's EINVAL (S3's is the same to user space), level-triggered requests (they rewrite exit_reason at each KVM_RUN), and
an interrupted get_user_pages() (as a signal at S9).
"""

from __future__ import annotations

import errno as e
from collections.abc import Iterable, Iterator
from typing import Final

from anykvm.backends.soft.profiles import Purge
from anykvm.explorer.arch import Arch, Feature, Selects
from anykvm.explorer.policy import Annotates, Policy
from anykvm.explorer.state import (
    ERRNO,
    PAGE_OF,
    Call,
    Completion,
    Insn,
    Kernel,
    Origin,
    Page,
    Reason,
    Return,
    Swapped,
    Union,
)

GUEST: Final = "guest: "
"""How a step of the guest's begins in ``Return.steps``."""


class Machine:
    """A KVM on an architecture, and the instructions its guests may contain.

    It remembers its answers: every VMM asks the same of it, and each of them again in another state of its own.
    """

    def __init__(self, policy: Policy, arch: Arch, insns: frozenset[Insn]) -> None:
        """Know nothing yet."""
        self.policy = policy
        self.arch = arch
        self.insns = insns
        self._known: dict[tuple[Kernel, Call], tuple[Return, ...]] = {}

    def kvm_run(self, kernel: Kernel, call: Call) -> tuple[Return, ...]:
        """Every way in which KVM_RUN can end, in a fixed order."""
        asked = kernel, call
        known = self._known.get(asked)
        if known is None:
            known = self._known[asked] = tuple(kvm_run(kernel, call, self))
        return known


def kvm_run(kernel: Kernel, call: Call, machine: Machine) -> Iterator[Return]:
    """Every way in which KVM_RUN can end."""
    policy, arch = machine.policy, machine.arch
    if kernel.dead:
        yield Return(kernel, e.EIO, ("S0: the VM is dead",))
        return
    steps: tuple[str, ...] = ()
    if policy.purge in (Purge.BEFORE_LOCK, Purge.AFTER_LOCK):
        kernel, steps = _purge(kernel, "S0", steps)
    if arch.immediate_exit_first and call.immediate_exit:
        yield Return(kernel, e.EINTR, (*steps, "immediate_exit, before anything else"))
        return
    if Feature.HELPER in arch.features and not kernel.started:
        yield Return(kernel, e.ENOMEM, (*steps, "S1: the helper thread cannot be made"))
    kernel = kernel._replace(started=True)
    if policy.early_efault:
        yield Return(kernel, e.EFAULT, (*steps, "S1: an access to user space fails"))
    if kernel.uninitialized:
        yield _uninitialized(kernel, call, steps)
        return
    if call.bad_sync:
        yield Return(kernel, e.EINVAL, (*steps, "S3: kvm_dirty_regs is refused"))
        return
    yield from _complete(kernel, call, machine, steps)


def _purge(kernel: Kernel, where: str, steps: tuple[str, ...]) -> tuple[Kernel, tuple[str, ...]]:
    return kernel._replace(reason=Reason.UNKNOWN), (*steps, f"{where}: exit_reason := UNKNOWN")


def _uninitialized(kernel: Kernel, call: Call, steps: tuple[str, ...]) -> Return:
    """S2. The guest's INIT and SIPI have come when it wakes."""
    if call.immediate_exit:
        return Return(kernel, e.EINTR, (*steps, "S2: uninitialised, and immediate_exit"))
    if call.signal:
        return Return(kernel._replace(reason=Reason.INTR), e.EINTR, (*steps, "S2: uninitialised, and a signal"))
    return Return(kernel._replace(uninitialized=False), e.EAGAIN, (*steps, "S2: woken, to be run again"))


def _complete(kernel: Kernel, call: Call, machine: Machine, steps: tuple[str, ...]) -> Iterator[Return]:
    """S4 and S5, and the reset of exit_reason at S7."""
    policy, arch = machine.policy, machine.arch
    completion, answer_lost = kernel.completion, False
    if redone(kernel, arch):
        completion = Completion.NONE
    kernel = kernel._replace(completion=Completion.NONE)
    if completion is Completion.FRAGMENT:
        kernel = kernel._replace(reason=Reason.MMIO, union=Union(write=True), completion=Completion.WRITE)
        yield Return(kernel, 0, (*steps, "S4: completed; its second half is an exit"), device=True)
        return
    if completion is not Completion.NONE:
        answer_lost = completion is Completion.READ and not (kernel.union.read and kernel.union.answered)
        kernel = kernel._replace(insn=None)
        steps = (*steps, f"S4: the device {completion.value} is completed")
    if policy.purge is Purge.AFTER_COMPLETION:
        kernel, steps = _purge(kernel, "S4", steps)
    if call.immediate_exit:
        yield Return(kernel, e.EINTR, (*steps, "S5: immediate_exit"), answer_lost=answer_lost)
        return
    if policy.purge is not Purge.NEVER:
        kernel, steps = _purge(kernel, "S7", steps)
    for ended in _loop(kernel, call, machine, steps, ()):
        yield ended._replace(answer_lost=answer_lost)


def redone(kernel: Kernel, arch: Arch) -> bool:
    """Say whether exit_reason hides a pending completion: the guest then stands before its device access as before."""
    hidden = arch.selects is Selects.EXIT_REASON and kernel.reason is not Reason.MMIO
    return hidden and kernel.insn in (Insn.READ, Insn.WRITE)


def _loop(
    kernel: Kernel, call: Call, machine: Machine, steps: tuple[str, ...], did: tuple[Insn, ...]
) -> Iterator[Return]:
    """S8 and S9: requests, MMU, the guest until it exits."""
    if kernel.swapped is Swapped.CONVERTED:
        kernel = kernel._replace(reason=Reason.MEMORY_FAULT, union=Union(Page.G, Origin.ASYNC), swapped=Swapped.NO)
        steps = (*steps, "S8: page g is here, and private: exit_reason := MEMORY_FAULT (g); goes on")
    if call.signal:
        yield Return(kernel._replace(reason=Reason.INTR), e.EINTR, (*steps, "S9: a signal"), did)
    else:
        for insn in _next(kernel, machine, did):
            yield from _execute(kernel, insn, machine, call, steps, (*did, insn))
    if Feature.MMU_LOAD in machine.arch.features:
        yield Return(kernel, e.ENOMEM, (*steps, "S8: no memory for page tables"), did)


def _next(kernel: Kernel, machine: Machine, did: tuple[Insn, ...]) -> Iterable[Insn]:
    if kernel.insn is not None:
        return (kernel.insn,)
    once = {insn for insn in did if insn in (Insn.TOUCH_SWAPPED, Insn.PUSH_ACROSS)}
    if kernel.swapped is not Swapped.NO:
        once.add(Insn.TOUCH_SWAPPED)
    return [insn for insn in Insn if insn in machine.insns and insn not in once]


def _execute(
    kernel: Kernel, insn: Insn, machine: Machine, call: Call, steps: tuple[str, ...], did: tuple[Insn, ...]
) -> Iterator[Return]:
    again = kernel.insn is insn
    steps = (*steps, f"{GUEST}{insn.value}")
    page = PAGE_OF.get(insn)
    if page is not None:
        yield _fault(kernel._replace(insn=insn), page, machine.policy, steps, did)._replace(again=again)
    elif insn is Insn.HLT:
        yield Return(kernel._replace(reason=Reason.HLT, union=Union()), 0, (*steps, "S8: HLT"), did)
    elif insn is Insn.TOUCH_SWAPPED:
        told = (*steps, "S8: page g is swapped out; the guest goes on")
        yield from _loop(kernel._replace(swapped=Swapped.OUT), call, machine, told, did)
    elif insn is Insn.PUSH_ACROSS:
        told = (*steps, "S8: exit_reason := MMIO, then #PF; the exit is abandoned, the guest goes on")
        phantom = Union(origin=Origin.ABANDONED, write=True)
        yield from _loop(kernel._replace(reason=Reason.MMIO, union=phantom), call, machine, told, did)
    else:
        yield Return(_device(kernel, insn, machine.arch), 0, (*steps, "S8: MMIO"), did, device=True, again=again)


def _device(kernel: Kernel, insn: Insn, arch: Arch) -> Kernel:
    read = insn is Insn.READ
    if arch.selects is Selects.NOTHING:
        completion, retired = Completion.NONE, True
    elif read:
        completion, retired = Completion.READ, False
    else:
        completion = Completion.FRAGMENT if insn is Insn.WRITE_ACROSS else Completion.WRITE
        retired = arch.retires_at_exit
    return kernel._replace(
        reason=Reason.MMIO,
        union=Union(read=read, write=not read),
        completion=completion,
        insn=None if retired else insn,
    )


def _fault(kernel: Kernel, page: Page, policy: Policy, steps: tuple[str, ...], did: tuple[Insn, ...]) -> Return:
    """The handler h of S8 fails, with an annotation or bare."""
    if annotated(page, policy):
        kernel = kernel._replace(reason=Reason.MEMORY_FAULT, union=Union(page, Origin.RUN))
        return Return(kernel, ERRNO[page], (*steps, f"S8: fails for page {page.value}, annotated"), did, cause=page)
    return Return(kernel, ERRNO[page], (*steps, f"S8: fails for page {page.value}, bare"), did, cause=page)


def annotated(page: Page, policy: Policy) -> bool:
    """Say whether a failure for this page fills ``memory_fault``."""
    if page in (Page.G, Page.N, Page.P):
        return policy.annotates is not Annotates.NOTHING
    return policy.annotates is Annotates.PAGES and page is not Page.S


def pre_fault(kernel: Kernel) -> Kernel:
    """KVM_PRE_FAULT_MEMORY of page n fails: the shared page is written, a pending completion kept. ABI.md 2.2."""
    return kernel._replace(reason=Reason.MEMORY_FAULT, union=Union(Page.N, Origin.PRE_FAULT))


def refused_run(kernel: Kernel, policy: Policy) -> Kernel:
    """KVM_RUN with an argument that is not 0: EINVAL at S0, after the mutex is taken and before P3b's reset."""
    if policy.purge is Purge.BEFORE_LOCK and not kernel.dead:
        return kernel._replace(reason=Reason.UNKNOWN)
    return kernel
