/* MSRs: one table of rules for RDMSR, WRMSR, KVM_GET_MSRS and KVM_SET_MSRS. An MSR that is not here raises #GP in the
 * guest and ends KVM_SET_MSRS early, as KVM without ignore_msrs does (kvm_get_msr_common, kvm_set_msr_common). */
#include "engine_internal.h"

#define MSR_TSC 0x10
#define MSR_APIC_BASE 0x1b
#define MSR_TSC_ADJUST 0x3b
#define MSR_BIOS_SIGN_ID 0x8b
#define MSR_PLATFORM_INFO 0xce
#define MSR_MTRRCAP 0xfe
#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_MCG_CAP 0x179
#define MSR_MCG_STATUS 0x17a
#define MSR_MISC_ENABLE 0x1a0
#define MSR_MTRR_PHYS 0x200
#define MSR_PAT 0x277
#define MSR_MTRR_DEF 0x2ff
#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_FMASK 0xc0000084
#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101
#define MSR_KERNEL_GS_BASE 0xc0000102
#define MSR_TSC_AUX 0xc0000103
#define MSR_K7_HWCR 0xc0010015
#define HWCR_TLB_CACHE_DIS (1u << 3)
#define HWCR_FFDIS (1u << 6)
#define HWCR_IGNNE_EM (1u << 8)
#define HWCR_MC_STATUS_WR_EN (1u << 18)
#define HWCR_TSC_FREQ_SEL (1u << 24)

static bool canonical(u64 a)
{
    return (u64)((int64_t)(a << 16) >> 16) == a;
}

/* The MSRs that are nothing but storage: where, which bits may be set, whether it holds an address. */
struct plain {
    u32 index;
    u64 *(*at)(struct ak_vcpu *);
    u64 reserved;
    bool address;
};
#define AT(name, expr) static u64 *at_##name(struct ak_vcpu *v) { return &(expr); }
AT(star, v->env->star)
AT(lstar, v->env->lstar)
AT(cstar, v->env->cstar)
AT(fmask, v->env->fmask)
AT(fs, v->env->segs[R_FS].base)
AT(gs, v->env->segs[R_GS].base)
AT(kernelgs, v->env->kernelgsbase)
AT(misc_enable, v->msr.misc_enable)
AT(mcg_status, v->msr.mcg_status)

static const struct plain plains[] = {
    {MSR_STAR, at_star, 0, false},
    {MSR_LSTAR, at_lstar, 0, true},
    {MSR_CSTAR, at_cstar, 0, true},
    {MSR_FMASK, at_fmask, 0, false},
    {MSR_FS_BASE, at_fs, 0, true},
    {MSR_GS_BASE, at_gs, 0, true},
    {MSR_KERNEL_GS_BASE, at_kernelgs, 0, true},
    {MSR_MISC_ENABLE, at_misc_enable, 0, false},
    {MSR_MCG_STATUS, at_mcg_status, 0, false},
};

static const struct plain *find_plain(u32 index)
{
    for (unsigned i = 0; i < sizeof plains / sizeof *plains; i++)
        if (plains[i].index == index)
            return &plains[i];
    return NULL;
}

/* The eleven fixed-range MTRRs, in order. */
static int fixed_mtrr(u32 index)
{
    if (index == 0x250)
        return 0;
    if (index == 0x258 || index == 0x259)
        return (int)index - 0x258 + 1;
    return index >= 0x268 && index <= 0x26f ? (int)index - 0x268 + 3 : -1;
}

