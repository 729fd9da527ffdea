/* Stores that the engine would do in pieces.
 *
 * To memory that it watches (pages with translated code) it writes unaligned ones byte by byte; another vCPU, or its
 * translator, would see halves of them, which no x86 CPU shows for a store within eight aligned bytes (AMD APM vol. 2,
 * 7.3.2). Here a store within a page is one store of the host's.
 *
 * One over two pages it writes byte by byte as well, and the host may refuse the second page when the first is written
 * already. The instruction is run again then: it would have stored although it faulted, and one that reads first would
 * be done twice. Here both pages are written, or neither is. */
#include "engine_internal.h"

#define MO_AMASK (7 << 4)
#define MMU_DATA_STORE 1

extern void *probe_access_x86_64(struct CPUX86State *, u64 addr, int size, int access, int mmu_idx, uintptr_t retaddr);

/* Where to store at once, the watcher told; NULL: not memory, over two pages, or for the alignment check. */
static void *whole(struct CPUX86State *env, u64 addr, u32 size, u32 oi, uintptr_t retaddr)
{
    if ((addr & ~AK_PAGE_MASK) + size > AK_PAGE_SIZE || ((oi >> 4) & MO_AMASK))
        return NULL;
    return probe_access_x86_64(env, addr, (int)size, MMU_DATA_STORE, oi & 15, retaddr);
}

/* A store over two pages: of each, the 8 bytes next to the boundary are replaced in one step. If the host refuses the
 * second, the first gets its bytes back, unless another vCPU has written them since. False: not to memory alone. */
static bool across(struct CPUX86State *env, u64 addr, u64 value, u32 size, u32 oi, uintptr_t retaddr)
{
    struct ak_vcpu *v = ak_current;
    u32 first = (u32)(AK_PAGE_SIZE - (addr & ~AK_PAGE_MASK));
    if (first >= size || ((oi >> 4) & MO_AMASK))
        return false;
    u8 *low = probe_access_x86_64(env, addr, (int)first, MMU_DATA_STORE, oi & 15, retaddr);
    u8 *high = low ? probe_access_x86_64(env, addr + first, (int)(size - first), MMU_DATA_STORE, oi & 15, retaddr) : NULL;
    if (!high)
        return false;
    u32 shift = 8 * (8 - first), rest = 8 * (size - first);
    u64 low_mask = ~0ull << shift, high_mask = (1ull << rest) - 1, before, ignored;
    u64 tail = (u64)low + first - 8;
    v->interruptible = v->emulation == AK_NATIVE;
    int why = ak_host_merge(tail, low_mask, value << shift, &before);
    if (!why && (why = ak_host_merge((u64)high, high_mask, value >> (8 * first), &ignored)))
        ak_host_unmerge(tail, low_mask, value << shift, before);
    v->interruptible = 0;
    if (why)
        ak_restart(v, why == AK_HOST_INTERRUPTED, retaddr);
    return true;
}

#define STORE(name, type, size, in_host_order)                                                                         \
    struct name##_type { type value; } __attribute__((packed));                                                        \
    extern void __real_##name(struct CPUX86State *, u64, type, u32, uintptr_t);                                        \
    void __wrap_##name(struct CPUX86State *env, u64 addr, type value, u32 oi, uintptr_t retaddr)                       \
    {                                                                                                                  \
        struct name##_type *at = addr & (size - 1) ? whole(env, addr, size, oi, retaddr) : NULL;                       \
        if (at)                                                                                                        \
            ((volatile struct name##_type *)at)->value = in_host_order(value);                                         \
        else if (!across(env, addr, in_host_order(value), size, oi, retaddr))                                          \
            __real_##name(env, addr, value, oi, retaddr);                                                              \
    }
STORE(helper_le_stw_mmu_x86_64, u16, 2, (u16))
STORE(helper_le_stl_mmu_x86_64, u32, 4, (u32))
STORE(helper_le_stq_mmu_x86_64, u64, 8, (u64))
STORE(helper_be_stw_mmu_x86_64, u16, 2, __builtin_bswap16)
STORE(helper_be_stl_mmu_x86_64, u32, 4, __builtin_bswap32)
STORE(helper_be_stq_mmu_x86_64, u64, 8, __builtin_bswap64)
