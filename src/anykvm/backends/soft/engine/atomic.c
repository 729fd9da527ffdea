/* XCHG with memory. The engine's is a load and a store, between which another vCPU's store is lost: no lock of a guest's
 * would hold. Its other locked instructions are the host's. */
#include "engine_internal.h"

#define EXCHANGE(size, type)                                                                                           \
    extern type helper_atomic_cmpxchg##size##_mmu_x86_64(struct CPUX86State *, u64 addr, type old, type value, u32 oi, \
                                                         uintptr_t retaddr);                                           \
    type helper_atomic_xchg##size##_x86_64(struct CPUX86State *env, u64 addr, type value, u32 oi)                      \
    {                                                                                                                  \
        uintptr_t retaddr = GETPC();                                                                                   \
        type old = 0, seen;                                                                                            \
        while ((seen = helper_atomic_cmpxchg##size##_mmu_x86_64(env, addr, old, value, oi, retaddr)) != old)           \
            old = seen;                                                                                                \
        return old;                                                                                                    \
    }
EXCHANGE(b, u32)
EXCHANGE(w_le, u32)
EXCHANGE(l_le, u32)
EXCHANGE(q_le, u64)
