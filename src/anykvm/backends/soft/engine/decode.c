/* What translation must know of an instruction before the engine's decoder sees it: prefixes and opcode, whether LOCK may
 * stand there, and what its memory operand is in size and alignment. */
#include "decode.h"

static bool vex_supported(u32 map, u32 opcode)
{
    if (map == 2)
        return opcode == 0xf2 || opcode == 0xf3 || (opcode >= 0xf5 && opcode <= 0xf7); /* BMI1, BMI2 */
    return map == 3 && opcode == 0xf0;                                                 /* RORX */
}

static void decode_vex(struct CPUX86State *env, u64 pc, u8 first, bool mode64, struct ak_decoded *d)
{
    u8 next = ak_code_byte(env, pc + 1);
    d->opcode = first;
    if (!mode64 && ((next & 0xc0) != 0xc0 || !(env->cr[0] & CR0_PE) || (env->eflags & RFLAGS_VM)))
        return; /* LES, LDS */
    if (first == 0xc5) {
        d->vex_undefined = true;
        d->size++;
        return;
    }
    d->vex_undefined = !vex_supported(next & 31, ak_code_byte(env, pc + 3));
    d->size += 3;
}

/* Prefixes and opcode, never reading a byte the decoder would not. */
struct ak_decoded ak_decode(struct CPUX86State *env, u64 pc)
{
    struct ak_decoded d = {0};
    bool mode64 = env->hflags & HF_CS64_MASK;
    for (u32 n = 0; n < 14; n++) {
        u8 b = ak_code_byte(env, pc + n);
        d.size = n + 1;
        d.prefixes = n;
        switch (b) {
        case 0x66: d.opsize = true; continue;
        case 0xf2: d.f2 = true; continue;
        case 0xf3: d.f3 = true; continue;
        case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x67: continue;
        case 0xf0: d.lock = true; continue;
        case 0x6c: case 0x6d: case 0x6e: case 0x6f: d.string_io = true; return d;
        case 0xc4: case 0xc5: decode_vex(env, pc + n, b, mode64, &d); return d;
        case 0x0f: break;
        default:
            if (mode64 && (b & 0xf0) == 0x40) {
                d.rex |= b;
                continue;
            }
            d.opcode = b;
            return d;
        }
        d.map = 1;
        d.size++;
        d.opcode = ak_code_byte(env, pc + n + 1);
        if (d.opcode == 0x38 || d.opcode == 0x3a) {
            d.map = d.opcode == 0x38 ? 2 : 3;
            d.opcode = ak_code_byte(env, pc + n + 2);
            d.size++;
        }
        return d;
    }
    return d;
}

enum { NO_LOCK = 0, LOCK = 1, LOCK_GROUP = 2 };

/* APM vol. 3, 1.2.5: what LOCK may stand before. LOCK_GROUP: it depends on the ModRM byte. */
static int may_lock(const struct ak_decoded *d)
{
    u32 op = d->opcode;
    if (d->map == 0 && op < 0x38) /* ADD, OR, ADC, SBB, AND, SUB, XOR to memory */
        return (op & 7) < 2 ? LOCK : NO_LOCK;
    if (d->map == 0)
        return op == 0x86 || op == 0x87                                  ? LOCK
               : (op & ~3u) == 0x80 || (op & ~1u) == 0xf6 || op >= 0xfe ? LOCK_GROUP
                                                                         : NO_LOCK;
    if (d->map != 1)
        return NO_LOCK;
    switch (op) {
    case 0xab: case 0xb0: case 0xb1: case 0xb3: case 0xbb: case 0xc0: case 0xc1: return LOCK;
    case 0x20: case 0x22: case 0xba: case 0xc7: return LOCK_GROUP;
    }
    return NO_LOCK;
}

