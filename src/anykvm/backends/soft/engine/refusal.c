/* Failures of page look-ups on demand: a question in front of hva_to_pfn() and kvm_gmem_get_pfn(), as the kernel's
 * fault injection has one in front of its allocators. Nobody asks where no hook is set: that costs one branch a look-up.
 * The hook may take the interpreter's lock. It runs inside the fault, as a device's fault handler does (hva.c). */
#include "engine_internal.h"

/* Set the hook of a VM, or take it away with NULL. In force for every vCPU, with empty TLBs, when it returns. */
void ak_vm_refusal_hook(struct ak_vm *vm, ak_refusal_hook *hook)
{
    ak_vm_pause(vm);
    vm->refusal_hook = hook;
    ak_vm_resume(vm, true);
}

/* Ask the hook. 0: look the page up. For AK_LOOKUP_HVA enum ak_host_fault, for AK_LOOKUP_GMEM that or -errno. An
 * interrupted look-up counts as a signal that is pending until KVM_RUN returns (KVM_PFN_ERR_SIGPENDING). */
int ak_refused(struct ak_vcpu *v, enum ak_lookup lookup, u64 gpa, enum ak_access access)
{
    ak_refusal_hook *hook = v->vm->refusal_hook;
    if (__builtin_expect(!hook, 1))
        return 0;
    struct ak_vcpu *current = ak_current;
    ak_current = NULL; /* a crash in there is not the guest's */
    int why = hook(lookup, v->id, gpa & AK_PAGE_MASK, access);
    ak_current = current;
    v->interrupted |= why == AK_HOST_INTERRUPTED;
    return why;
}

/* What hva_to_pfn() makes of an answer: enum ak_pfn. */
u32 ak_refusal_pfn(int why)
{
    return why == AK_HOST_OK            ? KVM_PFN_OK
           : why == AK_HOST_POISONED    ? KVM_PFN_ERR_HWPOISON
           : why == AK_HOST_INTERRUPTED ? KVM_PFN_ERR_SIGPENDING
                                        : KVM_PFN_ERR_FAULT;
}
