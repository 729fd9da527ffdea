/* Port I/O. IN and OUT leave with RIP at the instruction; the next KVM_RUN completes them (complete_fast_pio_in/out):
 * merge the value, skip the instruction, unless the caller moved RIP. OUT to port 0x7e is past itself at its exit
 * already. The string forms are in string_io.c. */
#include "engine_internal.h"
#include <string.h>

#define PIO_PAGE 4096 /* KVM_PIO_PAGE_OFFSET in bytes */
#define QUIRK_PORT 0x7e

#define MMU_KNOSMAP_IDX 2

extern u32 cpu_lduw_mmuidx_ra_x86_64(struct CPUX86State *, u64 va, int mmu_idx, uintptr_t retaddr);

/* The data of the exit, shared with user space. */
u8 *ak_pio_data(struct ak_vcpu *v)
{
    return (u8 *)v->run + PIO_PAGE;
}

static bool is_prefix(u8 b, bool mode64)
{
    switch (b) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67: case 0xf0: case 0xf2: case 0xf3:
        return true;
    default:
        return mode64 && (b & 0xf0) == 0x40;
    }
}

/* Length of the IN or OUT at RIP. */
static u32 pio_length(struct ak_vcpu *v, u64 rip)
{
    bool mode64 = v->env->hflags & HF_CS64_MASK;
    for (u32 n = 0; n < 15; n++) {
        u8 b = (u8)cpu_ldub_code_x86_64(v->env, rip + n);
        if (!is_prefix(b, mode64))
            return n + (b < 0xe8 ? 2 : 1); /* E4-E7 carry the port; EC-EF take it from DX */
    }
    return 1;
}

/* The I/O permission check, which the stock engine leaves out: CPL <= IOPL, or the TSS's bitmap. Else #GP(0). */
void ak_check_io(struct ak_vcpu *v, u32 port, u32 size, uintptr_t retaddr)
{
    const struct CPUX86State *env = v->env;
    u32 cpl = env->hflags & HF_CPL_MASK, iopl = (u32)(env->eflags >> 12) & 3, type = env->tr.flags >> 8 & 15;
    if (!(env->cr[0] & CR0_PE) || (cpl <= iopl && !(env->eflags & RFLAGS_VM)))
        return;
    if ((env->tr.flags & DESC_P) && (type == 9 || type == 11) && env->tr.limit >= 103) {
        u32 at = cpu_lduw_mmuidx_ra_x86_64(v->env, env->tr.base + 0x66, MMU_KNOSMAP_IDX, retaddr) + port / 8;
        if (at + 1 <= env->tr.limit) {
            u32 bits = cpu_lduw_mmuidx_ra_x86_64(v->env, env->tr.base + at, MMU_KNOSMAP_IDX, retaddr) >> (port & 7);
            if (!(bits & ((1u << size) - 1)))
                return;
        }
    }
    ak_raise(v, EXCP_GP, 0, retaddr);
}

/* kvm_skip_emulated_instruction() */
static void skip_pio(struct ak_vcpu *v)
{
    v->env->eip += v->pio_len;
    if (!(v->env->hflags & HF_CS64_MASK))
        v->env->eip = (u32)v->env->eip;
    v->env->hflags &= ~HF_INHIBIT_IRQ_MASK;
    v->env->eflags &= ~(u64)RFLAGS_RF;
}

static void __attribute__((noreturn)) pio_exit(struct ak_vcpu *v, u32 port, u32 data, u32 size, bool in, uintptr_t ra)
{
    ak_check_io(v, port, size, ra);
    cpu_restore_state_x86_64(v->cpu, ra, true);
    v->env->eflags &= ~(u64)RFLAGS_RF; /* of an instruction before, in this block */
    v->pio_rip = ak_linear_rip(v);
    v->pio_len = pio_length(v, v->pio_rip);
    v->pio_size = size;
    v->pio_in = in;
    v->exit.port = port;
    v->exit.size = size;
    v->exit.count = 1;
    v->exit.is_write = !in;
    if (in)
        memset(ak_pio_data(v), 0, size); /* an answer that is not given is 0 */
    else
        memcpy(ak_pio_data(v), &data, size);
    if (port == QUIRK_PORT && !in)
        skip_pio(v); /* KVM_X86_QUIRK_OUT_7E_INC_RIP: RIP is past it at the exit */
    else
        v->completion = AK_COMPLETE_PIO;
    ak_leave(v, AK_EXIT_IO, 0);
}

#define NOTE_FRAME() ak_note_helper_frame(ak_current, (uintptr_t)__builtin_frame_address(0) + sizeof(void *))
#define OUT(name, type) \
    void name(struct CPUX86State *env, u32 port, u32 data) \
    { (void)env; NOTE_FRAME(); pio_exit(ak_current, port & 0xffff, (type)data, sizeof(type), false, GETPC()); }
#define IN(name, type) \
    u64 name(struct CPUX86State *env, u32 port) \
    { (void)env; pio_exit(ak_current, port & 0xffff, 0, sizeof(type), true, GETPC()); }
OUT(helper_outb_x86_64, u8)
OUT(helper_outw_x86_64, u16)
OUT(helper_outl_x86_64, u32)
IN(helper_inb_x86_64, u8)
IN(helper_inw_x86_64, u16)
IN(helper_inl_x86_64, u32)

/* complete_fast_pio_in/out() */
void ak_complete_pio(struct ak_vcpu *v)
{
    u32 data = 0;
    if (ak_linear_rip(v) != v->pio_rip)
        return; /* the caller moved RIP: the result is dropped */
    if (v->pio_in) {
        memcpy(&data, ak_pio_data(v), v->pio_size);
        u64 mask = v->pio_size == 4 ? ~0ull : (1ull << (8 * v->pio_size)) - 1;
        v->env->regs[R_EAX] = (v->env->regs[R_EAX] & ~mask) | data;
    }
    skip_pio(v);
}
