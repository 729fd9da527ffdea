# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""KVM_RUN: the contract, row by row.

This is the module to read to learn the ABI. Its shape follows the table of return paths of KVM_RUN on x86
(``kvm_vcpu_ioctl`` -> ``kvm_arch_vcpu_ioctl_run`` -> ``vcpu_run`` -> ``vcpu_enter_guest`` -> ``handle_exit``); the row
numbers in the comments are that table's. What each path returns and what it leaves in ``kvm_run.exit_reason`` is ABI.

It is Cython in pure-Python mode: compiled it needs neither the interpreter nor its lock while the guest runs; as plain
Python (``ANYKVM_PURE=1``) the same lines run over a ctypes mirror, which is how their branch coverage is measured.

Functions return what the kernel's do: 1 to go on, 0 for an exit to user space, a negative errno for an error.

Rows not here, because what leads to them is not offered: 3 and 6 (vCPU bring-up), 7 (a helper thread), 8-11 and 18
(uninitialized vCPUs need an in-kernel APIC), 19 (VMX), 22-24 (nested guests, paravirtual requests), 25, 26 (no shadow
page tables), 32, 33 (halt in the kernel).
"""

from __future__ import annotations

import os

import cython

from anykvm.backends.soft import upcall

if cython.compiled:  # pragma: no cover
    from cython.cimports.anykvm.backends.soft import native  # type: ignore[import-not-found]

    if native.ak_contract_stamp() != native.ak_engine_stamp():
        raise ImportError("anykvm's contract (run.py) was compiled for another engine than the one beside it")
else:
    from anykvm.backends.soft import native


def kvm_vcpu_ioctl_run(vcpu: native.vcpu_p, arg: cython.int) -> cython.int:
    """virt/kvm/kvm_main.c, KVM_RUN of kvm_vcpu_ioctl(): rows 1 to 5. 0 or a negative errno."""
    r: cython.int = native.ak_vcpu_dead(vcpu)
    if r:
        return r  # row 1: another mm, or the VM is dead: EIO; kvm_run is not touched
    purge(vcpu, native.AK_PURGE_BEFORE_LOCK)
    r = native.ak_vcpu_lock(vcpu)  # row 4: vcpu->mutex
    if r:
        return r  # no row: EDEADLK from inside a device's fault handler, for which the VM waits
    if arg:
        r = -native.EINVAL  # row 5
    else:
        # immediate_exit is read once, here: user space may write the page at any time
        wants_to_run: cython.bint = not vcpu.run.immediate_exit
        purge(vcpu, native.AK_PURGE_AFTER_LOCK)
        r = kvm_arch_vcpu_ioctl_run(vcpu, wants_to_run)
    native.ak_vcpu_unlock(vcpu)
    return r


def kvm_arch_vcpu_ioctl_run(vcpu: native.vcpu_p, wants_to_run: cython.bint) -> cython.int:
    """arch/x86/kvm/x86.c: rows 12 to 17, then the guest; on every path the epilogue."""
    native.ak_signals_enter(vcpu)  # kvm_sigset_activate()
    vcpu.run.flags = 0
    r: cython.int = prepare(vcpu)
    if r > 0 and vcpu.completion:
        r = complete_userspace_io(vcpu)  # rows 15, 16: before immediate_exit is looked at
    if r > 0:
        purge(vcpu, native.AK_PURGE_AFTER_COMPLETION)
    if r > 0 and not wants_to_run:
        r = -native.EINTR  # row 17: exit_reason and its payload survive
    if r > 0:
        vcpu.ran = 1
        r = vcpu_run(vcpu)
    # epilogue: valid even on an error
    if vcpu.run.kvm_valid_regs & vcpu.sync_supported:
        native.ak_store_regs(vcpu)
    native.ak_post_kvm_run_save(vcpu)
    native.ak_signals_leave(vcpu)
    return r


def purge(vcpu: native.vcpu_p, point: cython.uint) -> cython.void:
    """Reset exit_reason ahead of vcpu_run(), if the profile's KVM does so at this point; mainline does it at none."""
    if vcpu.purge == point:
        vcpu.run.exit_reason = native.KVM_EXIT_UNKNOWN


