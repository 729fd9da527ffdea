/* Second stage: a guest page fault resolved through its memslot and the host's own mapping, in the order of ABI.md 3,
 * and the TLB fill built on it. The fill replaces the engine's; the handler of a host fault in guest code lives here
 * too, because both end in "restart the instruction, look the page up again". */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <errno.h>
#include <ucontext.h>

/* The slot of an access, or NULL; t gets what the access is, and nothing of how it goes. */
static struct ak_slot *slot_of(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t)
{
    u64 gfn = gpa >> 12;
    struct ak_slot *slot = gfn >> (AK_MAXPHYADDR - 12) ? NULL : ak_gfn_to_memslot(v->vm, gfn);
    t->gpa = gpa & AK_PAGE_MASK;
    t->fault_access = access;
    t->annotate = 0;
    t->slot_id = slot ? slot->id : 0;
    return slot;
}

/* __kvm_faultin_pfn(): no slot, read-only slot, then the host page by the touch get_user_pages() would do. enum ak_pfn. */
static int slot_pfn(struct ak_vcpu *v, struct ak_slot *slot, enum ak_access access, struct ak_translation *t)
{
    u64 gfn = t->gpa >> 12;
    if (!slot)
        return t->pfn = KVM_PFN_NOSLOT;
    if (access == AK_WRITE && (slot->flags & KVM_MEM_READONLY))
        return t->pfn = KVM_PFN_ERR_RO_FAULT;
    t->hva = t->fault_hva = slot->hva + ((gfn - slot->base_gfn) << 12);
    if ((t->host_fault = (u32)ak_refused(v, AK_LOOKUP_HVA, t->gpa, access)))
        return t->pfn = ak_refusal_pfn((int)t->host_fault);
    return t->pfn = ak_hva_to_pfn(v, t->hva, access, &t->host_fault);
}

/* kvm_mmu_faultin_pfn(): privacy and guest_memfd, then the slot's page, which is mapped. enum ak_pfn. */
int ak_faultin_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t)
{
    struct ak_slot *slot = slot_of(v, gpa, access, t);
    t->not_shared = 0;
    if (ak_may_be_private(v->vm, slot) && ak_gmem_faultin(v, slot, gpa >> 12, access, t))
        return t->pfn;
    slot_pfn(v, slot, access, t);
    if (t->pfn == KVM_PFN_OK)
        ak_map_page(v, slot, gpa >> 12, access);
    else if (slot && t->pfn != KVM_PFN_ERR_RO_FAULT)
        ak_unmap_page(slot, gpa >> 12);
    return t->pfn;
}

/* An access of KVM's emulator, kvm_vcpu_read_guest() and kvm_vcpu_write_guest(): by the slot's userspace_addr, whatever
 * is private. enum ak_pfn. */
int ak_emulator_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t)
{
    struct ak_slot *slot = slot_of(v, gpa, access, t);
    if (slot_pfn(v, slot, access, t) == KVM_PFN_OK && access == AK_WRITE)
        ak_mark_page_dirty(v, slot, gpa >> 12);
    return t->pfn;
}

static void __attribute__((noreturn)) fault_exit(struct ak_vcpu *v, struct ak_translation *t, uintptr_t retaddr)
{
    v->exit.gpa = t->gpa;
    v->exit.hva = t->fault_hva;
    v->exit.access = t->fault_access;
    v->exit.host_fault = t->host_fault;
    v->exit.slot_id = t->slot_id;
    v->exit.size = AK_PAGE_SIZE;
    v->exit.flags = t->flags;
    v->exit.annotate = t->annotate;
    v->exit.err = t->annotate ? t->err : -EFAULT;
    v->faults++;
    v->emulation = AK_NATIVE;
    v->emulate_alone = 0;
    v->nlog = v->nreplay = v->nfragments = 0;
    ak_leave(v,
             t->pfn == KVM_PFN_ERR_HWPOISON     ? AK_EXIT_HWPOISON
             : t->pfn == KVM_PFN_ERR_SIGPENDING ? AK_EXIT_KICKED /* the loop's tail finds the signal */
                                                : AK_EXIT_FAULT,
             retaddr);
}

/* A fetch that fails while a block is being translated is not this instruction's fault yet: run the instructions
 * before it as a shorter block first, so that RIP is exact. */
static void before_fetch_fault(struct ak_vcpu *v)
{
    if (v->translating > 1) {
        v->cpu->cflags_next_tb = v->translating - 1;
        v->cpu->exception_index = -1;
        v->translating = 0;
        cpu_loop_exit_x86_64(v->cpu);
    }
}

/* Whether a host address is in this vCPU's translated code. */
bool ak_in_code(const struct ak_vcpu *v, uintptr_t pc)
{
    const struct TCGContext *tcg = v->uc->tcg_ctx;
    return pc - (uintptr_t)tcg->code_gen_buffer < tcg->code_gen_buffer_size;
}