/* Read an MSR; host: by ioctl. 0, or -1: no such MSR. */
int ak_msr_get(struct ak_vcpu *v, u32 index, u64 *value, bool host)
{
    const struct plain *p = find_plain(index);
    (void)host;
    if (p) {
        *value = *p->at(v);
        return 0;
    }
    if (index >= MSR_MTRR_PHYS && index < MSR_MTRR_PHYS + 16) {
        *value = (index & 1 ? v->msr.mtrr_mask : v->msr.mtrr_base)[(index - MSR_MTRR_PHYS) / 2];
        return 0;
    }
    if (fixed_mtrr(index) >= 0) {
        *value = v->msr.mtrr_fixed[fixed_mtrr(index)];
        return 0;
    }
    switch (index) {
    case MSR_TSC: *value = ak_tsc(v); return 0;
    case MSR_TSC_ADJUST: *value = v->msr.tsc_adjust; return 0;
    case MSR_APIC_BASE: *value = v->msr.apic_base; return 0;
    case MSR_BIOS_SIGN_ID: *value = v->msr.bios_sign_id; return 0;
    case MSR_PLATFORM_INFO: *value = v->msr.platform_info; return 0;
    case MSR_MTRRCAP: *value = 0x508; return 0; /* 8 variable ranges, fixed ranges, write-combining */
    case MSR_MCG_CAP: *value = 0; return 0;
    case MSR_SYSENTER_CS: *value = v->msr.sysenter_cs; return 0;
    case MSR_SYSENTER_ESP: *value = v->env->sysenter_esp; return 0;
    case MSR_SYSENTER_EIP: *value = v->env->sysenter_eip; return 0;
    case MSR_TSC_AUX: *value = v->env->tsc_aux; return 0;
    case MSR_K7_HWCR: *value = v->msr.hwcr; return 0;
    case MSR_MTRR_DEF: *value = v->msr.mtrr_def; return 0;
    case MSR_PAT: *value = v->env->pat; return 0;
    case MSR_EFER: *value = v->env->efer; return 0;
    default: return -1;
    }
}

static bool valid_pat(u64 value)
{
    for (int i = 0; i < 8; i++, value >>= 8)
        if ((value & 0xff) > 7 || (value & 0xff) == 2 || (value & 0xff) == 3)
            return false;
    return true;
}

static bool is_mtrr(u32 index)
{
    return index == MSR_MTRR_DEF || (index >= MSR_MTRR_PHYS && index < MSR_MTRR_PHYS + 16) || fixed_mtrr(index) >= 0;
}

/* mtrr.c:kvm_mtrr_valid(): memory types 0, 1, 4, 5, 6, and no reserved bits. */
static bool valid_mtrr(u32 index, u64 value)
{
    const u32 types = 0x73;
    u64 reserved = ~((1ull << AK_MAXPHYADDR) - 1);
    if (index == MSR_MTRR_DEF)
        return !(value & ~0xcffull) && (value & 0xff) < 8 && (types >> (value & 0xff) & 1);
    if (fixed_mtrr(index) >= 0) {
        for (int i = 0; i < 8; i++, value >>= 8)
            if ((value & 0xff) >= 8 || !(types >> (value & 0xff) & 1))
                return false;
        return true;
    }
    if (index & 1)
        return !(value & (reserved | 0x7ff));
    return (value & 0xff) < 8 && (types >> (value & 0xff) & 1) && !(value & (reserved | 0xf00));
}

/* SYSENTER's addresses: any value is taken, made canonical, and of it AMD's processors have 32 bits. */
static u64 sysenter_address(struct ak_vcpu *v, u64 value)
{
    return ak_is_amd(v) ? (u32)value : (u64)((int64_t)(value << 16) >> 16);
}

static int set_hwcr(struct ak_vcpu *v, u64 value)
{
    value &= ~(u64)(HWCR_TLB_CACHE_DIS | HWCR_FFDIS | HWCR_IGNNE_EM); /* ignored */
    if (value & ~(u64)(HWCR_MC_STATUS_WR_EN | HWCR_TSC_FREQ_SEL))
        return -1;
    v->msr.hwcr = value;
    return 0;
}

