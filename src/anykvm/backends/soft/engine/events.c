/* Exceptions and interrupts, delivered by the engine's own code through the guest's IDT. An event whose delivery meets
 * an unresolvable fault stays injected over the KVM_RUN that failed and is delivered by the next one; a software
 * interrupt goes back to its instruction instead. */
#include "engine_internal.h"

static bool has_error_code(u32 vector)
{
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
}

/* exception_type(): faults, which leave RIP at the instruction. */
static bool is_fault(u32 vector)
{
    return vector != 1 && vector != 2 && vector != 3 && vector != 4 && vector != 8 && vector != 18;
}

/* kvm_exception_is_soft() */
static bool is_soft(u32 vector)
{
    return vector == 3 || vector == 4;
}

/* Raise a guest exception from adapter code. */
void ak_raise(struct ak_vcpu *v, int vector, int error_code, uintptr_t retaddr)
{
    if (v->emulation != AK_NATIVE) {
        v->emulation = AK_NATIVE;
        v->emulate_alone = 0;
        v->nlog = v->nreplay = v->nfragments = 0; /* ABI.md 7.4 T14: earlier writes of the instruction are dropped */
    }
    raise_exception_err_ra_x86_64(v->env, vector, error_code, retaddr);
}

/* INT n: remember where the instruction is; its delivery may have to go back. */
void helper_raise_interrupt_x86_64(struct CPUX86State *env, int vector, int next_eip_addend)
{
    ak_current->deliver_eip = env->eip;
    raise_interrupt_x86_64(env, vector, 1, 0, next_eip_addend);
}

/* Replaced: in long mode the stock engine gives the error code of a bad gate as 16 times its vector, the size of the gate,
 * where the processor gives the gate's index, 8 times it (do_interrupt64()). Bit 1 says that it is a gate. */
void raise_exception_err_x86_64(struct CPUX86State *env, int vector, int error_code)
{
    bool gate = (vector == EXCP_NP || vector == EXCP_GP) && (error_code & 2) && (env->efer & EFER_LMA);
    raise_exception_err_ra_x86_64(env, vector, gate ? (error_code >> 1 & ~7) | (error_code & 7) : error_code, 0);
}

/* INTO likewise. */
extern void __real_helper_into_x86_64(struct CPUX86State *, int);
void __wrap_helper_into_x86_64(struct CPUX86State *env, int next_eip_addend)
{
    ak_current->deliver_eip = env->eip;
    __real_helper_into_x86_64(env, next_eip_addend);
}

static void deliver(struct ak_vcpu *v, void (*how)(struct ak_vcpu *))
{
    v->delivering = 1;
    how(v);
    v->delivering = 0;
}

static void deliver_exception(struct ak_vcpu *v)
{
    x86_cpu_do_interrupt_x86_64(v->cpu);
}

static void deliver_irq(struct ak_vcpu *v)
{
    do_interrupt_x86_hardirq_x86_64(v->env, v->event.irq_vector, 1);
}

static void deliver_nmi(struct ak_vcpu *v)
{
    do_interrupt_x86_hardirq_x86_64(v->env, 2, 1);
}

bool ak_is_string_io(struct ak_vcpu *v);
bool ak_is_hypercall(struct ak_vcpu *v);
u32 ak_icebp_length(struct ak_vcpu *v);
bool ak_is_sysenter(struct ak_vcpu *v);
bool ak_is_iret(struct ak_vcpu *v);

static void queue_exception(struct ak_vcpu *v, u32 vector)
{
    v->event.pending = 1;
    v->event.vector = (u8)vector;
    v->event.has_error = has_error_code(vector) && (v->env->cr[0] & CR0_PE);
    v->event.error_code = (u32)v->env->error_code;
}