/* The load of a locked instruction that runs alone for want of atomicity. To KVM the whole access is a write: in a
 * read-only slot it has begun to emulate before it looks at what the host has there. */
bool ak_locked_in_read_only_slot(struct ak_vcpu *v, u64 addr, int mmu_idx)
{
    struct ak_translation t = {0};
    return v->emulate_alone && ak_walk(v, addr, AK_WRITE, mmu_idx, false, &t) == AK_WALK_OK &&
           ak_data_pfn(v, t.gpa, AK_WRITE, &t) == KVM_PFN_ERR_RO_FAULT;
}

/* An access of a helper that loads descriptors, to one: KVM's emulator reads and writes those as memory only
 * (linear_read_system(), linear_write_system()). */
static bool is_descriptor(struct ak_vcpu *v, u64 addr, uintptr_t retaddr)
{
    const struct CPUX86State *env = v->env;
    bool in_ldt = (env->ldt.selector & ~3u) && addr - env->ldt.base <= env->ldt.limit;
    return retaddr && retaddr == v->descriptor_pc && (in_ldt || addr - env->gdt.base <= env->gdt.limit);
}

#define LOADS_DESCRIPTORS(name, parameters, arguments)                                                                 \
    extern void __real_helper_##name##_x86_64 parameters;                                                              \
    void __wrap_helper_##name##_x86_64 parameters                                                                      \
    {                                                                                                                  \
        ak_current->descriptor_pc = GETPC();                                                                           \
        __real_helper_##name##_x86_64 arguments; /* a jump: its GETPC() is ours */                                     \
    }
LOADS_DESCRIPTORS(load_seg, (struct CPUX86State *env, int reg, int selector), (env, reg, selector))
LOADS_DESCRIPTORS(lldt, (struct CPUX86State *env, int selector), (env, selector))
LOADS_DESCRIPTORS(ltr, (struct CPUX86State *env, int selector), (env, selector))
LOADS_DESCRIPTORS(ljmp_protected, (struct CPUX86State *env, int cs, u64 eip, u64 next), (env, cs, eip, next))
LOADS_DESCRIPTORS(lcall_protected, (struct CPUX86State *env, int cs, u64 eip, int shift, u64 next),
                  (env, cs, eip, shift, next))
LOADS_DESCRIPTORS(lret_protected, (struct CPUX86State *env, int shift, int addend), (env, shift, addend))

/* No slot has a page table. Nested paging tells KVM the address of its entry, for which the instruction is emulated; whose
 * own walk finds no table, and that is the guest's page fault. A delivery cannot be emulated (suberror 3); but of a page
 * fault that was raised so itself, the oracle's kernels try the instruction again, for ever. An operand at the same offset
 * in its page as the entry is taken for the entry (emulator_read_write_onepage()): a device access there. */
static int walk_without_table(struct ak_vcpu *v, u64 addr, enum ak_access access, struct ak_translation *t,
                              uintptr_t retaddr)
{
    if (v->delivering && v->table_fault) {
        v->event.injected = 0;
        v->env->old_exception = -1; /* the next is no double fault */
        ak_leave(v, AK_EXIT_KICKED, retaddr);
    }
    if (v->delivering) {
        v->exit.gpa = t->table_gpa;
        ak_leave(v, AK_EXIT_DELIVERY, retaddr);
    }
    if (access != AK_FETCH) {
        cpu_restore_state_x86_64(v->cpu, retaddr, true);
        if (!ak_kvm_emulates(v))
            ak_emulate_failed(v, 0);
        if (!((addr ^ t->table_gpa) & ~AK_PAGE_MASK) && ak_one_memory_operand(v)) {
            t->gpa = t->table_gpa & AK_PAGE_MASK;
            t->pfn = KVM_PFN_NOSLOT;
            return AK_WALK_OK;
        }
    }
    return AK_WALK_PF;
}

