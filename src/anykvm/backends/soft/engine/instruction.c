/* The instruction at RIP: its bytes, looked at without a fault or another effect, and whether KVM's emulator has it. */
#include "engine_internal.h"

struct prefixes {
    bool opsize, repeat, rex_w; /* 66; F2 or F3; REX.W */
};

/* twobyte_table of arch/x86/kvm/emulate.c, for operands in memory: the opcode behind 0F and what follows it. Its FXSAVE
 * and FXRSTOR take memory only, not device memory. */
static bool kvm_emulates_0f(u8 op, u8 next, const struct prefixes *p)
{
    u32 group = (next >> 3) & 7;
    switch (op) {
    case 0x00: /* not VERR, VERW */
        return group < 4;
    case 0x01: case 0x05: case 0x06: case 0x08: case 0x09: case 0x0d: case 0x6f: case 0x7f:
    case 0x18 ... 0x1f: case 0x20 ... 0x23: case 0x30 ... 0x35: case 0x40 ... 0x4f: case 0x80 ... 0x9f:
    case 0xa0 ... 0xa5: case 0xa8 ... 0xad: case 0xaf: case 0xb0 ... 0xb7: case 0xbb ... 0xbf: case 0xc0: case 0xc1:
    case 0xc3: case 0xc8 ... 0xcf:
        return true;
    case 0x10: case 0x11: case 0x28: case 0x29: case 0x2b:
        return !p->repeat;
    case 0x38: /* MOVBE, MOVNTDQA */
        return next == 0x2a ? p->opsize : (next & 0xfe) == 0xf0 && !p->repeat;
    case 0xae: /* CLFLUSH, CLFLUSHOPT */
        return group == 7 && !p->repeat;
    case 0xba:
        return group >= 4;
    case 0xc7: /* CMPXCHG8B, not CMPXCHG16B */
        return group == 1 && !p->rex_w;
    case 0xe7:
        return p->opsize && !p->repeat;
    default:
        return false;
    }
}

static u32 skip_prefixes(const struct ak_vcpu *v, const u8 *code, u32 size, struct prefixes *p)
{
    u32 n = 0;
    for (; n < size; n++) {
        u8 b = code[n];
        if (b == 0x66)
            p->opsize = true;
        else if (b == 0xf2 || b == 0xf3)
            p->repeat = true;
        else if ((v->env->hflags & HF_CS64_MASK) && (b & 0xf0) == 0x40)
            p->rex_w = b & 8;
        else if (!(b == 0x26 || b == 0x2e || b == 0x36 || b == 0x3e || b == 0x64 || b == 0x65 || b == 0x67 || b == 0xf0))
            break;
    }
    return n;
}

/* Whether KVM's emulator has this instruction, as an access to device memory: its tables lack x87 and SSE arithmetic.
 * Source: opcode_table of arch/x86/kvm/emulate.c. */
static bool emulates(const struct ak_vcpu *v, const u8 *code, u32 size)
{
    bool mode64 = v->env->hflags & HF_CS64_MASK;
    struct prefixes p = {0};
    u32 n = skip_prefixes(v, code, size, &p);
    if (n == size)
        return true; /* not enough seen to say no */
    u8 op = code[n], second = n + 1 < size ? code[n + 1] : 0, group = (second >> 3) & 7;
    if (op >= 0xcc && op <= 0xcf) /* emulate_int(), em_iret(): real mode only */
        return !(v->env->cr[0] & CR0_PE);
    if (op == 0x62 && (mode64 || second < 0xc0)) /* BOUND */
        return false;
    if (n + 2 > size)
        return true;
    if (op >= 0xd8 && op <= 0xdf) /* FNSTCW and FNSTSW are there */
        return (op == 0xd9 || op == 0xdd) && group == 7;
    return op != 0x0f || n + 3 > size || kvm_emulates_0f(second, code[n + 2], &p);
}

