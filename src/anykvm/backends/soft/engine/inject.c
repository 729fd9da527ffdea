/* What an entry injects: exceptions, NMIs and interrupts of user space, of earlier entries and of completions, and the
 * interrupt window. kvm_check_and_inject_events(), svm_cancel_injection(), svm_complete_interrupts(). */
#include "engine_internal.h"

static void deliver_irq(struct ak_vcpu *v)
{
    do_interrupt_x86_hardirq_x86_64(v->env, v->event.irq_vector, 1);
}

static void deliver_nmi(struct ak_vcpu *v)
{
    do_interrupt_x86_hardirq_x86_64(v->env, 2, 1);
}

bool ak_interrupt_allowed(struct ak_vcpu *v)
{
    return (ak_get_rflags(v) & RFLAGS_IF) && !(v->env->hflags & HF_INHIBIT_IRQ_MASK);
}

/* kvm_check_and_inject_events(): injected until it is delivered; NMIs are blocked from then to IRET. */
static void inject_nmi(struct ak_vcpu *v)
{
    v->env->hflags2 |= HF2_NMI_MASK;
    ak_deliver(v, deliver_nmi);
    v->event.nmi_injected = 0;
}

bool ak_sse_boundary(struct ak_vcpu *v);
void ak_finish_string_in(struct ak_vcpu *v);

/* Something is to be done where a block begins, now or when the guest allows it. */
static bool waiting(const struct ak_vcpu *v)
{
    return v->event.irq_injected || v->event.nmi_injected || v->event.nmi_pending || v->run->request_interrupt_window ||
           v->single_step_sse;
}

static bool nmi_allowed(const struct ak_vcpu *v)
{
    return !v->event.unasked && !(v->env->hflags2 & HF2_NMI_MASK) && !(v->env->hflags & HF_INHIBIT_IRQ_MASK);
}

/* kvm_make_request(KVM_REQ_EVENT): the next entry looks at the events. */
void ak_request_event(struct ak_vcpu *v)
{
    v->event.requested = 1;
    v->event.unasked = 0;
}

/* An entry: without a request what is injected is forgotten at the next exit. An NMI that a shadow blocks is looked at
 * again when one instruction was stepped over (svm_enable_nmi_window()); one that is intercepted, like HLT, is not. */
static void look_at_events(struct ak_vcpu *v)
{
    struct ak_event *e = &v->event;
    if (v->run->request_interrupt_window)
        e->unasked = 0;
    if (e->unasked)
        e->injected = e->pending = e->irq_injected = e->nmi_injected = 0;
    e->unasked |= e->nmi_pending && !(v->env->hflags2 & HF2_NMI_MASK) && (v->env->hflags & HF_INHIBIT_IRQ_MASK);
    e->unasked_rip = v->env->eip;
    e->requested = 0;
}

/* Replaces the engine's interrupt hook: called between blocks while interrupt_request is set, in the order KVM has:
 * the emulated instruction first, then an injected NMI or interrupt, then an NMI that waits, whose handler so runs first,
 * then the interrupt window. */
_Bool x86_cpu_exec_interrupt_x86_64(struct CPUState *cpu, int request)
{
    struct ak_vcpu *v = ak_current;
    bool taken = false;
    (void)request;
    if (v->string_in) {
        ak_finish_string_in(v);
    } else if (v->emulation != AK_NATIVE) {
        v->kick |= cpu->exit_request; /* a kick waits for the instruction */
        cpu->exit_request = 0;
        ak_emulate_boundary(v);
        if (v->emulation == AK_NATIVE && (v->kick || v->event.nmi_injected || v->event.irq_injected))
            cpu->exit_request = 1; /* injected: before the next instruction, so by the next entry */
        if (v->stopping && v->emulation == AK_NATIVE)
            cpu->exit_request = 1;
        return true;
    }
    if (v->stopping) { /* a completion, not a run: nothing else may happen (ABI.md 1, row 17) */
        cpu->exit_request = 1;
        return true;
    }
    if (v->single_step_sse)
        taken = ak_sse_boundary(v);
    if (v->event.unasked && v->env->eip != v->event.unasked_rip)
        v->event.unasked = 0;
    /* What user space or an earlier entry injected comes first, whether IF or an NMI blocks it or not; then what waits. */
    if (v->event.nmi_injected) {
        inject_nmi(v);
        taken = true;
    }
    if (v->event.irq_injected) {
        ak_deliver(v, deliver_irq);
        v->event.irq_injected = 0;
        taken = true;
    }
    if (v->event.nmi_pending && nmi_allowed(v)) {
        v->event.nmi_injected = 1;
        v->event.nmi_pending--;
        inject_nmi(v);
        taken = true;
    }
    if (!taken && ak_interrupt_allowed(v) && v->run->request_interrupt_window) {
        v->exit.kind = AK_EXIT_IRQ_WINDOW;
        cpu->exit_request = 1;
    }
    if (!waiting(v))
        cpu->interrupt_request &= ~CPU_INTERRUPT_HARD;
    return taken;
}

