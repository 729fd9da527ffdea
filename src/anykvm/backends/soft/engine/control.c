/* Control registers, EFER, XCR0, SYSCALL and SYSENTER: the checks and semantics the engine leaves out. Sources: AMD APM
 * vol. 2 (system registers), KVM's kvm_set_cr0/cr4/cr8, set_efer, __kvm_set_xcr. */
#include "engine_internal.h"

#define CR0_DEFINED 0xe005003full
#define CR4_ALWAYS 0x7ffull /* VME..OSXMMEXCPT */
#define MSR_EFER_SVME (1u << 12)

extern void helper_monitor_x86_64(struct CPUX86State *, u64);

/* 0, or -1 for a value that raises #GP. */
int ak_check_cr0(u64 cr0)
{
    if (cr0 >> 32)
        return -1;
    if ((cr0 & CR0_PG) && !(cr0 & CR0_PE))
        return -1;
    return (cr0 & CR0_NW) && !(cr0 & CR0_CD) ? -1 : 0;
}

/* CR4 bits the guest must not set, by its CPUID. */
u64 ak_cr4_reserved(struct ak_vcpu *v)
{
    u64 allowed = CR4_ALWAYS;
    if (ak_cpuid_has(v, 1, R_ECX, 26))
        allowed |= CR4_OSXSAVE;
    if (ak_cpuid_has(v, 7, R_EBX, 0))
        allowed |= CR4_FSGSBASE;
    if (ak_cpuid_has(v, 7, R_EBX, 7))
        allowed |= CR4_SMEP;
    if (ak_cpuid_has(v, 7, R_EBX, 20))
        allowed |= CR4_SMAP;
    return ~allowed;
}

u64 ak_efer_reserved(struct ak_vcpu *v)
{
    u64 allowed = 0;
    if (ak_cpuid_has(v, 0x80000001, R_EDX, 11))
        allowed |= EFER_SCE;
    if (ak_cpuid_has(v, 0x80000001, R_EDX, 29))
        allowed |= EFER_LME | EFER_LMA;
    if (ak_cpuid_has(v, 0x80000001, R_EDX, 20))
        allowed |= EFER_NXE;
    return ~allowed;
}

static int write_cr0(struct ak_vcpu *v, u64 value)
{
    struct CPUX86State *env = v->env;
    if (ak_check_cr0(value))
        return -1;
    value &= CR0_DEFINED;
    bool paging_on = (value & CR0_PG) && !(env->cr[0] & CR0_PG);
    if (paging_on && (env->efer & EFER_LME)) {
        if (!(env->cr[4] & CR4_PAE) || (env->segs[R_CS].flags & DESC_L))
            return -1;
    }
    if (!(value & CR0_PG) && (env->cr[0] & CR0_PG) && (env->hflags & HF_CS64_MASK))
        return -1;
    if ((value ^ env->cr[0]) & CR0_AM)
        tb_flush_x86_64(v->cpu); /* alignment checks are part of the translation */
    cpu_x86_update_cr0_x86_64(env, (u32)value);
    return 0;
}

static int write_cr4(struct ak_vcpu *v, u64 value)
{
    struct CPUX86State *env = v->env;
    if (value & ak_cr4_reserved(v))
        return -1;
    if ((env->efer & EFER_LMA) && !(value & CR4_PAE))
        return -1;
    cpu_x86_update_cr4_x86_64(env, (u32)value);
    return 0;
}

/* MOV to CR8. User space, which has the APIC, is told of a priority that is lower than before: an interrupt may wait. */
static void write_cr8(struct ak_vcpu *v, u64 value, uintptr_t retaddr)
{
    u64 before = v->cr8;
    u8 code[15];
    v->cr8 = value;
    if (before <= value)
        return;
    cpu_restore_state_x86_64(v->cpu, retaddr, true);
    u32 size = ak_peek_instruction(v, code), n = 0;
    while (n < size && code[n] != 0x0f)
        n++;
    v->env->eip += n + 3; /* prefixes, 0F 22, and a register */
    v->env->hflags &= ~HF_INHIBIT_IRQ_MASK;
    ak_leave(v, AK_EXIT_SET_TPR, 0);
}

