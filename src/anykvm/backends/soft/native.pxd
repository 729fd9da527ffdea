# The engine's C interface for the compiled contract (run.py): only what the contract names.
cdef extern from "errno.h" nogil:
    enum:
        EINTR
        EIO
        EINVAL

cdef extern from "layout.h" nogil:
    unsigned long long ak_contract_stamp()
    unsigned long long ak_engine_stamp()

cdef extern from "engine.h" nogil:
    ctypedef struct kvm_run_page "struct kvm_run":
        unsigned char immediate_exit
        unsigned short flags
        unsigned int exit_reason
        unsigned long long kvm_valid_regs
        unsigned long long kvm_dirty_regs

    ctypedef struct ak_exit "struct ak_exit":
        unsigned int kind
        int err
        unsigned int annotate

    ctypedef struct ak_vcpu "struct ak_vcpu":
        kvm_run_page *run
        ak_exit exit
        unsigned int completion
        unsigned int stopping
        unsigned int string_in
        unsigned int has_sigmask
        unsigned int annotate_all
        unsigned int ran
        unsigned int purge
        unsigned long long sync_supported

    enum:
        KVM_EXIT_UNKNOWN
        KVM_EXIT_IO
        KVM_EXIT_HLT
        KVM_EXIT_HYPERCALL
        KVM_EXIT_MMIO
        KVM_EXIT_IRQ_WINDOW_OPEN
        KVM_EXIT_SET_TPR
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_INTR
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_MEMORY_FAULT
        KVM_EXIT_DIRTY_RING_FULL
        KVM_INTERNAL_ERROR_EMULATION
        KVM_INTERNAL_ERROR_DELIVERY_EV
        AK_EXIT_KICKED
        AK_EXIT_IO
        AK_EXIT_MMIO
        AK_EXIT_HLT
        AK_EXIT_SHUTDOWN
        AK_EXIT_SET_TPR
        AK_EXIT_FAULT
        AK_EXIT_DELIVERY
        AK_EXIT_IRQ_WINDOW
        AK_EXIT_HYPERCALL
        AK_EXIT_DIRTY_FULL
        AK_EXIT_HWPOISON
        AK_COMPLETE_NONE
        AK_COMPLETE_PIO
        AK_COMPLETE_STRING_IN
        AK_COMPLETE_MMIO_READ
        AK_COMPLETE_MMIO_WRITE
        AK_COMPLETE_HYPERCALL
        AK_PURGE_BEFORE_LOCK
        AK_PURGE_AFTER_LOCK
        AK_PURGE_AFTER_COMPLETION
        AK_PURGE_NEVER

    ak_vcpu *ak_vcpu_get(long long fd)
    bint ak_vcpu_put(ak_vcpu *v)
    int ak_vcpu_dead(ak_vcpu *v)
    int ak_vcpu_lock(ak_vcpu *v)
    bint ak_device_raised(const ak_vcpu *v)
    void ak_vcpu_unlock(ak_vcpu *v)
    void ak_signals_enter(ak_vcpu *v)
    bint ak_signal_pending(ak_vcpu *v)
    void ak_signals_leave(ak_vcpu *v)
    int ak_sync_regs(ak_vcpu *v)
    void ak_store_regs(ak_vcpu *v)
    int ak_set_cr8(ak_vcpu *v)
    void ak_post_kvm_run_save(ak_vcpu *v)
    void ak_fill_memory_fault(ak_vcpu *v)
    void ak_exit_mmio(ak_vcpu *v)
    void ak_exit_io(ak_vcpu *v)
    void ak_exit_internal(ak_vcpu *v, unsigned int suberror)
    bint ak_hypercall(ak_vcpu *v)
    void ak_complete_hypercall(ak_vcpu *v)
    void ak_run_guest(ak_vcpu *v)
    bint ak_irq_window(ak_vcpu *v)
    void ak_cancel_injection(ak_vcpu *v)
    bint ak_dirty_ring_full(const ak_vcpu *v)
    void ak_complete_pio(ak_vcpu *v)
    bint ak_next_fragment(ak_vcpu *v)
    void ak_answer_read(ak_vcpu *v)
    bint ak_send_hwpoison_signal(ak_vcpu *v)

ctypedef ak_vcpu *vcpu_p
