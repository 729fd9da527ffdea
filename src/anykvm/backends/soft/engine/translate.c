/* What is translated differently from the stock engine:
 *  - locked instructions are atomic between threads (CF_PARALLEL), except alone in emulation;
 *  - a stop is honoured only where a block begins (check_exit_request after each load and store would roll back an
 *    instruction whose store is done);
 *  - INS/OUTS, VEX instructions the engine would run as SSE, and LOCK before what cannot have it, which the engine would
 *    pass over, are shown to the decoder as an undefined opcode;
 *  - MMX and SSE operands of 4 or 8 bytes of which the engine reads 8 or 16;
 *  - 16-byte alignment of SSE operands (#GP) and, at CPL 3 with CR0.AM and EFLAGS.AC, natural alignment (#AC). */
#include "engine_internal.h"

#define MO_ALIGN (7 << 4)
#define MO_ALIGN_16 (4 << 4)
#define MO_32 2 /* zero-extended */
#define UNDEFINED_OPCODE 0xf1

struct TCGContext;
extern u32 __real_cpu_ldub_code_x86_64(struct CPUX86State *env, u64 va);
extern u32 __real_cpu_lduw_code_x86_64(struct CPUX86State *env, u64 va);
extern u32 __real_cpu_ldl_code_x86_64(struct CPUX86State *env, u64 va);
extern u64 __real_cpu_ldq_code_x86_64(struct CPUX86State *env, u64 va);
extern void __real_gen_intermediate_code_x86_64(struct CPUState *, struct TranslationBlock *, int max_insns);
extern void __real_translator_loop_x86_64(const struct TranslatorOps *, struct DisasContextBase *, struct CPUState *,
                                          struct TranslationBlock *, int);
extern void *__real_helper_lookup_tb_ptr_x86_64(struct CPUX86State *env);

static __thread void (*stock_translate_insn)(struct DisasContextBase *, struct CPUState *);

void check_exit_request_x86_64(struct TCGContext *tcg)
{
    (void)tcg;
}

static u64 host_page(struct CPUX86State *env, u64 va)
{
    return (get_page_addr_code_x86_64(env, va & AK_PAGE_MASK) & AK_PAGE_MASK) + AK_HOST_WINDOW_BASE;
}

/* An instruction that goes on in the next page: that page's copy, before it is read. */
static inline void going_to_read(struct CPUX86State *env, u64 last)
{
    struct ak_vcpu *v = ak_current;
    if (__builtin_expect(!v->translating || !((last ^ v->code_va) & AK_PAGE_MASK), 1))
        return;
    ak_code_read(v, host_page(env, last), true);
    v->code_va = last;
}

static u8 code_byte(struct CPUX86State *env, u64 va)
{
    going_to_read(env, va);
    return (u8)__real_cpu_ldub_code_x86_64(env, va);
}

u32 __wrap_cpu_ldub_code_x86_64(struct CPUX86State *env, u64 va)
{
    struct ak_vcpu *v = ak_current;
    if (__builtin_expect(v->insn_len && va - v->insn_pc < v->insn_len, 0))
        return v->insn_bytes[va - v->insn_pc];
    return code_byte(env, va);
}

u32 __wrap_cpu_lduw_code_x86_64(struct CPUX86State *env, u64 va)
{
    going_to_read(env, va + 1);
    return __real_cpu_lduw_code_x86_64(env, va);
}

u32 __wrap_cpu_ldl_code_x86_64(struct CPUX86State *env, u64 va)
{
    going_to_read(env, va + 3);
    return __real_cpu_ldl_code_x86_64(env, va);
}

u64 __wrap_cpu_ldq_code_x86_64(struct CPUX86State *env, u64 va)
{
    going_to_read(env, va + 7);
    return __real_cpu_ldq_code_x86_64(env, va);
}

/* -- which operands must be aligned ------------------------------------------------------------------------------- */

struct decoded {
    bool opsize, f2, f3, lock, vex_undefined, string_io;
    u32 map, opcode; /* map 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A */
    u32 size;        /* bytes looked at */
};