/* The engine's exception hook, between blocks: exception_index, error_code, is_int are set, RIP is exact. */
void ak_event_hook(struct uc_struct *uc, u32 vector, void *user)
{
    struct ak_vcpu *v = ak_current;
    struct CPUX86State *env = v->env;
    bool queued = v->event.injected || v->event.pending, pending = v->event.pending;
    (void)uc;
    (void)user;
    v->translating = 0;
    v->event.pending = 0;
    u32 icebp = vector == EXCP_UD && !env->exception_is_int && !queued ? ak_icebp_length(v) : 0;
    if (icebp) { /* a #DB that the engine does not know; a trap, and no DPL is looked at (APM vol. 3, INT1) */
        env->eip += icebp;
        v->cpu->exception_index = (int)(vector = EXCP_DB);
    }
    if (vector == EXCP_UD && !env->exception_is_int && !queued) {
        if (ak_is_string_io(v)) {
            env->old_exception = -1;
            ak_string_io(v);
            return;
        }
        if (ak_is_hypercall(v)) {
            env->old_exception = -1;
            ak_leave(v, AK_EXIT_HYPERCALL, 0);
        }
        if (ak_is_sysenter(v) && (env->hflags & HF_CS64_MASK) && !(env->hflags & HF_CPL_MASK)) {
            env->old_exception = -1;
            ak_emulate_failed(v, 0); /* intercepted, and given up by em_sysenter() */
        }
    }
    if (v->stopping && !env->exception_is_int) { /* a completion, not a run: kvm_queue_exception(), for the next entry */
        queue_exception(v, vector);
        env->old_exception = -1;
        ak_leave(v, AK_EXIT_KICKED, 0);
    }
    if (is_fault(vector) && !env->exception_is_int) {
        v->deliver_rf |= !pending && !(env->eflags & RFLAGS_RF);
        env->eflags |= RFLAGS_RF; /* in the image on the stack */
        if ((env->hflags2 & HF2_NMI_MASK) && ak_is_iret(v))
            env->hflags2 &= ~HF2_NMI_MASK; /* iret_interception(): the attempt is enough */
    }
    v->deliver_soft = env->exception_is_int;
    v->event.nmi_injected = v->event.irq_injected = 0; /* one whose delivery raised this is over */
    queue_exception(v, vector);
    v->event.pending = 0;
    v->event.injected = !env->exception_is_int;
    v->table_fault = v->table_fault && vector == EXCP_PF;
    deliver(v, deliver_exception);
    v->event.injected = v->table_fault = 0;
    v->deliver_soft = v->deliver_rf = 0;
}

/* The engine gives up, say for a task register that is no TSS: it would end the process. The guest ends instead. */
void cpu_abort_x86_64(struct CPUState *cpu, const char *format, ...)
{
    (void)cpu;
    (void)format;
    ak_leave(ak_current, AK_EXIT_SHUTDOWN, 0);
}

/* Triple fault: the engine asks for a reset. */
void qemu_system_reset_request(struct uc_struct *uc)
{
    (void)uc;
    ak_current->exit.kind = AK_EXIT_SHUTDOWN;
}

bool ak_interrupt_allowed(struct ak_vcpu *v)
{
    return (ak_get_rflags(v) & RFLAGS_IF) && !(v->env->hflags & HF_INHIBIT_IRQ_MASK);
}

/* Replaces the engine's check where a block begins: the instruction being emulated is never skipped by a kick. */
void helper_check_exit_request_x86_64(void *uc, u32 in_delay_slot)
{
    struct ak_vcpu *v = ak_current;
    (void)uc;
    (void)in_delay_slot;
    if (__builtin_expect((int32_t)v->cpu->icount_decr_ptr->u32 >= 0, 1) || v->emulation == AK_RUNNING)
        return;
    cpu_loop_exit_restore_x86_64(v->cpu, GETPC());
}

/* kvm_check_and_inject_events(): injected until it is delivered; NMIs are blocked from then to IRET. */
static void inject_nmi(struct ak_vcpu *v)
{
    v->env->hflags2 |= HF2_NMI_MASK;
    deliver(v, deliver_nmi);
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
        deliver(v, deliver_irq);
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
    if (is_soft(v->event.vector) && ((alone && v->event.nmi_pending && nmi_allowed(v)) || !(length = soft_exception_length(v))))
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
        if (is_fault(v->event.vector))
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
    if (v->deliver_soft || (v->event.injected && is_soft(v->event.vector)))
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
