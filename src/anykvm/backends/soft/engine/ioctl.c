/* The ioctls on vCPUs, below the copying from and to the caller (that is Python's: vcpu.py, vcpu_state.py). Each is one
 * call, so that what happens under vcpu->mutex happens in C: a Python signal handler can never run while it is held. */
#include "engine_internal.h"
#include <errno.h>
#include <string.h>

#define XFEATURE_FP 1ull
#define XFEATURE_SSE 2ull
#define MXCSR_MASK 0xffffu /* every defined MXCSR bit may be set */
#define SREGS2_PDPTRS_VALID 1ull
#define INVALID_GPA (~0ull)

extern void helper_set_dr_x86_64(struct CPUX86State *env, int reg, u64 value);
int ak_set_events(struct ak_vcpu *v, const struct kvm_vcpu_events *events);
void ak_get_events(struct ak_vcpu *v, struct kvm_vcpu_events *events);
void ak_queue_nmis(struct ak_vcpu *v, u32 count);

/* -- registers ----------------------------------------------------------------------------------------------------- */

static bool pae_paging(u64 cr0, u64 cr4, u64 efer)
{
    return (cr0 & CR0_PG) && (cr4 & CR4_PAE) && !(efer & EFER_LMA);
}

/* struct kvm_sregs2 is kvm_sregs with flags and PDPTRs in place of the interrupt bitmap (linux/kvm.h before 5.14 lacks
 * it). */
struct sregs2 {
    u8 common[offsetof(struct kvm_sregs, interrupt_bitmap)];
    u64 flags, pdptrs[4];
};

static void get_sregs2(struct ak_vcpu *v, struct sregs2 *out)
{
    struct kvm_sregs s;
    ak_get_sregs(v, &s);
    memset(out, 0, sizeof *out);
    memcpy(out->common, &s, sizeof out->common);
    if (!pae_paging(s.cr0, s.cr4, s.efer))
        return;
    out->flags = SREGS2_PDPTRS_VALID; /* nested paging hardware reads them from memory: so does this */
    u64 gpa = s.cr3 & ~31ull;
    ak_guest_enter(v);
    struct ak_slot *slot = ak_gfn_to_memslot(v->vm, gpa >> 12);
    if (!slot || ak_copy_in(out->pdptrs, slot->hva + gpa - (slot->base_gfn << 12), sizeof out->pdptrs))
        memset(out->pdptrs, 0, sizeof out->pdptrs);
    ak_guest_exit(v);
}

static int set_sregs2(struct ak_vcpu *v, const struct sregs2 *in)
{
    struct kvm_sregs s;
    memset(&s, 0, sizeof s);
    memcpy(&s, in->common, sizeof in->common);
    if (in->flags & ~SREGS2_PDPTRS_VALID)
        return -EINVAL;
    if (in->flags && !pae_paging(s.cr0, s.cr4, s.efer))
        return -EINVAL;
    return ak_set_sregs(v, &s);
}

/* kvm_arch_vcpu_ioctl_get_fpu() and ..._set_fpu() leave MXCSR alone. */
static void get_fpu(struct ak_vcpu *v, struct kvm_fpu *f)
{
    ak_get_fpu(v, f);
    f->mxcsr = 0;
}

static void set_fpu(struct ak_vcpu *v, const struct kvm_fpu *f)
{
    struct kvm_fpu now, next = *f;
    ak_get_fpu(v, &now);
    next.mxcsr = now.mxcsr;
    ak_set_fpu(v, &next);
}

/* The XSAVE area's legacy region and header: x87 and SSE are all there is. */
struct xsave {
    u16 fcw, fsw;
    u8 ftw, reserved;
    u16 fop;
    u64 fip, fdp;
    u32 mxcsr, mxcsr_mask;
    u8 st[8][16], xmm[16][16], unused[96];
    u64 xstate_bv, xcomp_bv, header_reserved[6];
};
_Static_assert(sizeof(struct xsave) == 576, "XSAVE area");

static void get_xsave(struct ak_vcpu *v, struct xsave *x)
{
    struct kvm_fpu f;
    ak_get_fpu(v, &f);
    memset(x, 0, sizeof *x);
    x->fcw = f.fcw, x->fsw = f.fsw, x->ftw = f.ftwx, x->fop = f.last_opcode;
    x->fip = f.last_ip, x->fdp = f.last_dp;
    x->mxcsr = f.mxcsr, x->mxcsr_mask = MXCSR_MASK;
    memcpy(x->st, f.fpr, sizeof x->st);
    memcpy(x->xmm, f.xmm, sizeof x->xmm);
    x->xstate_bv = XFEATURE_FP | XFEATURE_SSE;
}