/* Bytes of the page at a linear address, without side effects and without a fault. Returns how many, at most `most`. */
static u32 peek(struct ak_vcpu *v, u64 va, u8 *bytes, u32 most)
{
    u64 gpa;
    u32 room = (u32)(AK_PAGE_SIZE - (va & ~AK_PAGE_MASK)), writable, user;
    room = room < most ? room : most;
    u64 hva = ak_translate(v, va, &gpa, &writable, &user) ? 0 : ak_gfn_to_hva(v, gpa >> 12);
    if (!hva || ak_copy_in(bytes, hva | (gpa & ~AK_PAGE_MASK), room))
        return 0;
    return room;
}

/* RIP as an address. */
u64 ak_linear_rip(const struct ak_vcpu *v)
{
    u64 va = v->env->segs[R_CS].base + v->env->eip;
    return v->env->hflags & HF_CS64_MASK ? va : (u32)va;
}

/* The instruction at RIP as KVM's emulator fetches it: 15 bytes, or to the end of the page. Returns how many. */
u32 ak_instruction_bytes(struct ak_vcpu *v, u8 bytes[15])
{
    return peek(v, ak_linear_rip(v), bytes, 15);
}

/* The same over the end of the page: 15 bytes, or as many as can be read. What cannot be read is no instruction. */
u32 ak_peek_instruction(struct ak_vcpu *v, u8 bytes[15])
{
    u32 n = peek(v, ak_linear_rip(v), bytes, 15);
    return n && n < 15 ? n + peek(v, ak_linear_rip(v) + n, bytes + n, 15 - n) : n;
}

/* Whether KVM's emulator has the instruction at RIP. */
bool ak_kvm_emulates(struct ak_vcpu *v)
{
    u8 bytes[15];
    return emulates(v, bytes, ak_instruction_bytes(v, bytes));
}

/* emulator_can_use_gpa(): the instruction at RIP has one operand in memory, so that a fault's address can be its. */
bool ak_one_memory_operand(struct ak_vcpu *v)
{
    u8 code[15] = {0};
    struct prefixes p = {0};
    u32 size = ak_instruction_bytes(v, code), n = skip_prefixes(v, code, size, &p);
    u8 op = n < size ? code[n] : 0, group = n + 1 < size ? code[n + 1] >> 3 & 7 : 0;
    bool string = (op >= 0x6c && op <= 0x6f) || (op >= 0xa4 && op <= 0xa7) || (op >= 0xaa && op <= 0xaf);
    if (string && p.repeat)
        return false;
    return !((op >= 0xa4 && op <= 0xa7) || op == 0x8f || (op == 0xff && group == 6)); /* MOVS, CMPS, POP, PUSH */
}

/* VMCALL (0F 01 C1) and VMMCALL (0F 01 D9) raise #UD in the engine; to KVM they are hypercalls. */
bool ak_is_hypercall(struct ak_vcpu *v)
{
    u8 code[15];
    return ak_peek_instruction(v, code) >= 3 && code[0] == 0x0f && code[1] == 0x01 && (code[2] == 0xc1 || code[2] == 0xd9);
}

/* The length of ICEBP (F1) at RIP, with its prefixes; 0: another instruction. */
u32 ak_icebp_length(struct ak_vcpu *v)
{
    u8 code[15];
    u32 size = ak_peek_instruction(v, code);
    bool mode64 = v->env->hflags & HF_CS64_MASK;
    for (u32 n = 0; n < size; n++)
        switch (code[n]) {
        case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67: case 0xf2: case 0xf3: break;
        case 0xf1: return n + 1;
        default:
            if (!mode64 || (code[n] & 0xf0) != 0x40)
                return 0;
        }
    return 0;
}

bool ak_is_iret(struct ak_vcpu *v)
{
    u8 code[15];
    u32 size = ak_peek_instruction(v, code), n = 0;
    while (n < size && (code[n] == 0x66 || ((v->env->hflags & HF_CS64_MASK) && (code[n] & 0xf0) == 0x40)))
        n++;
    return n < size && code[n] == 0xcf;
}

bool ak_is_sysenter(struct ak_vcpu *v)
{
    u8 code[15];
    return ak_peek_instruction(v, code) >= 2 && code[0] == 0x0f && code[1] == 0x34;
}