void helper_write_crN_x86_64(struct CPUX86State *env, int reg, u64 value)
{
    struct ak_vcpu *v = ak_current;
    uintptr_t retaddr = GETPC();
    int bad = 0;
    switch (reg) {
    case 0:
        bad = write_cr0(v, value);
        break;
    case 2:
        env->cr[2] = value;
        break;
    case 3:
        bad = (env->efer & EFER_LMA) && ((value & ~ak_current->vm->private_gpa_mask) >> AK_MAXPHYADDR) ? -1 : 0;
        if (!bad)
            cpu_x86_update_cr3_x86_64(env, value);
        break;
    case 4:
        bad = write_cr4(v, value);
        break;
    case 8:
        bad = value & ~0xfull ? -1 : 0;
        if (!bad)
            write_cr8(v, value, retaddr);
        break;
    default:
        bad = -1;
    }
    if (bad)
        ak_raise(v, EXCP_GP, 0, retaddr);
}

u64 helper_read_crN_x86_64(struct CPUX86State *env, int reg)
{
    return reg == 8 ? ak_current->cr8 : env->cr[reg];
}

void helper_xsetbv_x86_64(struct CPUX86State *env, u32 index, u64 value)
{
    struct ak_vcpu *v = ak_current;
    uintptr_t retaddr = GETPC();
    if (!(env->cr[4] & CR4_OSXSAVE))
        ak_raise(v, EXCP_UD, 0, retaddr);
    if (index || (env->hflags & HF_CPL_MASK) || !(value & 1) || (value & ~3ull))
        ak_raise(v, EXCP_GP, 0, retaddr);
    env->xcr0 = value;
}

/* -- SYSCALL, SYSENTER: the engine only calls hooks and goes on behind the instruction ------------------------------ */

static void load_segment(struct CPUX86State *env, int seg, u32 selector, u32 flags)
{
    env->segs[seg] = (struct SegmentCache){.selector = selector & 0xfffc, .base = 0, .limit = 0xffffffff, .flags = flags};
    if (seg != R_SS)
        return;
}

#define FLAT_DATA (DESC_G | DESC_B | DESC_P | DESC_S | DESC_RW | DESC_A)
#define FLAT_CODE (DESC_G | DESC_P | DESC_S | DESC_CS | DESC_RW | DESC_A)

void helper_syscall_x86_64(struct CPUX86State *env, int next_eip_addend)
{
    struct ak_vcpu *v = ak_current;
    uintptr_t retaddr = GETPC();
    u32 selector = (u32)(env->star >> 32) & 0xffff;
    if (!(env->efer & EFER_SCE))
        ak_raise(v, EXCP_UD, 0, retaddr);
    if (env->efer & EFER_LMA) {
        bool mode64 = env->hflags & HF_CS64_MASK;
        u64 rflags = (env->eflags & ~(u64)(CC_ALL | RFLAGS_DF)) | cpu_cc_compute_all_x86_64(env, (int)env->cc_op) |
                     ((u64)env->df & RFLAGS_DF) | 2;
        env->regs[R_ECX] = env->eip + (u64)next_eip_addend;
        env->regs[11] = rflags & ~(u64)RFLAGS_RF;
        rflags &= ~(env->fmask | RFLAGS_RF);
        load_segment(env, R_CS, selector, FLAT_CODE | DESC_L);
        load_segment(env, R_SS, selector + 8, FLAT_DATA);
        env->cc_src = rflags & CC_ALL;
        env->cc_op = CC_OP_EFLAGS;
        env->df = rflags & RFLAGS_DF ? -1 : 1;
        env->eflags = (rflags & ~(u64)(CC_ALL | RFLAGS_DF)) | 2;
        env->eip = mode64 ? env->lstar : env->cstar;
    } else {
        env->regs[R_ECX] = (u32)(env->eip + (u64)next_eip_addend);
        load_segment(env, R_CS, selector, FLAT_CODE | DESC_B);
        load_segment(env, R_SS, selector + 8, FLAT_DATA);
        env->eflags &= ~(u64)(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM);
        env->eip = (u32)env->star;
    }
    ak_update_hflags(v);
}

void helper_sysenter_x86_64(struct CPUX86State *env, int next_eip_addend)
{
    struct ak_vcpu *v = ak_current;
    uintptr_t retaddr = GETPC();
    (void)next_eip_addend;
    bool lma = env->efer & EFER_LMA;
    if (lma && ak_is_amd(v))
        ak_raise(v, EXCP_UD, 0, retaddr); /* not there in long mode */
    if (!(env->sysenter_cs & 0xfffc))
        ak_raise(v, EXCP_GP, 0, retaddr);
    env->eflags &= ~(u64)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
    load_segment(env, R_CS, env->sysenter_cs, FLAT_CODE | (lma ? DESC_L : DESC_B));
    load_segment(env, R_SS, (env->sysenter_cs & 0xfffc) + 8, FLAT_DATA);
    env->regs[R_ESP] = env->sysenter_esp;
    env->eip = env->sysenter_eip;
    ak_update_hflags(v);
}
