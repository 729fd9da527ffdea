/* kvm_regs, kvm_sregs, kvm_fpu to the engine's state and back, in place and only while the vCPU does not run. */
#include "engine_internal.h"
#include <errno.h>
#include <string.h>

/* KVM's register order is not the encoding's. */
u64 ak_get_rip(struct ak_vcpu *v)
{
    return v->env->eip;
}

u64 ak_get_rflags(struct ak_vcpu *v)
{
    return v->env->eflags | 2;
}

void ak_get_regs(struct ak_vcpu *v, struct kvm_regs *r)
{
    const u64 *g = v->env->regs;
    *r = (struct kvm_regs){
        .rax = g[R_EAX], .rbx = g[R_EBX], .rcx = g[R_ECX], .rdx = g[R_EDX], .rsi = g[R_ESI], .rdi = g[R_EDI],
        .rsp = g[R_ESP], .rbp = g[R_EBP], .r8 = g[8], .r9 = g[9], .r10 = g[10], .r11 = g[11], .r12 = g[12],
        .r13 = g[13], .r14 = g[14], .r15 = g[15], .rip = ak_get_rip(v), .rflags = ak_get_rflags(v)};
}

/* KVM_SET_REGS also drops a queued exception (__set_regs()). */
void ak_set_regs(struct ak_vcpu *v, const struct kvm_regs *r)
{
    ak_request_event(v);
    u64 *g = v->env->regs;
    g[R_EAX] = r->rax, g[R_EBX] = r->rbx, g[R_ECX] = r->rcx, g[R_EDX] = r->rdx;
    g[R_ESI] = r->rsi, g[R_EDI] = r->rdi, g[R_ESP] = r->rsp, g[R_EBP] = r->rbp;
    g[8] = r->r8, g[9] = r->r9, g[10] = r->r10, g[11] = r->r11;
    g[12] = r->r12, g[13] = r->r13, g[14] = r->r14, g[15] = r->r15;
    v->env->eip = r->rip;
    v->env->eflags = r->rflags | 2; /* as given, as KVM keeps it */
    v->event.pending = 0;
    ak_update_hflags(v);
}

void ak_set_rip(struct ak_vcpu *v, u64 rip)
{
    v->env->eip = rip;
}

/* The engine's digest of mode and segments. */
void ak_update_hflags(struct ak_vcpu *v)
{
    struct CPUX86State *env = v->env;
    u32 cs = env->segs[R_CS].flags, ss = env->segs[R_SS].flags;
    u32 keep = HF_INHIBIT_IRQ_MASK | (1u << 19) | (1u << 21) | (1u << 24) | (3u << 25);
    u32 h = env->hflags & keep;
    bool protected = env->cr[0] & CR0_PE;
    h |= protected ? (ss >> 13) & HF_CPL_MASK : 0;
    if (env->eflags & RFLAGS_VM)
        h = (h & ~HF_CPL_MASK) | 3;
    h |= protected ? HF_PE_MASK : 0;
    h |= (u32)(env->cr[0] << 8) & (7u << 9); /* MP EM TS */
    h |= env->cr[4] & CR4_OSFXSR ? HF_OSFXSR_MASK : 0;
    h |= env->cr[4] & CR4_SMAP ? HF_SMAP_MASK : 0;
    h |= env->efer & EFER_LMA ? HF_LMA_MASK : 0;
    if ((env->efer & EFER_LMA) && (cs & DESC_L)) {
        h |= HF_CS32_MASK | HF_SS32_MASK | HF_CS64_MASK;
    } else {
        h |= cs & DESC_B ? HF_CS32_MASK : 0;
        h |= ss & DESC_B ? HF_SS32_MASK : 0;
        if (!protected || (env->eflags & RFLAGS_VM) || !(h & HF_CS32_MASK) ||
            (env->segs[R_DS].base | env->segs[R_ES].base | env->segs[R_SS].base))
            h |= HF_ADDSEG_MASK;
    }
    env->hflags = h;
}

