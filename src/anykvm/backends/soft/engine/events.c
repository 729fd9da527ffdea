/* Exceptions, delivered by the engine's own code through the guest's IDT; what is injected is inject.c's. An event whose
 * delivery meets an unresolvable fault stays injected over the KVM_RUN that failed and is delivered by the next one; a software
 * interrupt goes back to its instruction instead. */
#include "engine_internal.h"

static bool has_error_code(u32 vector)
{
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
}

/* exception_type(): faults, which leave RIP at the instruction. */
bool ak_is_fault(u32 vector)
{
    return vector != 1 && vector != 2 && vector != 3 && vector != 4 && vector != 8 && vector != 18;
}

/* kvm_exception_is_soft() */
bool ak_is_soft(u32 vector)
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

/* Have an event delivered; a fault of it is then known for one. */
void ak_deliver(struct ak_vcpu *v, void (*how)(struct ak_vcpu *))
{
    v->delivering = 1;
    how(v);
    v->delivering = 0;
}

static void deliver_exception(struct ak_vcpu *v)
{
    x86_cpu_do_interrupt_x86_64(v->cpu);
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
    if (ak_is_fault(vector) && !env->exception_is_int) {
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
    ak_deliver(v, deliver_exception);
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
