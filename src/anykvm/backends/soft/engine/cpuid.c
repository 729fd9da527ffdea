/* CPUID from the table KVM_SET_CPUID2 gave, with the bits that follow other state (kvm_update_cpuid_runtime), and the
 * time-stamp counter. */
#include "engine_internal.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct kvm_cpuid_entry2 *find(const struct ak_vcpu *v, u32 function, u32 index)
{
    for (u32 i = 0; i < v->ncpuid; i++) {
        const struct kvm_cpuid_entry2 *e = &v->cpuid[i];
        if (e->function == function && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == index))
            return e;
    }
    return NULL;
}

/* eax, ebx, ecx, edx of a leaf; zeros where the table has none (kvm_cpuid(), AMD: out of range reads as zero). */
void ak_cpuid(struct ak_vcpu *v, u32 function, u32 index, u32 out[4])
{
    const struct kvm_cpuid_entry2 *e = find(v, function, index);
    out[0] = e ? e->eax : 0;
    out[1] = e ? e->ebx : 0;
    out[2] = e ? e->ecx : 0;
    out[3] = e ? e->edx : 0;
    if (e && function == 1) {
        out[2] = (out[2] & ~(1u << 27)) | (v->env->cr[4] & CR4_OSXSAVE ? 1u << 27 : 0);
        out[3] = (out[3] & ~(1u << 9)) | (v->msr.apic_base & (1u << 11) ? 1u << 9 : 0);
    }
}

bool ak_cpuid_has(struct ak_vcpu *v, u32 function, int reg, int bit)
{
    const struct kvm_cpuid_entry2 *e = find(v, function, 0);
    if (!e)
        return false;
    u32 value = reg == R_EAX ? e->eax : reg == R_EBX ? e->ebx : reg == R_ECX ? e->ecx : e->edx;
    return value >> bit & 1;
}

/* guest_cpuid_is_amd_compatible(): by the vendor in the table; without a table it is not. */
bool ak_is_amd(struct ak_vcpu *v)
{
    const struct kvm_cpuid_entry2 *e = find(v, 0, 0);
    if (!e)
        return false;
    u32 vendor[3] = {e->ebx, e->edx, e->ecx};
    return !memcmp(vendor, "AuthenticAMD", 12) || !memcmp(vendor, "HygonGenuine", 12);
}

/* Nanoseconds since the VM began, at the VM's frequency, plus this vCPU's offset. */
u64 ak_tsc(struct ak_vcpu *v)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    u64 ns = (u64)t.tv_sec * 1000000000ull + (u64)t.tv_nsec - v->vm->tsc_boot_ns;
    return (u64)((__uint128_t)ns * v->vm->tsc_khz / 1000000u) + (u64)v->msr.tsc_offset;
}

void helper_cpuid_x86_64(struct CPUX86State *env)
{
    u32 out[4];
    ak_cpuid(ak_current, (u32)env->regs[R_EAX], (u32)env->regs[R_ECX], out);
    env->regs[R_EAX] = out[0];
    env->regs[R_EBX] = out[1];
    env->regs[R_ECX] = out[2];
    env->regs[R_EDX] = out[3];
    if (ak_current->vm->nvcpus > 1)
        ak_kick(ak_current); /* CPUID serializes: code that another vCPU wrote is compared on the next entry */
}

static void rdtsc(struct CPUX86State *env, uintptr_t retaddr)
{
    if ((env->cr[4] & CR4_TSD) && (env->hflags & HF_CPL_MASK))
        ak_raise(ak_current, EXCP_GP, 0, retaddr);
    u64 value = ak_tsc(ak_current);
    env->regs[R_EAX] = (u32)value;
    env->regs[R_EDX] = value >> 32;
}

void helper_rdtsc_x86_64(struct CPUX86State *env)
{
    rdtsc(env, GETPC());
}

void helper_rdtscp_x86_64(struct CPUX86State *env)
{
    rdtsc(env, GETPC());
    env->regs[R_ECX] = (u32)env->tsc_aux;
}

void helper_rdpmc_x86_64(struct CPUX86State *env)
{
    (void)env;
    ak_raise(ak_current, EXCP_GP, 0, GETPC()); /* no PMU */
}

/* Take over a table. 0 or -ENOMEM. */
int ak_cpuid_load(struct ak_vcpu *v, const struct kvm_cpuid_entry2 *entries, u32 n)
{
    struct kvm_cpuid_entry2 *copy = ak_malloc((n ? n : 1) * sizeof *copy);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, entries, n * sizeof *copy);
    free(v->cpuid);
    v->cpuid = copy;
    v->ncpuid = n;
    return 0;
}

/* The bits that follow other state are not the table's (kvm_update_cpuid_runtime()): OSXSAVE, APIC. */
static bool same_entry(const struct kvm_cpuid_entry2 *a, const struct kvm_cpuid_entry2 *b)
{
    bool first = a->function == 1;
    u32 ecx = first ? 1u << 27 : 0, edx = first ? 1u << 9 : 0;
    return a->function == b->function && a->index == b->index && a->flags == b->flags && a->eax == b->eax &&
           a->ebx == b->ebx && !((a->ecx ^ b->ecx) & ~ecx) && !((a->edx ^ b->edx) & ~edx);
}

/* kvm_set_cpuid(): the same table again is fine at any time, another one only before the vCPU has run. */
int ak_set_cpuid(struct ak_vcpu *v, const struct kvm_cpuid2 *c)
{
    if (v->ran) {
        if (c->nent != v->ncpuid)
            return -EINVAL;
        for (u32 i = 0; i < c->nent; i++)
            if (!same_entry(&c->entries[i], &v->cpuid[i]))
                return -EINVAL;
        return 0;
    }
    for (u32 i = 0; i < c->nent; i++) { /* kvm_check_cpuid(): only canonical addresses of 48 or 57 bits exist */
        u32 bits = c->entries[i].eax >> 8 & 0xff;
        if (c->entries[i].function == 0x80000008 && bits && bits != 48 && bits != 57)
            return -EINVAL;
    }
    return ak_cpuid_load(v, c->entries, c->nent);
}

int ak_get_cpuid(struct ak_vcpu *v, struct kvm_cpuid2 *c)
{
    if (c->nent < v->ncpuid)
        return -E2BIG;
    c->nent = v->ncpuid;
    for (u32 i = 0; i < v->ncpuid; i++) {
        struct kvm_cpuid_entry2 *e = &c->entries[i];
        u32 now[4];
        *e = v->cpuid[i];
        ak_cpuid(v, e->function, e->index, now);
        if (e->function == 1)
            e->ecx = now[2], e->edx = now[3];
    }
    return 0;
}
