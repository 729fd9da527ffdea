# C types for run.py when it is compiled: every function of the contract is a plain C function without the GIL.
cimport anykvm.backends.soft.native as native

cdef int kvm_vcpu_ioctl_run(native.vcpu_p vcpu, int arg) noexcept nogil
cdef int kvm_arch_vcpu_ioctl_run(native.vcpu_p vcpu, bint wants_to_run) noexcept nogil
cdef void purge(native.vcpu_p vcpu, unsigned int point) noexcept nogil
cdef int prepare(native.vcpu_p vcpu) noexcept nogil
cdef int complete_userspace_io(native.vcpu_p vcpu) noexcept nogil
cdef int vcpu_run(native.vcpu_p vcpu) noexcept nogil
cdef int dirty_ring_full(native.vcpu_p vcpu) noexcept nogil
cdef int irq_window_exit(native.vcpu_p vcpu) noexcept nogil
cdef int signal_exit(native.vcpu_p vcpu) noexcept nogil
cdef int handle_exit(native.vcpu_p vcpu) noexcept nogil
cdef int rare_exit(native.vcpu_p vcpu, int kind) noexcept nogil
cdef int page_fault_error(native.vcpu_p vcpu) noexcept nogil