static bool may_lock_group(const struct ak_decoded *d, u32 reg)
{
    switch (d->opcode) {
    case 0x80: case 0x81: case 0x82: case 0x83: return reg != 7; /* CMP */
    case 0xf6: case 0xf7: return reg == 2 || reg == 3;           /* NOT, NEG */
    case 0xfe: case 0xff: return reg < 2;                        /* INC, DEC */
    case 0xba: return reg >= 5;                                  /* BTS, BTR, BTC */
    case 0xc7: return reg == 1;                                  /* CMPXCHG8B, CMPXCHG16B */
    default: return reg == 0;                                    /* MOV CR0, which is then CR8 */
    }
}

/* Whether LOCK stands before something it may not: #UD. */
bool ak_bad_lock(struct CPUX86State *env, u64 pc, struct ak_decoded *d)
{
    if (!d->lock)
        return false;
    int may = may_lock(d);
    if (may == NO_LOCK)
        return true;
    u8 modrm = ak_code_byte(env, pc + d->size++);
    bool control = d->map == 1 && (d->opcode & ~2u) == 0x20;
    return (modrm >= 0xc0 && !control) || (may == LOCK_GROUP && !may_lock_group(d, modrm >> 3 & 7));
}

/* Legacy SSE instructions with a 16-byte memory operand that must be aligned (SDM vol. 2, exception types 2 and 4). */
bool ak_needs_align16(const struct ak_decoded *d)
{
    u32 op = d->opcode;
    if (d->map == 2) /* SSSE3, SSE4: 66-prefixed forms, less the PMOVSX/PMOVZX loads of part of a register */
        return d->opsize && (op <= 0x1e || op == 0x28 || op == 0x29 || op == 0x2a || op == 0x2b || (op >= 0x37 && op <= 0x41) ||
                             (op >= 0xdb && op <= 0xdf));
    if (d->map == 3)
        return d->opsize && ((op >= 0x08 && op <= 0x0f && op != 0x0a && op != 0x0b) || (op >= 0x40 && op <= 0x44) || op == 0xdf);
    if (d->map != 1 || d->f2)
        return false;
    if (d->f3)
        return op == 0x12 || op == 0x16 || op == 0x5b || op == 0x70;
    switch (op) {
    case 0x14: case 0x15: case 0x28: case 0x29: case 0x2b: case 0xc2: case 0xc6: return true;
    case 0x5a: return d->opsize;            /* CVTPD2PS reads 16 bytes, CVTPS2PD 8 */
    case 0x70: case 0x6f: case 0x7f: case 0xe7: case 0xe6: case 0x7c: case 0x7d: case 0xd0: return d->opsize;
    case 0x6e: case 0x7e: case 0xd6: case 0xd7: case 0xc4: case 0xc5: case 0xf7: return false;
    }
    if (op >= 0x51 && op <= 0x5f)
        return true;
    return d->opsize && ((op >= 0x60 && op <= 0x6d) || (op >= 0x74 && op <= 0x76) || (op >= 0xd1 && op <= 0xfe));
}

/* Whether the ModRM byte's reg field names an MMX register in the maps of SSSE3. There are eight, so REX.R means nothing. */
bool ak_names_mmx(const struct ak_decoded *d)
{
    return !d->opsize && !d->f2 && !d->f3 && ((d->map == 2 && d->opcode < 0x20) || (d->map == 3 && d->opcode == 0x0f));
}

/* The size of a memory operand of which the engine reads more than there is; 0: it does not. */
u32 ak_operand_bytes(const struct ak_decoded *d)
{
    if (d->map == 3 && d->opsize)
        return d->opcode == 0x0a ? 4 : d->opcode == 0x0b ? 8 : 0; /* ROUNDSS, ROUNDSD */
    if (d->map != 1 || d->f2)
        return 0;
    if (d->f3)
        return d->opcode == 0xe6 ? 8 : 0; /* CVTDQ2PD */
    switch (d->opsize ? 0 : d->opcode) {
    case 0x60: case 0x61: case 0x62: return 4;            /* PUNPCKLBW, PUNPCKLWD, PUNPCKLDQ of MMX */
    case 0x2c: case 0x2d: case 0x5a: return 8;            /* CVTTPS2PI, CVTPS2PI, CVTPS2PD */
    }
    return 0;
}
