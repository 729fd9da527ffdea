/* Stores to memory that the engine watches (pages with translated code). It writes unaligned ones byte by byte; another
 * vCPU, or its translator, would see halves of them, which no x86 CPU shows for a store within eight aligned bytes (AMD APM
 * vol. 2, 7.3.2). Here a store within a page is one store of the host's. */
#include "engine_internal.h"

#define MO_AMASK (7 << 4)
#define MMU_DATA_STORE 1

extern void *probe_access_x86_64(struct CPUX86State *, u64 addr, int size, int access, int mmu_idx, uintptr_t retaddr);

/* Where to store at once, the watcher told; NULL: not memory, over two pages, or for the alignment check. */
static void *whole(struct CPUX86State *env, u64 addr, u32 size, u32 oi, uintptr_t retaddr)
{
    if ((addr & ~AK_PAGE_MASK) + size > AK_PAGE_SIZE || ((oi >> 4) & MO_AMASK) || ak_current->emulation == AK_RUNNING)
        return NULL;
    return probe_access_x86_64(env, addr, (int)size, MMU_DATA_STORE, oi & 15, retaddr);
}

#define STORE(name, type, size)                                                                                        \
    struct name##_type { type value; } __attribute__((packed));                                                        \
    extern void __real_##name(struct CPUX86State *, u64, type, u32, uintptr_t);                                        \
    void __wrap_##name(struct CPUX86State *env, u64 addr, type value, u32 oi, uintptr_t retaddr)                       \
    {                                                                                                                  \
        struct name##_type *at = addr & (size - 1) ? whole(env, addr, size, oi, retaddr) : NULL;                       \
        if (at)                                                                                                        \
            ((volatile struct name##_type *)at)->value = value;                                                        \
        else                                                                                                           \
            __real_##name(env, addr, value, oi, retaddr);                                                              \
    }
STORE(helper_le_stw_mmu_x86_64, u16, 2)
STORE(helper_le_stl_mmu_x86_64, u32, 4)
STORE(helper_le_stq_mmu_x86_64, u64, 8)
