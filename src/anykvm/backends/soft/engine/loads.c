/* Loads that translated code does not do by itself: from pages its TLB does not have, over two pages, from devices. */
#include "engine_internal.h"

/* The engine calls these from behind a block's code, so the return address says nothing of the instruction: that is in
 * retaddr. Should the host refuse the load, the handler finds only the former; here it learns what it stands for. */
static inline void note_load(struct ak_vcpu *v, uintptr_t site, uintptr_t retaddr)
{
    v->load_site = site;
    v->load_retaddr = retaddr;
}

/* An unaligned one of the instruction being emulated, perhaps from a device. False: do it as ever. */
static inline bool emulated(struct ak_vcpu *v, u64 addr, u32 size, u32 oi, uintptr_t retaddr, u64 *value)
{
    return __builtin_expect(v->emulation == AK_RUNNING, 0) && (addr & (size - 1)) &&
           ak_unaligned_load(v, addr, oi, size, retaddr, value);
}

#define LOAD(name, size, in_guest_order)                                                                               \
    extern u64 __real_##name(struct CPUX86State *, u64, u32, uintptr_t);                                               \
    u64 __wrap_##name(struct CPUX86State *env, u64 addr, u32 oi, uintptr_t retaddr)                                    \
    {                                                                                                                  \
        u64 value;                                                                                                     \
        note_load(ak_current, GETPC(), retaddr);                                                                       \
        return emulated(ak_current, addr, size, oi, retaddr, &value) ? in_guest_order(value)                           \
                                                                     : __real_##name(env, addr, oi, retaddr);          \
    }
LOAD(helper_ret_ldub_mmu_x86_64, 1, (u8))
LOAD(helper_le_lduw_mmu_x86_64, 2, (u16))
LOAD(helper_le_ldul_mmu_x86_64, 4, (u32))
LOAD(helper_le_ldq_mmu_x86_64, 8, (u64))
LOAD(helper_be_lduw_mmu_x86_64, 2, __builtin_bswap16)
LOAD(helper_be_ldul_mmu_x86_64, 4, __builtin_bswap32)
LOAD(helper_be_ldq_mmu_x86_64, 8, __builtin_bswap64)

/* The load of CMPXCHG8B, which is a helper of its own. */
extern u64 __real_cpu_ldq_data_ra_x86_64(struct CPUX86State *, u64, uintptr_t);
u64 __wrap_cpu_ldq_data_ra_x86_64(struct CPUX86State *env, u64 addr, uintptr_t retaddr)
{
    struct ak_vcpu *v = ak_current;
    u64 value;
    return emulated(v, addr, 8, (u32)ak_data_mmu_index(v), retaddr, &value)
               ? value
               : __real_cpu_ldq_data_ra_x86_64(env, addr, retaddr);
}