static bool vex_supported(u32 map, u32 opcode)
{
    if (map == 2)
        return opcode == 0xf2 || opcode == 0xf3 || (opcode >= 0xf5 && opcode <= 0xf7); /* BMI1, BMI2 */
    return map == 3 && opcode == 0xf0;                                                 /* RORX */
}

static void decode_vex(struct CPUX86State *env, u64 pc, u8 first, bool mode64, struct decoded *d)
{
    u8 next = code_byte(env, pc + 1);
    d->opcode = first;
    if (!mode64 && ((next & 0xc0) != 0xc0 || !(env->cr[0] & CR0_PE) || (env->eflags & RFLAGS_VM)))
        return; /* LES, LDS */
    if (first == 0xc5) {
        d->vex_undefined = true;
        d->size++;
        return;
    }
    d->vex_undefined = !vex_supported(next & 31, code_byte(env, pc + 3));
    d->size += 3;
}

/* Prefixes and opcode, never reading a byte the decoder would not. */
static struct decoded decode(struct CPUX86State *env, u64 pc)
{
    struct decoded d = {0};
    bool mode64 = env->hflags & HF_CS64_MASK;
    for (u32 n = 0; n < 14; n++) {
        u8 b = code_byte(env, pc + n);
        d.size = n + 1;
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
            if (mode64 && (b & 0xf0) == 0x40)
                continue;
            d.opcode = b;
            return d;
        }
        d.map = 1;
        d.size++;
        d.opcode = code_byte(env, pc + n + 1);
        if (d.opcode == 0x38 || d.opcode == 0x3a) {
            d.map = d.opcode == 0x38 ? 2 : 3;
            d.opcode = code_byte(env, pc + n + 2);
            d.size++;
        }
        return d;
    }
    return d;
}

/* -- LOCK ---------------------------------------------------------------------------------------------------------------- */

enum { NO_LOCK = 0, LOCK = 1, LOCK_GROUP = 2 };

/* APM vol. 3, 1.2.5: what LOCK may stand before. LOCK_GROUP: it depends on the ModRM byte. */
static int may_lock(const struct decoded *d)
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

static bool may_lock_group(const struct decoded *d, u32 reg)
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
static bool bad_lock(struct CPUX86State *env, u64 pc, struct decoded *d)
{
    int may = d->lock ? may_lock(d) : LOCK;
    if (!d->lock || may == NO_LOCK)
        return d->lock;
    u8 modrm = code_byte(env, pc + d->size++);
    bool control = d->map == 1 && (d->opcode & ~2u) == 0x20;
    return (modrm >= 0xc0 && !control) || (may == LOCK_GROUP && !may_lock_group(d, modrm >> 3 & 7));
}

/* Legacy SSE instructions with a 16-byte memory operand that must be aligned (SDM vol. 2, exception types 2 and 4). */
static bool needs_align16(const struct decoded *d)
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

/* The size of a memory operand of which the engine reads more than there is; 0: it does not. */
static u32 operand_bytes(const struct decoded *d)
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

static void translate_insn(struct DisasContextBase *db, struct CPUState *cpu)
{
    struct ak_vcpu *v = ak_current;
    v->translating = (u32)db->num_insns;
    struct decoded d = decode(v->env, db->pc_next);
    v->insn_len = 0;
    if (d.string_io || d.vex_undefined || bad_lock(v->env, db->pc_next, &d)) {
        v->insn_pc = db->pc_next;
        v->insn_bytes[0] = UNDEFINED_OPCODE;
        v->insn_len = 1;
        v->insn_hidden = d.size - 1; /* by them it was told: the block is stale when they change */
    }
    v->align_need = needs_align16(&d) ? MO_ALIGN_16 : 0;
    if (!v->align_need && (db->tb->flags & HF_AC_MASK) && (db->tb->flags & HF_CPL_MASK) == 3 && (v->env->cr[0] & CR0_AM))
        v->align_need = MO_ALIGN;
    v->operand_bytes = operand_bytes(&d);
    v->operand_loads = 0;
    stock_translate_insn(db, cpu);
    v->insn_len = 0;
    v->align_need = v->operand_bytes = 0;
}

