/* What the engine does to the host's processor, and the host's processor to the engine.
 *
 * A helper of the engine that traps (divides by zero, reads a table out of bounds, meets an instruction that this
 * processor lacks) would end the process. Here it ends the vCPU's KVM_RUN: with KVM_INTERNAL_ERROR_EMULATION, RIP at the
 * instruction, and a line on stderr. No guest is known that brings this about; each such line is a fault of ours.
 *
 * The engine computes with the host's SSE unit. It must do so in the mode it was written for, whatever the thread has set
 * (rounding, flush to zero, unmasked exceptions), and the thread must find its own mode again. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <immintrin.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#define MXCSR_FLAGS 0x3fu

/* -- the host's floating-point modes ------------------------------------------------------------------------------- */

static u16 control_word(void)
{
    u16 word;
    __asm__ volatile("fnstcw %0" : "=m"(word));
    return word;
}

/* Before the guest runs. Returns what ak_float_leave() needs. */
struct ak_float ak_float_enter(void)
{
    struct ak_float mine = {_mm_getcsr(), control_word()};
    if ((mine.mxcsr & ~MXCSR_FLAGS) != AK_MXCSR_DEFAULT)
        _mm_setcsr(AK_MXCSR_DEFAULT);
    return mine;
}

/* The thread's own modes again, and its own sticky flags. A handler of a fault that did not return has reset both words. */
void ak_float_leave(struct ak_float mine)
{
    if (_mm_getcsr() != mine.mxcsr)
        _mm_setcsr(mine.mxcsr);
    if (control_word() != mine.control)
        __asm__ volatile("fldcw %0" : : "m"(mine.control));
}

/* In a handler that will not return: the kernel has reset the modes for it. */
void ak_float_of_interrupted(const ucontext_t *context)
{
    const struct _libc_fpstate *state = context->uc_mcontext.fpregs;
    if (state)
        ak_float_leave((struct ak_float){state->mxcsr, state->cwd});
}

/* -- traps --------------------------------------------------------------------------------------------------------- */

extern const char engine_begin[] __asm__("__ehdr_start") __attribute__((visibility("hidden")));
extern const char engine_end[] __asm__("etext") __attribute__((visibility("hidden")));

static bool in_engine(uintptr_t pc)
{
    return pc - (uintptr_t)engine_begin < (uintptr_t)(engine_end - engine_begin);
}

/* Safe in a handler: no allocation, one write. */
static void tell(const struct ak_vcpu *v, int signo, uintptr_t pc)
{
    char line[160];
    const char *where = in_engine(pc) ? "engine" : "translated code";
    const char *name = signo == SIGFPE ? "SIGFPE" : signo == SIGILL ? "SIGILL" : signo == SIGBUS ? "SIGBUS" : "SIGSEGV";
    int n = snprintf(line, sizeof line,
                     "anykvm: %s in the %s at +%#lx, for the guest's instruction at RIP %#lx: KVM_EXIT_INTERNAL_ERROR\n", name,
                     where, (unsigned long)(in_engine(pc) ? pc - (uintptr_t)engine_begin : pc), (unsigned long)v->env->eip);
    if (write(STDERR_FILENO, line, (size_t)n) < 0)
        return; /* nobody listens */
}

/* A trap of this thread at the interrupted instruction. False: it is not the engine's, working for a guest. Else the vCPU
 * leaves the guest, and this does not return. */
bool ak_engine_trap(struct ak_vcpu *v, int signo, const ucontext_t *context)
{
    uintptr_t pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP], retaddr = 0;
    if (ak_in_code(v, pc))
        retaddr = pc + 2; /* the restore takes two bytes off a return address */
    else if (!in_engine(pc))
        return false;
    else if (!v->translating && !v->delivering) {
        retaddr = ak_helper_return(v);
        retaddr = retaddr == v->load_site ? v->load_retaddr : retaddr;
        retaddr = ak_in_code(v, retaddr) ? retaddr : 0;
    }
    if (retaddr)
        cpu_restore_state_x86_64(v->cpu, retaddr, true);
    tell(v, signo, pc);
    v->emulation = AK_NATIVE;
    v->emulate_alone = 0;
    v->nlog = v->nreplay = v->nfragments = 0;
    ak_leave(v, AK_EXIT_EMULATION, 0);
}
