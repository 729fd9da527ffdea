/* KVM's structures as the system's headers have them, and what headers older than 6.8 lack. */
#pragma once
#include <linux/kvm.h>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#define AK_MEMORY_EXIT_FLAG_PRIVATE (1ull << 3)
#define AK_MEM_GUEST_MEMFD (1u << 2) /* KVM_MEM_GUEST_MEMFD */
#define AK_HC_MAP_GPA_RANGE 12       /* KVM_HC_MAP_GPA_RANGE */

/* kvm_run.memory_fault: the exit union starts at byte 32. */
struct ak_memory_fault {
    __u64 flags, gpa, size;
};
/* kvm_run.hypercall; flags was two 32-bit fields before 6.4. */
struct ak_hypercall_exit {
    __u64 nr, args[6], ret, flags;
};
_Static_assert(__builtin_offsetof(struct kvm_run, hw) == 32, "exit union");

static inline struct ak_memory_fault *ak_run_memory_fault(struct kvm_run *run)
{
    return (struct ak_memory_fault *)&run->hw;
}

static inline struct ak_hypercall_exit *ak_run_hypercall(struct kvm_run *run)
{
    return (struct ak_hypercall_exit *)&run->hw;
}