void __wrap_translator_loop_x86_64(const struct TranslatorOps *ops, struct DisasContextBase *db, struct CPUState *cpu,
                                   struct TranslationBlock *tb, int max_insns)
{
    struct TranslatorOps ours = *ops;
    stock_translate_insn = ops->translate_insn;
    ours.translate_insn = translate_insn;
    __real_translator_loop_x86_64(&ours, db, cpu, tb, max_insns);
}

void __wrap_gen_intermediate_code_x86_64(struct CPUState *cpu, struct TranslationBlock *tb, int max_insns)
{
    struct ak_vcpu *v = ak_current;
    struct TCGContext *tcg = v->uc->tcg_ctx;
    u32 parallel = tb->cflags & CF_ALONE ? 0 : CF_PARALLEL;
    v->translating = 1;
    v->insn_hidden = 0;
    tb->cflags |= parallel;
    tcg->tb_cflags |= parallel;
    v->code_va = tb->pc;
    ak_code_read(v, host_page(v->env, tb->pc), false);
    __real_gen_intermediate_code_x86_64(cpu, tb, max_insns);
    tb->cflags &= ~parallel; /* look-ups compare with the flags asked for */
    tcg->tb_cflags &= ~parallel;
    v->translating = 0;
    tb->size = (u16)(tb->size + v->insn_hidden); /* such an instruction is a block's last */
    ak_code_span(v, host_page(v->env, tb->pc) + (tb->pc & ~AK_PAGE_MASK), tb->size);
    u64 end = tb->pc + tb->size;
    if (tb->size && ((end - 1) ^ tb->pc) & AK_PAGE_MASK)
        ak_code_span_rest(v, host_page(v->env, end - 1), (u32)(end & ~AK_PAGE_MASK));
}

/* Emulation and stepping end with their instruction: no jump from one block straight into the next. */
void *__wrap_helper_lookup_tb_ptr_x86_64(struct CPUX86State *env)
{
    struct ak_vcpu *v = ak_current;
    if (__builtin_expect(v->emulation != AK_NATIVE || v->single_step_sse, 0))
        return v->uc->tcg_ctx->code_gen_epilogue;
    return __real_helper_lookup_tb_ptr_x86_64(env);
}

/* How a load is to be done where the engine would read too much: the first one in the operand's size, and none for what is
 * behind it, which the instruction does not look at. False: not at all. */
static bool narrow(struct ak_vcpu *v, u32 *memop)
{
    if (!v->operand_bytes)
        return true;
    if (v->operand_bytes == 4)
        *memop = (*memop & ~7u) | MO_32;
    return !v->operand_loads++;
}

#define LDST(name, val)                                                                                                \
    extern void __real_##name(struct TCGContext *, val, void *, uintptr_t, u32);                                       \
    void __wrap_##name(struct TCGContext *tcg, val value, void *addr, uintptr_t idx, u32 memop)                        \
    {                                                                                                                  \
        if (!narrow(ak_current, &memop))                                                                               \
            return;                                                                                                    \
        __real_##name(tcg, value, addr, idx, memop | ak_current->align_need);                                          \
        if (ak_current->align_need == MO_ALIGN_16)                                                                     \
            ak_current->align_need = 0; /* the first half decides */                                                   \
    }
LDST(tcg_gen_qemu_ld_i32_x86_64, void *)
LDST(tcg_gen_qemu_st_i32_x86_64, void *)
LDST(tcg_gen_qemu_ld_i64_x86_64, void *)
LDST(tcg_gen_qemu_st_i64_x86_64, void *)

/* CPUClass.do_unaligned_access, for accesses marked above. */
void ak_unaligned_access(struct CPUState *cpu, u64 addr, int access, int mmu_idx, uintptr_t retaddr)
{
    struct ak_vcpu *v = ak_current;
    (void)addr;
    (void)access;
    (void)mmu_idx;
    cpu_restore_state_x86_64(cpu, retaddr, true);
    struct decoded d = decode(v->env, v->env->segs[R_CS].base + v->env->eip);
    ak_raise(v, needs_align16(&d) ? EXCP_GP : EXCP_AC, 0, 0);
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