/* fpu_copy_uabi_to_guest_fpstate(): a component that is not in xstate_bv gets its initial value. */
static int set_xsave(struct ak_vcpu *v, const struct xsave *x)
{
    struct kvm_fpu f = {.fcw = 0x37f, .mxcsr = x->xstate_bv & XFEATURE_SSE ? x->mxcsr : 0x1f80};
    if ((x->xstate_bv & ~(XFEATURE_FP | XFEATURE_SSE)) || x->xcomp_bv)
        return -EINVAL;
    if ((x->xstate_bv & XFEATURE_SSE) && (x->mxcsr & ~MXCSR_MASK))
        return -EINVAL;
    for (unsigned i = 0; i < sizeof x->header_reserved / sizeof *x->header_reserved; i++)
        if (x->header_reserved[i])
            return -EINVAL;
    if (x->xstate_bv & XFEATURE_FP) {
        f.fcw = x->fcw, f.fsw = x->fsw, f.ftwx = x->ftw, f.last_opcode = x->fop;
        f.last_ip = x->fip, f.last_dp = x->fdp;
        memcpy(f.fpr, x->st, sizeof f.fpr);
    }
    if (x->xstate_bv & XFEATURE_SSE)
        memcpy(f.xmm, x->xmm, sizeof f.xmm);
    ak_set_fpu(v, &f);
    return 0;
}

static void get_xcrs(struct ak_vcpu *v, struct kvm_xcrs *x)
{
    memset(x, 0, sizeof *x);
    x->nr_xcrs = 1;
    x->xcrs[0].value = v->env->xcr0;
}

/* kvm_vcpu_ioctl_x86_set_xcrs(), __kvm_set_xcr(): x87 always, SSE if CPUID leaf 0xd offers it; other XCRs are ignored. */
static int set_xcrs(struct ak_vcpu *v, const struct kvm_xcrs *x)
{
    u32 leaf[4];
    if (x->nr_xcrs > KVM_MAX_XCRS || x->flags)
        return -EINVAL;
    ak_cpuid(v, 0xd, 0, leaf);
    for (u32 i = 0; i < x->nr_xcrs; i++) {
        u64 value = x->xcrs[i].value;
        if (x->xcrs[i].xcr)
            continue;
        if (!(value & XFEATURE_FP) || (value & ~(XFEATURE_FP | (leaf[0] & XFEATURE_SSE))))
            return -EINVAL;
        v->env->xcr0 = value;
        break;
    }
    return 0;
}

static void get_debugregs(struct ak_vcpu *v, struct kvm_debugregs *d)
{
    memset(d, 0, sizeof *d);
    memcpy(d->db, v->env->dr, sizeof d->db);
    d->dr6 = v->env->dr[6];
    d->dr7 = v->env->dr[7];
}

static int set_debugregs(struct ak_vcpu *v, const struct kvm_debugregs *d)
{
    if (d->flags || d->dr6 >> 32 || d->dr7 >> 32)
        return -EINVAL;
    ak_current = v; /* the engine drops translations around breakpoints, which calls back */
    helper_set_dr_x86_64(v->env, 7, 0);
    for (int i = 0; i < 4; i++)
        helper_set_dr_x86_64(v->env, i, d->db[i]);
    helper_set_dr_x86_64(v->env, 7, d->dr7);
    v->env->dr[6] = d->dr6; /* with no bit forced: what was set is what KVM_GET_DEBUGREGS gives */
    ak_current = NULL;
    v->env->dr[6] = d->dr6; /* as given, bits that are always 1 or 0 too */
    v->env->dr[7] = d->dr7;
    return 0;
}

/* __msr_io(): one after the other until one fails; returns how many were done. */
static int get_msrs(struct ak_vcpu *v, struct kvm_msrs *m)
{
    u32 i = 0;
    while (i < m->nmsrs && !ak_msr_get(v, m->entries[i].index, (u64 *)&m->entries[i].data, true))
        i++;
    if (i < m->nmsrs)
        m->entries[i].data = 0; /* kvm_do_msr_access(): what could not be read is 0 */
    return (int)i;
}

static int set_msrs(struct ak_vcpu *v, const struct kvm_msrs *m)
{
    u32 i = 0;
    while (i < m->nmsrs && !ak_msr_set(v, m->entries[i].index, m->entries[i].data, true))
        i++;
    ak_update_hflags(v);
    return (int)i;
}

/* -- the rest ------------------------------------------------------------------------------------------------------ */

/* Without an in-kernel APIC a vCPU is always runnable (kvm_arch_vcpu_ioctl_set_mpstate()). */
static int set_mp_state(struct ak_vcpu *v, const struct kvm_mp_state *m)
{
    if (m->mp_state != KVM_MP_STATE_RUNNABLE)
        return -EINVAL;
    v->mp_state = m->mp_state;
    return 0;
}