static int set_efer(struct ak_vcpu *v, u64 value, bool host)
{
    struct CPUX86State *env = v->env;
    u64 old = env->efer;
    if ((value & ~EFER_SUPPORTED) || (!host && (value & ak_efer_reserved(v))))
        return -1;
    if ((env->cr[0] & CR0_PG) && ((old ^ value) & EFER_LME) && !host)
        return -1;
    value = (value & ~(u64)EFER_LMA) | (old & EFER_LMA);
    env->efer = value;
    if ((old ^ value) & EFER_NXE)
        tlb_flush_x86_64(v->cpu);
    return 0;
}

/* Write an MSR. 0, or -1: no such MSR, or a value that raises #GP. */
int ak_msr_set(struct ak_vcpu *v, u32 index, u64 value, bool host)
{
    const struct plain *p = find_plain(index);
    if (p) {
        if ((value & p->reserved) || (p->address && !canonical(value)))
            return -1;
        *p->at(v) = value;
        return 0;
    }
    if (is_mtrr(index) && !valid_mtrr(index, value))
        return -1;
    if (index >= MSR_MTRR_PHYS && index < MSR_MTRR_PHYS + 16) {
        (index & 1 ? v->msr.mtrr_mask : v->msr.mtrr_base)[(index - MSR_MTRR_PHYS) / 2] = value;
        return 0;
    }
    if (fixed_mtrr(index) >= 0) {
        v->msr.mtrr_fixed[fixed_mtrr(index)] = value;
        return 0;
    }
    switch (index) {
    case MSR_TSC:
        v->msr.tsc_adjust += value - ak_tsc(v);
        v->msr.tsc_offset += (int64_t)(value - ak_tsc(v));
        return 0;
    case MSR_TSC_ADJUST:
        v->msr.tsc_offset += (int64_t)(value - v->msr.tsc_adjust);
        v->msr.tsc_adjust = value;
        return 0;
    case MSR_APIC_BASE:
        if (value >> AK_MAXPHYADDR || (value & 0x6ff))
            return -1;
        v->msr.apic_base = value;
        return 0;
    case MSR_BIOS_SIGN_ID:
        if (host)
            v->msr.bios_sign_id = value;
        return 0;
    case MSR_PLATFORM_INFO:
        if (!host)
            return -1;
        v->msr.platform_info = value;
        return 0;
    case MSR_SYSENTER_CS:
        v->msr.sysenter_cs = value;
        v->env->sysenter_cs = (u32)value;
        return 0;
    case MSR_SYSENTER_ESP: v->env->sysenter_esp = sysenter_address(v, value); return 0;
    case MSR_SYSENTER_EIP: v->env->sysenter_eip = sysenter_address(v, value); return 0;
    case MSR_TSC_AUX: /* AMD's processors ignore the upper half, Intel's do not */
        if (value >> 32 && !ak_is_amd(v))
            return -1;
        v->env->tsc_aux = (u32)value;
        return 0;
    case MSR_K7_HWCR: return set_hwcr(v, value);
    case MSR_MTRR_DEF: v->msr.mtrr_def = value; return 0;
    case MSR_PAT:
        if (!valid_pat(value))
            return -1;
        v->env->pat = value;
        return 0;
    case MSR_EFER: return set_efer(v, value, host);
    default: return -1;
    }
}

void helper_rdmsr_x86_64(struct CPUX86State *env)
{
    uintptr_t retaddr = GETPC();
    u64 value;
    if (ak_msr_get(ak_current, (u32)env->regs[R_ECX], &value, false))
        ak_raise(ak_current, EXCP_GP, 0, retaddr);
    env->regs[R_EAX] = (u32)value;
    env->regs[R_EDX] = value >> 32;
}

void helper_wrmsr_x86_64(struct CPUX86State *env)
{
    uintptr_t retaddr = GETPC();
    u64 value = (u32)env->regs[R_EAX] | (u64)(u32)env->regs[R_EDX] << 32;
    if (ak_msr_set(ak_current, (u32)env->regs[R_ECX], value, false))
        ak_raise(ak_current, EXCP_GP, 0, retaddr);
    ak_update_hflags(ak_current);
}