/* svm_get_segment(): G is what the limit needs. */
static void get_segment(const struct SegmentCache *c, struct kvm_segment *s)
{
    u32 f = c->flags;
    *s = (struct kvm_segment){
        .base = c->base, .limit = c->limit, .selector = (u16)c->selector, .type = (f >> 8) & 15, .s = f >> 12 & 1,
        .dpl = f >> 13 & 3, .present = f >> 15 & 1, .avl = f >> 20 & 1, .l = f >> 21 & 1, .db = f >> 22 & 1,
        .g = c->limit > 0xfffff, .unusable = !(f >> 15 & 1)};
}

static void set_segment(struct SegmentCache *c, const struct kvm_segment *s)
{
    u32 f = (u32)(s->type & 15) << 8 | (u32)(s->s & 1) << 12 | (u32)(s->dpl & 3) << 13 | (u32)(s->present & 1) << 15 |
            (u32)(s->avl & 1) << 20 | (u32)(s->l & 1) << 21 | (u32)(s->db & 1) << 22 | (u32)(s->g & 1) << 23;
    *c = (struct SegmentCache){.selector = s->selector, .base = s->base, .limit = s->limit, .flags = s->unusable ? f & ~DESC_P : f};
}

static const int order[6] = {R_CS, R_DS, R_ES, R_FS, R_GS, R_SS};

void ak_get_sregs(struct ak_vcpu *v, struct kvm_sregs *s)
{
    struct CPUX86State *env = v->env;
    struct kvm_segment *segments[6] = {&s->cs, &s->ds, &s->es, &s->fs, &s->gs, &s->ss};
    memset(s, 0, sizeof *s);
    for (int i = 0; i < 6; i++)
        get_segment(&env->segs[order[i]], segments[i]);
    for (int i = 1; i < 5; i++) /* DS, ES, FS, GS: loaded is accessed */
        segments[i]->type |= !segments[i]->unusable;
    if (s->ss.unusable)
        s->ss.db = 0;
    get_segment(&env->tr, &s->tr);
    s->tr.type |= s->tr.s ? 0 : 2; /* loaded is busy; the engine's cache says available */
    get_segment(&env->ldt, &s->ldt);
    s->gdt.base = env->gdt.base, s->gdt.limit = (u16)env->gdt.limit;
    s->idt.base = env->idt.base, s->idt.limit = (u16)env->idt.limit;
    s->cr0 = env->cr[0], s->cr2 = env->cr[2], s->cr3 = env->cr[3], s->cr4 = env->cr[4];
    s->cr8 = v->cr8, s->efer = env->efer, s->apic_base = v->msr.apic_base;
    if (v->event.irq_injected)
        s->interrupt_bitmap[v->event.irq_vector / 64] |= 1ull << (v->event.irq_vector % 64);
}

#define CR4_SUPPORTED (0x7ffull | CR4_FSGSBASE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP)

/* kvm_is_valid_sregs(), kvm_set_apic_base(): -EINVAL, and nothing is changed. Before KVM_SET_CPUID2 every bit there is
 * may be set; what it says counts from then on. */
static int check_sregs(struct ak_vcpu *v, const struct kvm_sregs *s)
{
    if ((s->efer & EFER_LME) && (s->cr0 & CR0_PG)) {
        if (!(s->cr4 & CR4_PAE) || !(s->efer & EFER_LMA) || ((s->cr3 & ~v->vm->private_gpa_mask) >> AK_MAXPHYADDR))
            return -EINVAL;
    } else if ((s->efer & EFER_LMA) || s->cs.l)
        return -EINVAL;
    if (ak_check_cr0(s->cr0) || (s->cr4 & (v->cpuid ? ak_cr4_reserved(v) : ~CR4_SUPPORTED)))
        return -EINVAL;
    u64 efer = v->cpuid ? (EFER_LME | EFER_LMA | EFER_NXE) & ak_efer_reserved(v) : 0;
    if ((s->efer & (efer | ~EFER_SUPPORTED)) && !(v->behaviour & AK_ANY_EFER))
        return -EINVAL;
    return (s->apic_base >> AK_MAXPHYADDR) || (s->apic_base & 0x6ff) ? -EINVAL : 0; /* no x2APIC */
}