def prepare(vcpu: native.vcpu_p) -> cython.int:
    """Rows 12 to 14: register sync and CR8. A refusal leaves exit_reason and a pending completion as they were."""
    if (vcpu.run.kvm_valid_regs | vcpu.run.kvm_dirty_regs) & ~vcpu.sync_supported:
        return -native.EINVAL  # row 12
    if vcpu.run.kvm_dirty_regs and native.ak_sync_regs(vcpu):
        return -native.EINVAL  # row 13
    if native.ak_set_cr8(vcpu):
        return -native.EINVAL  # row 14: no in-kernel APIC, and run->cr8 is not a task priority
    return 1


def complete_userspace_io(vcpu: native.vcpu_p) -> cython.int:
    """vcpu->arch.complete_userspace_io: finish the instruction the last exit was for, exactly once.

    It may exit again (the next fragment of a device access: row 15, and KVM_RUN returns 0 even with immediate_exit).
    """
    completion: cython.int = vcpu.completion
    vcpu.completion = native.AK_COMPLETE_NONE
    if completion == native.AK_COMPLETE_PIO:
        native.ak_complete_pio(vcpu)
        return 1
    if completion == native.AK_COMPLETE_HYPERCALL:
        native.ak_complete_hypercall(vcpu)
        return 1
    if completion == native.AK_COMPLETE_MMIO_WRITE:
        return handle_exit(vcpu) if native.ak_next_fragment(vcpu) else 1
    if completion == native.AK_COMPLETE_STRING_IN:
        vcpu.string_in = 1
    else:
        native.ak_answer_read(vcpu)
    vcpu.stopping = 1  # the engine finishes this instruction and nothing else
    native.ak_run_guest(vcpu)
    vcpu.stopping = 0
    return handle_exit(vcpu)


def vcpu_run(vcpu: native.vcpu_p) -> cython.int:
    """x86.c:vcpu_run(): the loop around the guest."""
    if vcpu.purge != native.AK_PURGE_NEVER:
        vcpu.run.exit_reason = native.KVM_EXIT_UNKNOWN  # here, and no earlier: rows up to 17 keep the old reason
    if native.ak_dirty_ring_full(vcpu):
        return dirty_ring_full(vcpu)  # before a signal is looked for
    if vcpu.has_sigmask and native.ak_signal_pending(vcpu):
        # blocked for the thread, open for KVM_RUN: the guest is not entered, but with what it would have been is chosen
        native.ak_cancel_injection(vcpu)
        return irq_window_exit(vcpu) if native.ak_irq_window(vcpu) else signal_exit(vcpu)
    r: cython.int = 1
    while r > 0:
        native.ak_run_guest(vcpu)
        r = handle_exit(vcpu)  # rows 28, 29
        if r > 0 and native.ak_irq_window(vcpu):
            r = irq_window_exit(vcpu)
        if r > 0 and native.ak_signal_pending(vcpu):
            r = signal_exit(vcpu)  # row 31
        if r > 0 and native.ak_vcpu_dead(vcpu):
            r = -native.EIO  # row 20
        if r > 0 and native.ak_dirty_ring_full(vcpu):
            r = dirty_ring_full(vcpu)
    return r


def dirty_ring_full(vcpu: native.vcpu_p) -> cython.int:
    """Row 21, dr:kvm_dirty_ring_check_request(): no entry into the guest until KVM_RESET_DIRTY_RINGS has made room."""
    vcpu.run.exit_reason = native.KVM_EXIT_DIRTY_RING_FULL
    return 0


def irq_window_exit(vcpu: native.vcpu_p) -> cython.int:
    """Row 30: user space can inject an interrupt. Tested before the signal."""
    vcpu.run.exit_reason = native.KVM_EXIT_IRQ_WINDOW_OPEN
    return 0


def signal_exit(vcpu: native.vcpu_p) -> cython.int:
    """kvm_handle_signal_exit()."""
    vcpu.run.exit_reason = native.KVM_EXIT_INTR
    return -native.EINTR


