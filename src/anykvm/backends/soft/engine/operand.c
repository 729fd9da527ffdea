/* Where a host instruction that sleeps in a page fault accesses memory. The ticker (ticker.c) knows where a thread
 * sleeps, not for which address: it may be guest memory that a userfaultfd's handler is to provide, which a signal ends,
 * or memory of the engine's own, from the middle of which nobody may jump away. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <ucontext.h>

struct decoder {
    const u8 *next;
    u32 x, b; /* REX.X, REX.B: 8 or 0 */
};

static bool one_byte_has_modrm(u8 op)
{
    if (op < 0x40)
        return (op & 7) < 4;
    return op == 0x63 || op == 0x69 || op == 0x6b || (op >= 0x80 && op <= 0x8f) || op == 0xc0 || op == 0xc1 || op == 0xc6 ||
           op == 0xc7 || (op >= 0xd0 && op <= 0xd3) || (op >= 0xd8 && op <= 0xdf) || op == 0xf6 || op == 0xf7 || op == 0xfe ||
           op == 0xff;
}

static bool two_bytes_have_modrm(u8 op)
{
    return !(op >= 0x04 && op <= 0x0b) && !(op >= 0x30 && op <= 0x37) && op != 0x77 && !(op >= 0x80 && op <= 0x8f) &&
           !(op >= 0xa0 && op <= 0xa2) && !(op >= 0xa8 && op <= 0xaa) && !(op >= 0xc8 && op <= 0xcf);
}

/* Prefixes and opcode; false: no ModRM byte follows, or the address is not what it seems (segments, EVEX). */
static bool skip_opcode(struct decoder *d)
{
    u8 b = *d->next++;
    while (b == 0x66 || b == 0xf2 || b == 0xf3 || b == 0xf0 || b == 0x2e || b == 0x3e || b == 0x26 || b == 0x36)
        b = *d->next++;
    if ((b & 0xf0) == 0x40) {
        d->x = b & 2 ? 8 : 0;
        d->b = b & 1 ? 8 : 0;
        b = *d->next++;
    }
    if (b == 0xc5) {
        d->next++;
        return *d->next++ != 0x77; /* VZEROUPPER */
    }
    if (b == 0xc4) {
        d->x = *d->next & 0x40 ? 0 : 8;
        d->b = *d->next & 0x20 ? 0 : 8;
        d->next += 3;
        return true;
    }
    if (b != 0x0f)
        return one_byte_has_modrm(b);
    b = *d->next++;
    if (b == 0x38 || b == 0x3a) {
        d->next++;
        return true;
    }
    return two_bytes_have_modrm(b);
}

static int32_t take(struct decoder *d, u32 size)
{
    int32_t value = size == 1 ? (int8_t)*d->next : *(const int32_t __attribute__((aligned(1))) *)d->next;
    d->next += size;
    return value;
}

/* The address of the memory operand of the instruction at pc; regs: in the order of their numbers. False: it has none
 * that could be guest memory's (a register, the stack, relative to RIP). */
bool ak_operand_address(const u8 *pc, const u64 regs[16], u64 *address)
{
    struct decoder d = {.next = pc};
    if (!skip_opcode(&d))
        return false;
    u8 modrm = *d.next++, mod = modrm >> 6, rm = modrm & 7;
    u64 at = 0;
    bool base = true;
    if (mod == 3 || (mod == 0 && rm == 5))
        return false;
    if (rm == 4) {
        u8 sib = *d.next++;
        u32 index = ((sib >> 3) & 7) | d.x;
        rm = sib & 7;
        if (index != 4)
            at = regs[index] << (sib >> 6);
        base = !(mod == 0 && rm == 5);
    }
    at += base ? regs[rm | d.b] : 0;
    if (mod || !base)
        at += (u64)(int64_t)take(&d, mod == 1 ? 1 : 4);
    *address = at;
    return true;
}

/* Whether the instruction that this thread stands at accesses guest memory. */
bool ak_at_guest_access(struct ak_vcpu *v, const ucontext_t *context)
{
    static const u8 order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    u64 regs[16], address;
    for (int i = 0; i < 16; i++)
        regs[i] = (u64)context->uc_mcontext.gregs[order[i]];
    return ak_operand_address((const u8 *)context->uc_mcontext.gregs[REG_RIP], regs, &address) &&
           ak_is_guest_memory(v->vm, address);
}
