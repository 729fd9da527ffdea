/* What is translated differently from the stock engine:
 *  - locked instructions are atomic between threads (CF_PARALLEL), except alone in emulation;
 *  - a stop is honoured only where a block begins (check_exit_request after each load and store would roll back an
 *    instruction whose store is done);
 *  - INS/OUTS, VEX instructions the engine would run as SSE, and LOCK before what cannot have it, which the engine would
 *    pass over, are shown to the decoder as an undefined opcode;
 *  - REX.R before an SSSE3 instruction on MMX registers is hidden: the engine would reach behind its eight registers;
 *  - a block ends before the engine has no room for more temporaries, which it does not check;
 *  - MMX and SSE operands of 4 or 8 bytes of which the engine reads 8 or 16;
 *  - 16-byte alignment of SSE operands (#GP) and, at CPL 3 with CR0.AM and EFLAGS.AC, natural alignment (#AC).
 * Which instructions these are is decode.c's. */
#include "decode.h"

#define MO_ALIGN (7 << 4)
#define MO_ALIGN_16 (4 << 4)
#define MO_32 2 /* zero-extended */
#define UNDEFINED_OPCODE 0xf1
#define REX_R 4u
#define TEMPS_OF_AN_INSTRUCTION 128 /* more than any needs */

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

/* A byte of the code that is being translated. */
u8 ak_code_byte(struct CPUX86State *env, u64 va)
{
    going_to_read(env, va);
    return (u8)__real_cpu_ldub_code_x86_64(env, va);
}

u32 __wrap_cpu_ldub_code_x86_64(struct CPUX86State *env, u64 va)
{
    struct ak_vcpu *v = ak_current;
    if (__builtin_expect(v->insn_len && va - v->insn_pc < v->insn_len, 0))
        return v->insn_bytes[va - v->insn_pc];
    return ak_code_byte(env, va);
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

/* Show the decoder this instruction's prefixes without REX.R. */
static void hide_rex_r(struct ak_vcpu *v, u64 pc, const struct ak_decoded *d)
{
    for (u32 i = 0; i < d->prefixes; i++) {
        u8 b = ak_code_byte(v->env, pc + i);
        v->insn_bytes[i] = (b & 0xf0) == 0x40 ? b & (u8)~REX_R : b;
    }
    v->insn_pc = pc;
    v->insn_len = d->prefixes;
}

static void translate_insn(struct DisasContextBase *db, struct CPUState *cpu)
{
    struct ak_vcpu *v = ak_current;
    const struct TCGContext *tcg = v->uc->tcg_ctx;
    v->translating = (u32)db->num_insns;
    struct ak_decoded d = ak_decode(v->env, db->pc_next);
    v->insn_len = 0;
    if (d.string_io || d.vex_undefined || ak_bad_lock(v->env, db->pc_next, &d)) {
        v->insn_pc = db->pc_next;
        v->insn_bytes[0] = UNDEFINED_OPCODE;
        v->insn_len = 1;
        v->insn_hidden = d.size - 1; /* by them it was told: the block is stale when they change */
    } else if ((d.rex & REX_R) && ak_names_mmx(&d))
        hide_rex_r(v, db->pc_next, &d);
    v->align_need = ak_needs_align16(&d) ? MO_ALIGN_16 : 0;
    if (!v->align_need && (db->tb->flags & HF_AC_MASK) && (db->tb->flags & HF_CPL_MASK) == 3 && (v->env->cr[0] & CR0_AM))
        v->align_need = MO_ALIGN;
    v->operand_bytes = ak_operand_bytes(&d);
    v->operand_loads = 0;
    stock_translate_insn(db, cpu);
    v->insn_len = 0;
    v->align_need = v->operand_bytes = 0;
    if (tcg->nb_temps > MAX_TEMPS - TEMPS_OF_AN_INSTRUCTION) /* many instructions leave one behind */
        db->max_insns = db->num_insns;
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

/* The rest of a translation. No translated code runs meanwhile, of which a trap could be (trap.c). */
extern int __real_tcg_gen_code_x86_64(struct TCGContext *, struct TranslationBlock *);
int __wrap_tcg_gen_code_x86_64(struct TCGContext *tcg, struct TranslationBlock *tb)
{
    struct ak_vcpu *v = ak_current;
    v->translating = 1;
    int size = __real_tcg_gen_code_x86_64(tcg, tb);
    v->translating = 0;
    return size;
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
    struct ak_decoded d = ak_decode(v->env, v->env->segs[R_CS].base + v->env->eip);
    ak_raise(v, ak_needs_align16(&d) ? EXCP_GP : EXCP_AC, 0, 0);
}
