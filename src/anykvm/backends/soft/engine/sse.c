/* MXCSR: flags, flush-to-zero, and #XM. The engine computes SSE exceptions but never raises one. While a guest has one
 * unmasked (rare), it runs instruction by instruction: a copy of the registers before each, put back when the
 * instruction turns out to have raised. */
#include "engine_internal.h"
#include <string.h>

#define MXCSR_MASKS 0x1f80u
#define MXCSR_FZ 0x8000u
#define MXCSR_DAZ 0x40u

static __thread struct {
    bool valid;
    u64 regs[16], eip, cc_src, cc_dst;
    u32 cc_op;
    struct ZMMRegister xmm[16];
} before;

/* The engine's float_status flags as MXCSR bits 0..5. */
u8 ak_sse_flags(struct ak_vcpu *v)
{
    u8 f = v->env->sse_status.exception_flags;
    return (u8)((f & 1) | (f & 64 ? 2 : 0) | (f & 4) | (f & 8) | (f & 16) | (f & 32));
}

static void set_status(struct FloatStatus *s, u32 mxcsr)
{
    static const u8 rounding[4] = {0, 1, 2, 3}; /* nearest, down, up, zero: the same numbers */
    s->bytes[FLOAT_STATUS_ROUNDING] = rounding[mxcsr >> 13 & 3];
    s->bytes[FLOAT_STATUS_FTZ] = !!(mxcsr & MXCSR_FZ);
    s->bytes[FLOAT_STATUS_DAZ] = !!(mxcsr & MXCSR_DAZ);
}

/* Replaces the engine's, which flushes x87 results instead of SSE results. */
void update_mxcsr_status_x86_64(struct CPUX86State *env)
{
    struct ak_vcpu *v = (struct ak_vcpu *)ak_current;
    set_status(&env->sse_status, env->mxcsr);
    if (v)
        v->single_step_sse = (env->mxcsr & MXCSR_MASKS) != MXCSR_MASKS;
}

void ak_load_mxcsr(struct ak_vcpu *v, u32 value)
{
    v->env->mxcsr = value;
    v->env->sse_status.exception_flags = 0;
    set_status(&v->env->sse_status, value);
    v->single_step_sse = (value & MXCSR_MASKS) != MXCSR_MASKS;
}

void helper_ldmxcsr_x86_64(struct CPUX86State *env, u32 value)
{
    struct ak_vcpu *v = ak_current;
    uintptr_t retaddr = GETPC();
    bool stepping = v->single_step_sse;
    (void)env;
    if (value & ~0xffffu)
        ak_raise(v, EXCP_GP, 0, retaddr);
    ak_load_mxcsr(v, value);
    if (v->single_step_sse && !stepping) { /* the rest of this block was translated for full speed: leave it here */
        v->cpu->interrupt_request |= CPU_INTERRUPT_HARD;
        v->cpu->exception_index = -1;
        before.valid = false;
        cpu_loop_exit_restore_x86_64(v->cpu, retaddr);
    }
}

static void take_copy(struct CPUX86State *env)
{
    before.valid = true;
    memcpy(before.regs, env->regs, sizeof before.regs);
    memcpy(before.xmm, env->xmm_regs, sizeof before.xmm);
    before.eip = env->eip;
    before.cc_src = env->cc_src;
    before.cc_dst = env->cc_dst;
    before.cc_op = env->cc_op;
}

static void put_back(struct CPUX86State *env)
{
    memcpy(env->regs, before.regs, sizeof before.regs);
    memcpy(env->xmm_regs, before.xmm, sizeof before.xmm);
    env->eip = before.eip;
    env->cc_src = before.cc_src;
    env->cc_dst = before.cc_dst;
    env->cc_op = before.cc_op;
}

/* Between two instructions of a stepping guest. */
bool ak_sse_boundary(struct ak_vcpu *v)
{
    struct CPUX86State *env = v->env;
    u32 raised = ak_sse_flags(v);
    if (before.valid && raised) {
        env->mxcsr |= raised;
        env->sse_status.exception_flags = 0;
        if (raised & ~(env->mxcsr >> 7) & 0x3f) {
            put_back(env);
            before.valid = false;
            ak_raise(v, env->cr[4] & CR4_OSXMMEXCPT ? EXCP_XM : EXCP_UD, 0, 0);
        }
    }
    take_copy(env);
    v->cpu->cflags_next_tb = 1;
    return true;
}