/* Replaces the engine's TLB fill: both stages, then one entry that allows no more than this access proved. */
_Bool x86_cpu_tlb_fill_x86_64(struct CPUState *cs, u64 addr, int size, int access, int mmu_idx, _Bool probe,
                              uintptr_t retaddr)
{
    struct ak_vcpu *v = ak_current;
    struct ak_translation t = {0};
    (void)size;
    v->fills++;
    v->interruptible = v->emulation == AK_NATIVE;
    int r = ak_walk(v, addr, access, mmu_idx, true, &t);
    if (__builtin_expect(r == AK_WALK_PF && t.no_table && !probe, 0))
        r = walk_without_table(v, addr, access, &t, retaddr);
    if (r == AK_WALK_OK && access == AK_READ && ak_answered(v, t.gpa)) {
        t.pfn = KVM_PFN_NOSLOT; /* the exit's answer counts, whatever the slots have become since */
    } else if (r == AK_WALK_OK && ak_data_pfn(v, t.gpa, access, &t) == KVM_PFN_OK) {
        int prot = access == AK_WRITE ? t.prot & 3 : access == AK_FETCH ? t.prot & 5 : 1;
        bool transient = v->emulation != AK_NATIVE && access != AK_FETCH;
        v->interruptible = 0;
        if (access == AK_FETCH)
            ak_check_code_page(v, t.hva);
        else if (transient && access == AK_WRITE && !probe)
            ak_write_check(v, t.gpa, retaddr);
        if (access != AK_FETCH && v->ring.size && !probe)
            ak_dirty_ring_check(v, retaddr);
        tlb_set_page_x86_64(cs, addr & AK_PAGE_MASK, t.hva, prot, mmu_idx, transient ? 1 : AK_PAGE_SIZE);
        return 1;
    }
    v->interruptible = 0;
    if (probe)
        return 0;
    if (access == AK_FETCH)
        before_fetch_fault(v);
    if (r == AK_WALK_GP)
        ak_raise(v, EXCP_GP, 0, retaddr);
    if (r == AK_WALK_PF) {
        v->env->cr[2] = addr;
        v->table_fault = t.no_table;
        ak_raise(v, EXCP_PF, (int)t.error_code, retaddr);
    }
    if (r == AK_WALK_STAGE2)
        fault_exit(v, &t, retaddr);
    bool device = t.pfn == KVM_PFN_NOSLOT || t.pfn == KVM_PFN_ERR_RO_FAULT;
    if (access == AK_FETCH) {
        if (!device)
            fault_exit(v, &t, retaddr);
        ak_emulate_failed(v, retaddr);
    }
    if (v->delivering && device) {
        v->exit.gpa = t.gpa | (addr & ~AK_PAGE_MASK);
        ak_leave(v, AK_EXIT_DELIVERY, retaddr);
    }
    if ((device || v->emulation != AK_NATIVE) && is_descriptor(v, addr, retaddr))
        ak_emulate_in_vain(v, retaddr);
    if (v->emulation == AK_NATIVE) {
        if (!device)
            fault_exit(v, &t, retaddr);
        if (!(addr & ~AK_PAGE_MASK)) /* maybe the second page of an access: the entry of the first may be stale */
            tlb_flush_x86_64(cs);
        v->emulate_gpa = t.gpa;
        ak_emulate_start(v, retaddr);
    }
    if (access == AK_READ && ak_locked_in_read_only_slot(v, addr, mmu_idx))
        v->emulate_reached = 1;
    if (!ak_emulate_reaches(v, t.gpa, device))
        fault_exit(v, &t, retaddr);
    /* KVM's emulator: whatever cannot be touched is a device page (ABI.md 0.9) */
    tlb_set_page_x86_64(cs, addr & AK_PAGE_MASK, AK_MMIO_WINDOW_BASE + t.gpa, access == AK_WRITE ? 2 : 1, mmu_idx, 1);
    return 1;
}

/* -- host faults in guest code ------------------------------------------------------------------------------------ */

/* Forget all translations and run the instruction again: the fill will meet its pages as they are now. A store that was
 * done in part must have been undone. */
void ak_restart(struct ak_vcpu *v, bool kick, uintptr_t retaddr)
{
    if (kick)
        ak_kick(v);
    if (v->emulation == AK_RUNNING) {
        v->emulation = AK_ARMED;
        v->nreplay = 0;
        v->cpu->cflags_next_tb = ak_alone_cflags(v);
    }
    v->translating = 0;
    tlb_flush_x86_64(v->cpu);
    if (!v->delivering)
        v->cpu->exception_index = -1;
    cpu_loop_exit_restore_x86_64(v->cpu, retaddr);
}

/* The host refused an access by guest code whose page was there when the TLB was filled: somebody changed the mapping
 * without telling anyone. The instruction is restarted. Called in the signal handler; does not return if the fault was
 * one of guest memory. */
bool ak_guest_host_fault(struct ak_vcpu *v, u64 address, enum ak_host_fault why, ucontext_t *context)
{
    uintptr_t pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP], retaddr = 0;
    if (why != AK_HOST_INTERRUPTED && !ak_is_guest_memory(v->vm, address))
        return false; /* again and again would not help (trap.c) */
    if (ak_in_code(v, pc))
        retaddr = pc + 2; /* the restore takes two bytes off a return address */
    else if (!v->translating && !v->delivering) {
        retaddr = ak_helper_return(v); /* a helper called by translated code */
        if (retaddr == v->load_site)
            retaddr = v->load_retaddr;
        if (!ak_in_code(v, retaddr))
            return false;
    }
    ak_restart(v, false, retaddr);
}