int ak_set_sregs(struct ak_vcpu *v, const struct kvm_sregs *s)
{
    struct CPUX86State *env = v->env;
    const struct kvm_segment *segments[6] = {&s->cs, &s->ds, &s->es, &s->fs, &s->gs, &s->ss};
    int r = check_sregs(v, s);
    if (r)
        return r;
    if ((s->cr0 ^ env->cr[0]) & CR0_AM)
        tb_flush_x86_64(v->cpu);
    for (int i = 0; i < 6; i++)
        set_segment(&env->segs[order[i]], segments[i]);
    set_segment(&env->tr, &s->tr);
    env->tr.flags &= ~(2u << 8);
    set_segment(&env->ldt, &s->ldt);
    env->gdt = (struct SegmentCache){.base = s->gdt.base, .limit = s->gdt.limit};
    env->idt = (struct SegmentCache){.base = s->idt.base, .limit = s->idt.limit};
    env->cr[0] = s->cr0, env->cr[2] = s->cr2, env->cr[3] = s->cr3, env->cr[4] = s->cr4;
    env->efer = s->efer, v->msr.apic_base = s->apic_base;
    if (s->cr8 <= 15) /* kvm_set_cr8() refuses others, and nobody looks */
        v->cr8 = s->cr8;
    ak_update_hflags(v);
    tlb_flush_x86_64(v->cpu);
    for (u32 i = 0; i < 256; i++)
        if (s->interrupt_bitmap[i / 64] >> (i % 64) & 1) { /* the first, and no other */
            v->event.irq_injected = 1;
            v->event.irq_vector = (u8)i;
            break;
        }
    return 0;
}

extern u8 ak_sse_flags(struct ak_vcpu *v);
void ak_get_fpu(struct ak_vcpu *v, struct kvm_fpu *f)
{
    struct CPUX86State *env = v->env;
    memset(f, 0, sizeof *f);
    for (u32 i = 0; i < 8; i++) {
        memcpy(f->fpr[i], env->fpregs[(env->fpstt + i) & 7].bytes, 10);
        f->ftwx |= (u8)(!env->fptags[i] << i);
    }
    f->fcw = env->fpuc;
    f->fsw = (u16)((env->fpus & ~0x3800) | (env->fpstt & 7) << 11);
    f->last_opcode = env->fpop;
    f->last_ip = env->fpip;
    f->last_dp = env->fpdp;
    for (u32 i = 0; i < 16; i++)
        memcpy(f->xmm[i], &env->xmm_regs[i], 16);
    f->mxcsr = env->mxcsr | ak_sse_flags(v);
}

extern void ak_load_mxcsr(struct ak_vcpu *v, u32 value);
void ak_set_fpu(struct ak_vcpu *v, const struct kvm_fpu *f)
{
    struct CPUX86State *env = v->env;
    env->fpstt = f->fsw >> 11 & 7;
    for (u32 i = 0; i < 8; i++) {
        memset(env->fpregs[i].bytes, 0, sizeof env->fpregs[i].bytes);
        env->fptags[i] = !(f->ftwx >> i & 1);
    }
    for (u32 i = 0; i < 8; i++)
        memcpy(env->fpregs[(env->fpstt + i) & 7].bytes, f->fpr[i], 10);
    env->fpuc = f->fcw;
    extern void update_fp_status_x86_64(struct CPUX86State *);
    update_fp_status_x86_64(env);
    env->fpus = (u16)(f->fsw & ~0x3800);
    env->fpop = f->last_opcode;
    env->fpip = f->last_ip;
    env->fpdp = f->last_dp;
    for (u32 i = 0; i < 16; i++)
        memcpy(&env->xmm_regs[i], f->xmm[i], 16);
    ak_load_mxcsr(v, f->mxcsr & 0xffff);
}
