/* IDIV of EDX:EAX by a 32-bit operand. The engine divides 64-bit numbers and looks at the quotient afterwards. The most
 * negative number divided by -1 has no 64-bit quotient: the host raises SIGFPE in the middle of the engine, where the
 * guest is to have #DE (SDM vol. 2, IDIV).
 *
 * The other divisions are the engine's own. They divide 16 and 32 bits in twice the width, and 64 bits by hand. */
#include "engine_internal.h"

#define EXCP_DE 0

void helper_idivl_EAX_x86_64(struct CPUX86State *env, u64 operand)
{
    int64_t dividend = (int64_t)(env->regs[R_EDX] << 32 | (u32)env->regs[R_EAX]);
    int64_t divisor = (int32_t)operand;
    if (divisor == 0 || (dividend == INT64_MIN && divisor == -1))
        ak_raise(ak_current, EXCP_DE, 0, GETPC());
    int64_t quotient = dividend / divisor;
    if (quotient != (int32_t)quotient)
        ak_raise(ak_current, EXCP_DE, 0, GETPC());
    env->regs[R_EAX] = (u32)quotient;
    env->regs[R_EDX] = (u32)(dividend % divisor);
}
