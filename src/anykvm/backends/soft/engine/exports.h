/* What the library is called by: each function with its type, once. Here they are declared, so a definition of another type
 * does not compile; layout.c gives the types out as text, which Python compares with its own at loading (layout.py). */
#pragma once

/* By Python, through ctypes (library.py). */
#define AK_EXPORTS(X)                                                                                                  \
    X(struct ak_vm *, ak_vm_create, (void))                                                                            \
    X(void, ak_vm_destroy, (struct ak_vm *))                                                                           \
    X(int, ak_vm_dead, (const struct ak_vm *))                                                                         \
    X(void, ak_vm_kill, (struct ak_vm *))                                                                              \
    X(void, ak_vm_set_tsc_khz, (struct ak_vm *, u64))                                                                  \
    X(int, ak_set_memslot, (struct ak_vm *, const struct ak_slot *, const struct ak_slot *))                           \
    X(int, ak_get_dirty_log, (struct ak_vm *, u64 *, u64, u64, bool))                                                  \
    X(int, ak_clear_dirty_log, (struct ak_vm *, u64 *, u64, u32, u64))                                                 \
    X(int, ak_reset_dirty_rings, (struct ak_vm *))                                                                     \
    X(int, ak_poison, (struct ak_vm *, u64, bool))                                                                     \
    X(u32, ak_mm_generation, (void))                                                                                   \
    X(void, ak_vm_configure, (struct ak_vm *, u64, u32))                                                               \
    X(void, ak_vm_set_hypercall_exits, (struct ak_vm *, u64))                                                          \
    X(int, ak_set_memory_attributes, (struct ak_vm *, u64, u64, bool))                                                 \
    X(int, ak_gmem_create, (struct ak_vm *, int, u64, u32, struct ak_gmem **))                                         \
    X(int64_t, ak_gmem_mmap, (int, u64, u64))                                                                          \
    X(void, ak_gmem_destroy, (struct ak_vm *, struct ak_gmem *))                                                       \
    X(int, ak_gmem_fd, (const struct ak_gmem *))                                                                       \
    X(int, ak_gmem_inject, (struct ak_vm *, struct ak_gmem *, u64, int))                                               \
    X(int, ak_pre_fault_memory, (struct ak_vcpu *, struct ak_pre_fault_memory *, u64))                                 \
    X(int, ak_device_add, (u64, u64))                                                                                  \
    X(void, ak_device_remove, (u64))                                                                                   \
    X(void, ak_python_signals, (const int *))                                                                          \
    X(void, ak_device_handler, (ak_device_fault *))                                                                    \
    X(bool, ak_vm_in_device_fault, (const struct ak_vm *))                                                             \
    X(void, ak_vm_refusal_hook, (struct ak_vm *, ak_refusal_hook *))                                                   \
    X(int64_t, ak_file_add, (int, struct ak_vcpu *, int))                                                              \
    X(int64_t, ak_file_find, (int64_t))                                                                                \
    X(int, ak_file_close, (int64_t))                                                                                   \
    X(int64_t, ak_file_map, (int, u64, u64))                                                                           \
    X(u64, ak_file_dead, (void))                                                                                       \
    X(void, ak_file_free, (u64))                                                                                       \
    X(int, ak_host_init, (void))                                                                                       \
    X(const char *, ak_self_test, (void))                                                                              \
    X(void, ak_fail_allocation, (u32))                                                                                 \
    X(void, ak_fail_engine_allocation, (u32))                                                                          \
    X(void, ak_ticker_tune, (u32, u32))                                                                                \
    X(int, ak_ticker_start, (void))                                                                                    \
    X(int, ak_set_file_size, (int, u64))                                                                               \
    X(int, ak_copy_in, (void *, u64, u64))                                                                             \
    X(int, ak_copy_out, (u64, const void *, u64))                                                                      \
    X(int, ak_vcpu_create, (struct ak_vm *, u32, struct kvm_run *, struct ak_vcpu **))                                 \
    X(void, ak_vcpu_destroy, (struct ak_vcpu *))                                                                       \
    X(void, ak_vcpu_configure, (struct ak_vcpu *, u32, u32, u32, u32))                                                 \
    X(void, ak_dirty_ring_setup, (struct ak_vcpu *, struct ak_dirty_gfn *, u32))                                       \
    X(int, ak_vcpu_ioctl, (struct ak_vcpu *, u32, void *))

/* By the contract: compiled (native.pxd), and as plain Python (native.py). */
#define AK_CONTRACT_EXPORTS(X)                                                                                         \
    X(struct ak_vcpu *, ak_vcpu_get, (int64_t))                                                                        \
    X(bool, ak_vcpu_put, (struct ak_vcpu *))                                                                           \
    X(int, ak_vcpu_dead, (struct ak_vcpu *))                                                                           \
    X(int, ak_vcpu_lock, (struct ak_vcpu *))                                                                           \
    X(bool, ak_device_raised, (const struct ak_vcpu *))                                                                \
    X(void, ak_vcpu_unlock, (struct ak_vcpu *))                                                                        \
    X(void, ak_signals_enter, (struct ak_vcpu *))                                                                      \
    X(bool, ak_signal_pending, (struct ak_vcpu *))                                                                     \
    X(void, ak_signals_leave, (struct ak_vcpu *))                                                                      \
    X(int, ak_sync_regs, (struct ak_vcpu *))                                                                           \
    X(void, ak_store_regs, (struct ak_vcpu *))                                                                         \
    X(int, ak_set_cr8, (struct ak_vcpu *))                                                                             \
    X(void, ak_post_kvm_run_save, (struct ak_vcpu *))                                                                  \
    X(void, ak_fill_memory_fault, (struct ak_vcpu *))                                                                  \
    X(void, ak_exit_mmio, (struct ak_vcpu *))                                                                          \
    X(void, ak_exit_io, (struct ak_vcpu *))                                                                            \
    X(void, ak_exit_internal, (struct ak_vcpu *, u32))                                                                 \
    X(bool, ak_hypercall, (struct ak_vcpu *))                                                                          \
    X(void, ak_complete_hypercall, (struct ak_vcpu *))                                                                 \
    X(void, ak_run_guest, (struct ak_vcpu *))                                                                          \
    X(bool, ak_irq_window, (struct ak_vcpu *))                                                                         \
    X(void, ak_cancel_injection, (struct ak_vcpu *))                                                                   \
    X(bool, ak_dirty_ring_full, (const struct ak_vcpu *))                                                              \
    X(void, ak_complete_pio, (struct ak_vcpu *))                                                                       \
    X(bool, ak_next_fragment, (struct ak_vcpu *))                                                                      \
    X(void, ak_answer_read, (struct ak_vcpu *))                                                                        \
    X(bool, ak_send_hwpoison_signal, (struct ak_vcpu *))

#define AK_DECLARE(type, name, arguments) type name arguments;
typedef int ak_device_fault(u64 hva, u32 access); /* to enum ak_device_answer */
struct ak_gmem;
struct ak_dirty_gfn;
AK_EXPORTS(AK_DECLARE)
AK_CONTRACT_EXPORTS(AK_DECLARE)
