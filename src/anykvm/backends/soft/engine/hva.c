/* A host virtual address, asked for as KVM asks: km:hva_to_pfn(). The host's MMU answers; two kinds of memory answer for
 * themselves: pages that were made to count as poisoned, without root and without harm to anybody else. */
#include "engine_internal.h"
#include <errno.h>
#include <stdlib.h>

static bool is_poisoned(const struct ak_vm *vm, u64 hva)
{
    for (u32 i = 0; i < vm->npoisoned; i++)
        if (vm->poisoned[i] == hva)
            return true;
    return false;
}

/* Let a host page count as poisoned for this VM's guests, or no longer: what MADV_HWPOISON does, without being root.
 * 0 or -ENOMEM. Takes effect for every vCPU before it returns. */
int ak_poison(struct ak_vm *vm, u64 hva, bool poisoned)
{
    int r = 0;
    hva &= AK_PAGE_MASK;
    ak_vm_pause(vm);
    for (u32 i = 0; i < vm->npoisoned; i++)
        if (vm->poisoned[i] == hva)
            vm->poisoned[i--] = vm->poisoned[--vm->npoisoned];
    if (poisoned) {
        u64 *grown = realloc(vm->poisoned, (vm->npoisoned + 1) * sizeof *grown);
        if (grown) {
            vm->poisoned = grown;
            vm->poisoned[vm->npoisoned++] = hva;
        } else
            r = -ENOMEM;
    }
    ak_vm_resume(vm, true);
    return r;
}

/* hva_to_pfn(): enum ak_pfn, and why in *host_fault. Never KVM_PFN_NOSLOT. */
u32 ak_hva_to_pfn(struct ak_vcpu *v, u64 hva, enum ak_access access, u32 *host_fault)
{
    if (v->vm->npoisoned && is_poisoned(v->vm, hva))
        *host_fault = AK_HOST_POISONED;
    else
        *host_fault = (u32)ak_host_touch(hva, access == AK_WRITE, NULL);
    if (!*host_fault)
        return KVM_PFN_OK;
    return *host_fault == AK_HOST_POISONED ? KVM_PFN_ERR_HWPOISON : KVM_PFN_ERR_FAULT;
}
