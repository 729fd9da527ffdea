/* Instructions of SVM and of system management mode. The engine's own read and write its physical memory at addresses that
 * the guest gives. Here that is the address space of the process, so they must not be reached. No guest gets there: EFER.SVME
 * cannot be set, and there is no such mode. Should that change, they are undefined opcodes until they are ours. */
#include "engine_internal.h"

static void __attribute__((noreturn)) undefined(uintptr_t retaddr)
{
    ak_raise(ak_current, EXCP_UD, 0, retaddr);
}

void helper_vmrun_x86_64(struct CPUX86State *env, int aflag, int next_eip_addend)
{
    (void)env, (void)aflag, (void)next_eip_addend;
    undefined(GETPC());
}

void helper_vmload_x86_64(struct CPUX86State *env, int aflag)
{
    (void)env, (void)aflag;
    undefined(GETPC());
}

void helper_vmsave_x86_64(struct CPUX86State *env, int aflag)
{
    (void)env, (void)aflag;
    undefined(GETPC());
}

void helper_rsm_x86_64(struct CPUX86State *env)
{
    (void)env;
    undefined(GETPC());
}