def handle_exit(vcpu: native.vcpu_p) -> cython.int:
    """Why the engine came back, in KVM's terms: rows 28 and 29."""
    kind: cython.int = vcpu.exit.kind
    if kind == native.AK_EXIT_IO:
        vcpu.run.exit_reason = native.KVM_EXIT_IO
        native.ak_exit_io(vcpu)
        return 0
    if kind == native.AK_EXIT_FAULT:
        return page_fault_error(vcpu)
    if kind == native.AK_EXIT_MMIO:
        vcpu.run.exit_reason = native.KVM_EXIT_MMIO
        native.ak_exit_mmio(vcpu)
        return 0
    if kind == native.AK_EXIT_KICKED:
        return 1  # somebody wants the loop's tail looked at
    if kind == native.AK_EXIT_HLT:
        vcpu.run.exit_reason = native.KVM_EXIT_HLT
        return 0
    if kind == native.AK_EXIT_HYPERCALL:
        if not native.ak_hypercall(vcpu):
            return 1  # answered
        vcpu.run.exit_reason = native.KVM_EXIT_HYPERCALL
        vcpu.completion = native.AK_COMPLETE_HYPERCALL
        return 0
    return rare_exit(vcpu, kind)


def rare_exit(vcpu: native.vcpu_p, kind: cython.int) -> cython.int:
    """The exits that end a guest, the interrupt window, and a lower task priority."""
    if kind == native.AK_EXIT_SHUTDOWN:
        vcpu.run.exit_reason = native.KVM_EXIT_SHUTDOWN
        return 0
    if kind == native.AK_EXIT_SET_TPR:
        vcpu.run.exit_reason = native.KVM_EXIT_SET_TPR  # svm.c:cr8_write_interception(), without an in-kernel APIC
        return 0
    if kind == native.AK_EXIT_IRQ_WINDOW or kind == native.AK_EXIT_DIRTY_FULL:
        return 1  # rows 30 and 21 decide, at the loop's tail
    if kind == native.AK_EXIT_HWPOISON:
        # kvm_send_hwpoison_signal() and RET_PF_RETRY: EINTR if SIGBUS is deliverable, else again and again
        return signal_exit(vcpu) if native.ak_send_hwpoison_signal(vcpu) else 1
    vcpu.run.exit_reason = native.KVM_EXIT_INTERNAL_ERROR
    if kind == native.AK_EXIT_DELIVERY:
        native.ak_exit_internal(vcpu, native.KVM_INTERNAL_ERROR_DELIVERY_EV)
    else:
        native.ak_exit_internal(vcpu, native.KVM_INTERNAL_ERROR_EMULATION)
    return 0


def page_fault_error(vcpu: native.vcpu_p) -> cython.int:
    """A guest page fault nobody could resolve: mmu.c:kvm_handle_error_pfn().

    The documentation promises memory_fault here. Mainline x86 returns a bare -EFAULT for an ordinary memslot and calls
    kvm_prepare_memory_fault_exit() only on the private-memory paths (``exit.annotate``).
    """
    if vcpu.annotate_all or vcpu.exit.annotate:
        vcpu.run.exit_reason = native.KVM_EXIT_MEMORY_FAULT
        native.ak_fill_memory_fault(vcpu)
    return vcpu.exit.err


MESSAGES = {code: f"KVM_RUN: {os.strerror(code)}" for code in range(1, 134)}


_reap = None


def reap_with(reap: object) -> None:
    """Have ``reap()`` called when a KVM_RUN ends on a vCPU whose file was over meanwhile."""
    global _reap
    _reap = reap


def kvm_run(fd: cython.longlong, arg: object) -> bool:
    """KVM_RUN on a descriptor: True, or OSError with the errno; False, and nothing is done, if it stands for no vCPU.

    What the descriptor stands for is asked each time. The vCPU is held meanwhile, as an ioctl of the kernel holds the
    file: closing every descriptor frees nothing under a running guest. The GIL is released.
    """
    r: cython.int
    over: cython.bint = False
    raised: cython.bint = False
    vcpu: native.vcpu_p
    nonzero: cython.int = 1 if arg else 0
    with cython.nogil:
        r = 1
        vcpu = native.ak_vcpu_get(fd)
        if vcpu:
            r = kvm_vcpu_ioctl_run(vcpu, nonzero)
            raised = native.ak_device_raised(vcpu)
            over = native.ak_vcpu_put(vcpu)
    if over:
        _reap()
    if raised:
        upcall.check(r, MESSAGES.get(-r, ""))
    if r < 0:
        raise OSError(-r, MESSAGES[-r])
    return not r