/* kvm_arch_vcpu_ioctl_translate(): writeable and usermode are constants. */
static void translate(struct ak_vcpu *v, struct kvm_translation *t)
{
    u64 gpa;
    u32 writeable, usermode;
    u64 address = t->linear_address;
    if (v->env->efer & EFER_LMA) /* the walk looks at 48 bits, and at no others */
        address = (u64)((int64_t)(address << 16) >> 16);
    ak_guest_enter(v);
    t->valid = !ak_translate(v, address, &gpa, &writeable, &usermode);
    ak_guest_exit(v);
    t->physical_address = t->valid ? gpa : INVALID_GPA;
    t->writeable = 1;
    t->usermode = 0;
}

/* kvm_vcpu_ioctl_set_sigmask(); NULL: the caller's own mask again. */
static void set_sigmask(struct ak_vcpu *v, const u64 *mask)
{
    v->has_sigmask = mask != NULL;
    v->sigmask = mask ? *mask & ~(1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1)) : 0;
}

/* KVM_INTERRUPT without an in-kernel irqchip: kvm_vcpu_ioctl_interrupt(). */
static int queue_interrupt(struct ak_vcpu *v, const struct kvm_interrupt *i)
{
    if (i->irq > 255)
        return -EINVAL;
    ak_request_event(v);
    v->event.irq_injected = 1;
    v->event.irq_vector = (u8)i->irq;
    return 0;
}

#define KVM_GET_SREGS2_NR 0xcc
#define KVM_SET_SREGS2_NR 0xcd
#define KVM_GET_XSAVE2_NR 0xcf

static int vcpu_ioctl(struct ak_vcpu *v, u32 request, void *data)
{
    switch (_IOC_NR(request)) {
    case KVM_GET_SREGS2_NR: return get_sregs2(v, data), 0;
    case KVM_SET_SREGS2_NR: return set_sregs2(v, data);
    case KVM_GET_XSAVE2_NR: return get_xsave(v, data), 0;
    }
    switch (request) {
    case KVM_GET_REGS: return ak_get_regs(v, data), 0;
    case KVM_SET_REGS: return ak_set_regs(v, data), 0;
    case KVM_GET_SREGS: return ak_get_sregs(v, data), 0;
    case KVM_SET_SREGS: return ak_set_sregs(v, data);
    case KVM_GET_FPU: return get_fpu(v, data), 0;
    case KVM_SET_FPU: return set_fpu(v, data), 0;
    case KVM_GET_XSAVE: return get_xsave(v, data), 0;
    case KVM_SET_XSAVE: return set_xsave(v, data);
    case KVM_GET_XCRS: return get_xcrs(v, data), 0;
    case KVM_SET_XCRS: return set_xcrs(v, data);
    case KVM_GET_DEBUGREGS: return get_debugregs(v, data), 0;
    case KVM_SET_DEBUGREGS: return set_debugregs(v, data);
    case KVM_GET_VCPU_EVENTS: return ak_get_events(v, data), 0;
    case KVM_SET_VCPU_EVENTS: return ak_set_events(v, data);
    case KVM_GET_MSRS: return get_msrs(v, data);
    case KVM_SET_MSRS: return set_msrs(v, data);
    case KVM_SET_CPUID2: return ak_set_cpuid(v, data);
    case KVM_GET_CPUID2: return ak_get_cpuid(v, data);
    case KVM_GET_MP_STATE: return *(u32 *)data = v->mp_state, 0;
    case KVM_SET_MP_STATE: return set_mp_state(v, data);
    case KVM_TRANSLATE: return translate(v, data), 0;
    case KVM_SET_SIGNAL_MASK: return set_sigmask(v, data), 0;
    case KVM_INTERRUPT: return queue_interrupt(v, data);
    case KVM_NMI: return ak_request_event(v), ak_queue_nmis(v, 1), 0;
    default: return -EINVAL;
    }
}

/* An ioctl of a vCPU other than KVM_RUN, its argument already here: data is the structure the request takes (for
 * KVM_SET_SIGNAL_MASK the mask, or NULL). The result, or a negative errno. */
int ak_vcpu_ioctl(struct ak_vcpu *v, u32 request, void *data)
{
    int r = ak_vcpu_lock(v);
    if (r)
        return r;
    r = vcpu_ioctl(v, request, data);
    ak_vcpu_unlock(v);
    return r;
}

/* What a new vCPU has from its VM: the profile's choices, and which vCPU boots. */
void ak_vcpu_configure(struct ak_vcpu *v, u32 annotate_all, u32 behaviour, u32 purge, u32 is_bsp)
{
    v->annotate_all = annotate_all;
    v->behaviour = behaviour;
    v->purge = purge;
    v->zaps = v->vm->zaps;
    v->sync_supported = KVM_SYNC_X86_VALID_FIELDS | (behaviour & AK_SYNC_LOW_HALF ? ~0ull << 32 : 0);
    v->msr.apic_base = (v->msr.apic_base & ~0x100ull) | (is_bsp ? 0x100 : 0);
}
