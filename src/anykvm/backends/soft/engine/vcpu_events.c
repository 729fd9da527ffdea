/* KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: what is injected, pending or masked. Sources:
 * kvm_vcpu_ioctl_x86_get_vcpu_events(), kvm_vcpu_ioctl_x86_set_vcpu_events(). */
#include "engine_internal.h"
#include <errno.h>
#include <string.h>

#define VALID_FLAGS (KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW | \
                     KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_TRIPLE_FAULT)

/* process_nmi(): one more waits at most while NMIs are blocked or one is injected, else two. */
void ak_queue_nmis(struct ak_vcpu *v, u32 count)
{
    u32 limit = (v->env->hflags2 & HF2_NMI_MASK) || v->event.nmi_injected ? 1 : 2, pending = v->event.nmi_pending + count;
    v->event.nmi_pending = (u8)(pending < limit ? pending : limit);
}

void ak_get_events(struct ak_vcpu *v, struct kvm_vcpu_events *e)
{
    memset(e, 0, sizeof *e);
    ak_queue_nmis(v, 0); /* what is injected or blocked may have been set since */
    /* KVM conflates the two while KVM_CAP_EXCEPTION_PAYLOAD is off */
    if (v->event.vector != 3 && v->event.vector != 4) { /* kvm_exception_is_soft(): the instruction brings it back */
        e->exception.injected = v->event.injected | v->event.pending;
        e->exception.pending = v->event.pending;
    }
    if (e->exception.injected) {
        e->exception.nr = v->event.vector;
        e->exception.has_error_code = v->event.has_error;
        e->exception.error_code = v->event.error_code;
    }
    e->interrupt.injected = v->event.irq_injected;
    e->interrupt.nr = v->event.irq_vector;
    e->interrupt.shadow = v->env->hflags & HF_INHIBIT_IRQ_MASK ? KVM_X86_SHADOW_INT_STI | KVM_X86_SHADOW_INT_MOV_SS : 0; /* SVM does not tell them apart */
    e->nmi.injected = v->event.nmi_injected;
    e->nmi.pending = v->event.nmi_pending;
    e->nmi.masked = !!(v->env->hflags2 & HF2_NMI_MASK);
    e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM; /* smi: none */
}

/* 0 or -EINVAL: unknown flags, an exception number above 31 or NMI, system management mode. */
int ak_set_events(struct ak_vcpu *v, const struct kvm_vcpu_events *e)
{
    if (e->flags & ~(__u32)VALID_FLAGS)
        return -EINVAL;
    if (e->exception.injected && (e->exception.nr > 31 || e->exception.nr == 2))
        return -EINVAL;
    if ((e->flags & KVM_VCPUEVENT_VALID_SMM) && (e->smi.smm || e->smi.pending))
        return -EINVAL;
    v->event.injected = e->exception.injected;
    v->event.pending = 0;
    v->event.vector = e->exception.nr;
    v->event.has_error = e->exception.has_error_code;
    v->event.error_code = e->exception.error_code;
    v->event.irq_injected = e->interrupt.injected && !e->interrupt.soft; /* INT n brings it back (svm_inject_irq()) */
    v->event.irq_vector = e->interrupt.nr;
    if (e->flags & KVM_VCPUEVENT_VALID_SHADOW)
        v->env->hflags = (v->env->hflags & ~HF_INHIBIT_IRQ_MASK) | (e->interrupt.shadow ? HF_INHIBIT_IRQ_MASK : 0);
    v->event.nmi_injected = e->nmi.injected;
    if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
        v->event.nmi_pending = 0;
    v->env->hflags2 = (v->env->hflags2 & ~HF2_NMI_MASK) | (e->nmi.masked ? HF2_NMI_MASK : 0); /* IRET clears it */
    if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
        ak_queue_nmis(v, e->nmi.pending);
    if (e->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) { /* KVM_CAP_X86_TRIPLE_FAULT_EVENT is off: found when all else is set */
        v->event.unasked = !v->event.requested;
        return -EINVAL;
    }
    ak_request_event(v);
    return 0;
}