/* svm_update_soft_interrupt_rip(): #BP and #OF are of the instruction at RIP, behind which they report. Its length; 0 if
 * it is not INT3, INT n or INTO, and then nothing is injected. */
static u32 soft_exception_length(struct ak_vcpu *v)
{
    u8 code[15];
    u32 size = ak_peek_instruction(v, code);
    if (!size || (code[0] != 0xcc && code[0] != 0xcd && code[0] != 0xce))
        return 0;
    return code[0] == 0xcd ? 2 : 1;
}

/* kvm_check_and_inject_events() enters with the first of what is injected; svm_complete_interrupts() forgets the others,
 * after the guest ran or when the entry is given up. A software exception is forgotten by looking at its instruction
 * (x86_emulate_instruction()), so that an NMI that waits may take its place; the instruction raises it again. Returns the
 * length of that instruction. */
static u32 choose_event(struct ak_vcpu *v)
{
    bool alone = !v->event.nmi_injected && !v->event.irq_injected;
    u32 length = 0;
    if (!v->event.injected && !v->event.pending) {
        v->event.irq_injected &= !v->event.nmi_injected;
        return 0;
    }
    v->event.nmi_injected = v->event.irq_injected = 0;
    if (ak_is_soft(v->event.vector) && ((alone && v->event.nmi_pending && nmi_allowed(v)) || !(length = soft_exception_length(v))))
        v->event.injected = v->event.pending = 0;
    return length;
}

/* An entry that a signal gives up when its event is chosen: svm_cancel_injection() keeps that one injected. */
void ak_cancel_injection(struct ak_vcpu *v)
{
    bool alone = !v->event.nmi_injected && !v->event.irq_injected;
    look_at_events(v);
    ak_request_event(v);
    choose_event(v);
    if (v->event.pending) {
        v->event.pending = 0;
        v->event.injected = 1;
        if (ak_is_fault(v->event.vector))
            v->env->eflags |= RFLAGS_RF;
    }
    if (alone && !v->event.injected && v->event.nmi_pending && nmi_allowed(v)) {
        v->event.nmi_pending--;
        v->event.nmi_injected = 1;
    }
    if (v->event.nmi_injected)
        v->env->hflags2 |= HF2_NMI_MASK;
}

/* The guest was left while an event was being delivered: INT n goes back to its instruction; everything else stays
 * injected, #BP and #OF with RIP at the instruction they are of (svm_complete_soft_interrupt()). */
void ak_delivery_failed(struct ak_vcpu *v)
{
    if (v->deliver_soft || (v->event.injected && ak_is_soft(v->event.vector)))
        v->env->eip = v->deliver_eip;
    if (v->deliver_soft)
        v->event.injected = 0;
    if (v->deliver_rf) /* it was for the stack only */
        v->env->eflags &= ~RFLAGS_RF;
    v->delivering = v->deliver_soft = v->deliver_rf = v->table_fault = 0;
}

/* Before entering: what is injected comes first. */
bool ak_deliver_pending(struct ak_vcpu *v)
{
    u32 length = 0;
    if (!v->stopping) {
        look_at_events(v);
        length = choose_event(v);
    }
    if (waiting(v))
        v->cpu->interrupt_request |= CPU_INTERRUPT_HARD;
    if ((v->event.injected || v->event.pending) && !v->stopping) {
        v->deliver_eip = v->env->eip;
        v->env->eip += length;
        v->cpu->exception_index = v->event.vector;
        v->env->error_code = (int)v->event.error_code;
        v->env->exception_is_int = 0;
        return true;
    }
    if (v->emulation != AK_NATIVE || v->string_in || v->stopping)
        v->cpu->interrupt_request |= CPU_INTERRUPT_HARD;
    return false;
}
