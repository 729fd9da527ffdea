/* First stage: the guest's own page tables, walked as hardware with nested paging walks them. A table page is reached
 * through its memslot; the walk needs it writable (it sets accessed bits), as nested paging hardware does, unless the
 * memslot is read-only. Sources: Intel SDM 3A chapter 4; ABI.md 3.3 for what a missing table page means. */
#include "engine_internal.h"
#include <errno.h>

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_PS 0x80ull
#define PTE_NX (1ull << 63)
#define PTE_ADDR 0x000ffffffffff000ull
#define PF_P 1u
#define PF_W 2u
#define PF_U 4u
#define PF_RSVD 8u
#define PF_I 16u

int ak_host_load(u64 hva, u32 size, bool write, u64 *value);
int ak_host_cmpxchg(u64 hva, u32 size, u64 old, u64 new);

struct walk {
    struct ak_vcpu *v;
    enum ak_access access;
    bool user, effects;
    u32 size;            /* of an entry */
    bool read_only;      /* table in a read-only slot: no accessed bits */
    u64 hva;             /* of the entry last read */
};

static int page_fault(const struct walk *w, u32 bits, struct ak_translation *t)
{
    const struct CPUX86State *env = w->v->env;
    t->error_code = bits | (w->access == AK_WRITE ? PF_W : 0) | (w->user ? PF_U : 0);
    if (w->access == AK_FETCH && ((env->efer & EFER_NXE) || (env->cr[4] & CR4_SMEP)))
        t->error_code |= PF_I;
    return AK_WALK_PF;
}

/* Read one table entry at gpa. */
static int load_entry(struct walk *w, u64 gpa, u64 *entry, struct ak_translation *t)
{
    struct ak_vm *vm = w->v->vm;
    bool hardware = w->effects && w->v->emulation == AK_NATIVE; /* else KVM's software walker */
    t->is_private = !!(gpa & vm->private_gpa_mask);
    gpa &= ~vm->private_gpa_mask;
    struct ak_slot *slot = ak_gfn_to_memslot(vm, gpa >> 12);
    w->read_only = !w->effects || (slot && (slot->flags & KVM_MEM_READONLY));
    enum ak_access access = w->effects ? AK_WRITE : AK_READ;
    bool in_file = false;
    if (ak_may_be_private(vm, slot) && ak_gmem_faultin(w->v, slot, gpa >> 12, access, t)) {
        t->gpa = gpa & AK_PAGE_MASK;
        t->fault_access = AK_WRITE;
        t->slot_id = slot ? slot->id : 0;
        if (t->pfn != KVM_PFN_OK)
            return hardware ? AK_WALK_STAGE2 : page_fault(w, 0, t);
        w->hva = t->hva | (gpa & ~AK_PAGE_MASK);
        in_file = true; /* its look-up was asked about already */
    } else if (slot)
        w->hva = slot->hva + (gpa - (slot->base_gfn << 12));
    else {
        t->no_table = 1;
        t->table_gpa = gpa;
        return page_fault(w, 0, t);
    }
    u32 why = w->effects && !in_file ? (u32)ak_refused(w->v, AK_LOOKUP_HVA, gpa, access) : 0;
    u32 pfn = ak_refusal_pfn((int)why), tries = 0;
    while (pfn == KVM_PFN_OK && (why = (u32)ak_host_load(w->hva, w->size, !w->read_only, entry))) {
        pfn = ak_hva_refused(w->v, w->hva, w->read_only ? AK_READ : AK_WRITE, &why);
        if (pfn != KVM_PFN_OK)
            break;
        if (tries++ == AK_DEVICE_TRIES) {
            pfn = KVM_PFN_ERR_FAULT;
            break;
        }
    }
    if (!why) {
        if (!w->read_only)
            ak_map_page(w->v, slot, gpa >> 12, AK_WRITE);
        return AK_WALK_OK;
    }
    if (!hardware)
        return page_fault(w, 0, t); /* as if the entry were not present */
    t->gpa = gpa & AK_PAGE_MASK;
    t->fault_hva = w->hva & AK_PAGE_MASK;
    t->fault_access = AK_WRITE;
    t->host_fault = why;
    t->slot_id = slot->id;
    t->pfn = pfn;
    return AK_WALK_STAGE2;
}

static bool set_bits(struct walk *w, u64 entry, u64 bits)
{
    if ((entry & bits) == bits || w->read_only)
        return true;
    return ak_host_cmpxchg(w->hva, w->size, entry, entry | bits) == 0;
}

static u64 reserved_bits(const struct walk *w, int level, bool leaf, bool pae, bool lma)
{
    u64 reserved = 0;
    if (w->size == 8) {
        reserved = PTE_ADDR & ~((1ull << AK_MAXPHYADDR) - 1) & ~w->v->vm->private_gpa_mask;
        if (!(w->v->env->efer & EFER_NXE))
            reserved |= PTE_NX;
        if (!lma)
            reserved |= 0x7ff0000000000000ull;
        if (pae && !lma && level == 2)
            reserved |= 0x1e6; /* PDPTE */
        if (leaf && level == 1)
            reserved |= 0x1fe000;
        if (leaf && level == 2)
            reserved |= 0x3fffe000;
        if (level == 3)
            reserved |= PTE_PS;
    }
    return reserved;
}

/* Permissions of the leaf; prot gets what a TLB entry may allow. */
static int permitted(const struct walk *w, int mmu_idx, bool writable, bool user, bool nx, bool dirty, u32 bits,
                     struct ak_translation *t)
{
    const struct CPUX86State *env = w->v->env;
    bool supervisor_writes = !w->user && !(env->cr[0] & CR0_WP);
    if (w->user && !user)
        return page_fault(w, bits, t);
    if (!w->user && user) {
        if (w->access == AK_FETCH && (env->cr[4] & CR4_SMEP))
            return page_fault(w, bits, t);
        if (w->access != AK_FETCH && (env->cr[4] & CR4_SMAP) && mmu_idx == MMU_KSMAP_IDX)
            return page_fault(w, bits, t);
    }
    if (w->access == AK_WRITE && !writable && !supervisor_writes)
        return page_fault(w, bits, t);
    if (w->access == AK_FETCH && nx)
        return page_fault(w, bits, t);
    t->prot = 1;
    if ((writable || supervisor_writes) && dirty)
        t->prot |= 2;
    if (!nx && !(user && !w->user && (env->cr[4] & CR4_SMEP)))
        t->prot |= 4;
    return AK_WALK_OK;
}

static int walk_tables(struct walk *w, u64 va, int mmu_idx, int levels, bool lma, struct ak_translation *t)
{
    const struct CPUX86State *env = w->v->env;
    bool pae = env->cr[4] & CR4_PAE, writable = true, user = true, nx = false;
    u64 table = env->cr[3] & (lma ? PTE_ADDR : pae ? 0xffffffe0ull : 0xfffff000ull);
    int bits = pae ? 9 : 10;
    for (int level = levels - 1;; level--) {
        int shift = 12 + bits * level;
        bool pdpte = pae && !lma && level == 2;
        u64 index = (va >> shift) & (pdpte ? 3 : (1u << bits) - 1), entry;
        int r = load_entry(w, table + index * w->size, &entry, t);
        if (r)
            return r;
        if (!(entry & PTE_P))
            return page_fault(w, 0, t);
        bool large = level && (entry & PTE_PS) && !pdpte && (pae || (env->cr[4] & CR4_PSE));
        if (entry & reserved_bits(w, level, large, pae, lma))
            return page_fault(w, PF_P | PF_RSVD, t);
        if (!pdpte) {
            writable = writable && (entry & PTE_W);
            user = user && (entry & PTE_U);
            nx = nx || (pae && (env->efer & EFER_NXE) && (entry & PTE_NX));
        }
        if (level && !large) {
            if (!pdpte && !set_bits(w, entry, PTE_A))
                return -EAGAIN;
            table = entry & (pae ? PTE_ADDR : 0xfffff000ull);
            continue;
        }
        bool dirty = w->access == AK_WRITE || (entry & PTE_D) || w->read_only;
        r = permitted(w, mmu_idx, writable, user, nx, dirty, PF_P, t);
        if (r)
            return r;
        if (!set_bits(w, entry, PTE_A | (w->access == AK_WRITE ? PTE_D : 0)))
            return -EAGAIN;
        u64 offset = (1ull << shift) - 1, base = pae ? entry & PTE_ADDR : entry & 0xfffff000u;
        if (!pae && large) /* PSE-36: bits 13..20 are address bits 32..39 */
            base = (entry & 0xffc00000u) | ((entry & 0x1fe000ull) << 19);
        u64 privacy = w->v->vm->private_gpa_mask;
        t->is_private = !!(base & privacy);
        t->gpa = ((base & ~privacy & ~offset) | (va & offset)) & AK_PAGE_MASK;
        t->error_code = (writable ? PF_W : 0) | (user ? PF_U : 0); /* for KVM_TRANSLATE */
        return AK_WALK_OK;
    }
}

/* Translate va for an access. Returns AK_WALK_OK with t->gpa and t->prot, AK_WALK_PF with t->error_code, AK_WALK_GP
 * for a non-canonical address, AK_WALK_STAGE2 when a table page cannot be had (t->gpa, t->pfn). AK_WALK_PF for a table that
 * no slot has says so (t->no_table, t->table_gpa). */
int ak_walk(struct ak_vcpu *v, u64 va, enum ak_access access, int mmu_idx, bool effects, struct ak_translation *t)
{
    const struct CPUX86State *env = v->env;
    bool lma = env->efer & EFER_LMA;
    struct walk w = {.v = v, .access = access, .user = mmu_idx == MMU_USER_IDX, .effects = effects};
    t->no_table = 0;
    if (!(env->cr[0] & CR0_PG)) {
        t->gpa = (u32)va & (u32)env->a20_mask & AK_PAGE_MASK;
        t->is_private = 0; /* no page tables, so no bit */
        t->prot = 7;
        t->error_code = PF_W | PF_U;
        return AK_WALK_OK;
    }
    if (lma && (u64)((int64_t)(va << 16) >> 16) != va)
        return AK_WALK_GP;
    if (!lma)
        va = (u32)va;
    w.size = env->cr[4] & CR4_PAE ? 8 : 4;
    int levels = lma ? 4 : w.size == 8 ? 3 : 2, r;
    while ((r = walk_tables(&w, va, mmu_idx, levels, lma, t)) == -EAGAIN)
        ; /* an entry changed under the walk */
    return r;
}

/* KVM_TRANSLATE: no side effects; 0 with *gpa, or -1 when not mapped. */
int ak_translate(struct ak_vcpu *v, u64 va, u64 *gpa, u32 *writeable, u32 *usermode)
{
    struct ak_translation t = {0};
    int r = ak_walk(v, va, AK_READ, 2, false, &t);
    if (r != AK_WALK_OK)
        return -1;
    *gpa = t.gpa | (va & ~AK_PAGE_MASK);
    *writeable = !!(t.error_code & PF_W);
    *usermode = !!(t.error_code & PF_U);
    return 0;
}
