/* guest_memfd: files of guest memory, and guest accesses to them. The file is a memfd which the caller has the
 * descriptor of and which is mapped here as well, so whatever the caller does to it (fallocate, a mapping of its own)
 * is seen by the guest at once. Sources: virt/kvm/guest_memfd.c; mmu.c:kvm_mmu_faultin_pfn(); ABI.md 2.1, 3.1, 4.4. */
#define _GNU_SOURCE
#include "engine.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct failure {
    u64 offset;
    int err;
};

struct ak_gmem {
    struct ak_gmem *next;
    u64 hva, size;
    int fd;              /* a description of our own, so that the caller's can end */
    volatile u32 closed; /* the caller's has ended */
    u32 nfailures;
    struct failure *failures; /* pages that cannot be had: injected */
};

static struct flock whole_file(short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET};
}

/* The caller's open file description carries a lock, which goes when its last descriptor and mapping have gone: the
 * moment of kvm_gmem_release(), however they were closed. */
bool ak_gmem_held(const struct ak_gmem *g)
{
    struct flock lock = whole_file(F_WRLCK);
    return fcntl(g->fd, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

/* The descriptor the file has here. */
int ak_gmem_fd(const struct ak_gmem *g)
{
    return g->fd;
}

/* Take the memfd fd, size bytes long, as guest memory of this VM; flags AK_GMEM_*. 0 or a negative errno. */
int ak_gmem_create(struct ak_vm *vm, int fd, u64 size, u32 flags, struct ak_gmem **result)
{
    struct flock lock = whole_file(F_WRLCK);
    char name[32];
    struct ak_gmem *g = ak_calloc(1, sizeof *g);
    if (!g)
        return -ENOMEM;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    g->fd = open(name, O_RDWR | O_CLOEXEC);
    void *at = MAP_FAILED;
    if (g->fd >= 0 && !fcntl(fd, F_OFD_SETLK, &lock))
        at = ak_injected_failure() ? MAP_FAILED
                                   : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, g->fd, 0);
    int r = at == MAP_FAILED ? -errno : ak_gmem_file_add(fd, size, flags);
    if (r) {
        if (at != MAP_FAILED)
            munmap(at, size);
        if (g->fd >= 0)
            close(g->fd);
        free(g);
        return r;
    }
    g->hva = (u64)at;
    g->size = size;
    ak_vm_pause(vm);
    g->next = vm->gmems;
    vm->gmems = g;
    ak_vm_resume(vm, false);
    *result = g;
    return 0;
}

/* kvm_gmem_release(): the slots bound to it have no file any more. */
void ak_gmem_destroy(struct ak_vm *vm, struct ak_gmem *g)
{
    ak_vm_pause(vm);
    for (u32 i = 0; i < vm->nslots; i++)
        if (vm->slots[i]->gmem == g)
            vm->slots[i]->gmem = NULL;
    for (struct ak_gmem **p = &vm->gmems; *p; p = &(*p)->next)
        if (*p == g) {
            *p = g->next;
            break;
        }
    ak_vm_resume(vm, true);
    munmap((void *)g->hva, g->size);
    ak_gmem_file_remove(g->fd);
    close(g->fd);
    free(g->failures);
    free(g);
}

/* Let the look-up of one page fail with err (EHWPOISON, ENOMEM, ...), or with 0 no longer: what needs a broken or an
 * exhausted machine. 0 or -ENOMEM. */
int ak_gmem_inject(struct ak_vm *vm, struct ak_gmem *g, u64 offset, int err)
{
    int r = 0;
    ak_vm_pause(vm);
    for (u32 i = 0; i < g->nfailures; i++)
        if (g->failures[i].offset == offset)
            g->failures[i--] = g->failures[--g->nfailures];
    if (err) {
        struct failure *grown = ak_realloc(g->failures, (g->nfailures + 1) * sizeof *grown);
        if (grown) {
            g->failures = grown;
            g->failures[g->nfailures++] = (struct failure){offset, err};
        } else
            r = -ENOMEM;
    }
    ak_vm_resume(vm, true);
    return r;
}

/* On entry to guest mode: a file that was closed without telling anybody is in no TLB any more. */
void ak_gmem_enter(struct ak_vcpu *v)
{
    struct ak_vm *vm = v->vm;
    for (struct ak_gmem *g = vm->gmems; g; g = g->next)
        if (!g->closed && !ak_gmem_held(g) && !__atomic_exchange_n(&g->closed, 1, __ATOMIC_SEQ_CST))
            __atomic_add_fetch(&vm->gmem_closings, 1, __ATOMIC_SEQ_CST);
    u32 closings = __atomic_load_n(&vm->gmem_closings, __ATOMIC_SEQ_CST);
    if (v->gmem_closings != closings) {
        v->gmem_closings = closings;
        ak_flush_tlb(v);
    }
}

#define INTERRUPTED 1

/* kvm_gmem_get_pfn(): 0 with the page's address here, a negative errno, or INTERRUPTED by a signal. The size cannot change, so what is wrong
 * with a page of the file can only be that it is poisoned or that there is no memory for it. */
static int get_pfn(struct ak_vcpu *v, const struct ak_slot *slot, u64 gfn, enum ak_access access, u64 *hva)
{
    struct ak_gmem *g = slot->gmem;
    u64 offset = slot->gmem_offset + ((gfn - slot->base_gfn) << 12);
    if (!g || g->closed || !ak_gmem_held(g))
        return -EFAULT;
    for (u32 i = 0; i < g->nfailures; i++)
        if (g->failures[i].offset == offset)
            return -g->failures[i].err;
    *hva = g->hva + offset;
    int why = ak_refused(v, AK_LOOKUP_GMEM, gfn << 12, access);
    if (why < 0)
        return why;
    if (!why)
        why = ak_host_touch(*hva, access == AK_WRITE, NULL);
    if (why == AK_HOST_INTERRUPTED)
        return INTERRUPTED;
    return !why ? 0 : why == AK_HOST_POISONED ? -EHWPOISON : -ENOMEM;
}

/* kvm_mmu_prepare_memory_fault_exit(), and the errno that goes with it. */
static bool memory_fault(struct ak_translation *t, int err, bool is_private)
{
    t->pfn = KVM_PFN_ERR_FAULT;
    t->err = err;
    t->annotate = 1;
    t->flags = is_private ? AK_MEMORY_EXIT_FLAG_PRIVATE : 0;
    return true;
}

/* The part of kvm_mmu_faultin_pfn() that is about privacy, in its order: the access against the attribute, no slot,
 * guest_memfd. False: an ordinary access. True: t->pfn is the result. slot may be NULL; t->is_private is the access's,
 * as ak_walk() found it, where the guest chooses; elsewhere the access follows the attribute. */
bool ak_gmem_faultin(struct ak_vcpu *v, const struct ak_slot *slot, u64 gfn, enum ak_access access,
                     struct ak_translation *t)
{
    const struct ak_vm *vm = v->vm;
    bool attribute = ak_gfn_is_private(vm, gfn), is_private = vm->private_gpa_mask ? t->is_private : attribute;
    t->not_shared = is_private || (slot && slot->gmem_only);
    t->annotate = 0;
    if (is_private != attribute)
        return memory_fault(t, -EFAULT, is_private);
    if (!t->not_shared)
        return false;
    if (!slot || !(slot->flags & AK_MEM_GUEST_MEMFD))
        return memory_fault(t, -EFAULT, is_private);
    int r = get_pfn(v, slot, gfn, access, &t->hva);
    if (r == INTERRUPTED) {
        t->pfn = KVM_PFN_ERR_SIGPENDING;
        return true;
    }
    if (r)
        return memory_fault(t, r, is_private);
    t->fault_hva = t->hva;
    t->pfn = KVM_PFN_OK;
    return true;
}

/* A data access of an instruction that may be emulated. Before the device access because of which KVM emulates at all,
 * what the processor cannot reach is its fault; what KVM then reads and writes is by userspace_addr. */
int ak_data_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t)
{
    int pfn = ak_faultin_pfn(v, gpa, access, t);
    if (!t->not_shared || v->emulation == AK_NATIVE || access == AK_FETCH)
        return pfn;
    if (!v->emulate_reached && (pfn != KVM_PFN_OK || v->emulate_gpa == ~0ull))
        return pfn;
    return ak_emulator_pfn(v, gpa, access, t);
}

/* Whether this host address is of a slot's memory, or of a guest_memfd's. In guest mode. */
bool ak_is_guest_memory(const struct ak_vm *vm, u64 hva)
{
    for (u32 i = 0; i < vm->nslots; i++)
        if (hva - vm->slots[i]->hva < vm->slots[i]->npages << 12)
            return true;
    for (const struct ak_gmem *g = vm->gmems; g; g = g->next)
        if (hva - g->hva < g->size)
            return true;
    return false;
}

/* Where the processor's own accesses find a guest page that has a slot: the file's page, or the caller's. 0: nowhere. */
u64 ak_gfn_to_hva(struct ak_vcpu *v, u64 gfn)
{
    const struct ak_slot *slot = ak_gfn_to_memslot(v->vm, gfn);
    if (!slot)
        return 0;
    if (!slot->gmem_only && !ak_gfn_is_private(v->vm, gfn))
        return slot->hva + ((gfn - slot->base_gfn) << 12);
    return slot->gmem ? slot->gmem->hva + slot->gmem_offset + ((gfn - slot->base_gfn) << 12) : 0;
}

/* kvm_arch_vcpu_pre_fault_memory(): what the page fault handler's answer means here. 0 or a negative errno. */
static int pre_fault_error(struct ak_vcpu *v, const struct ak_translation *t)
{
    if (t->annotate) {
        v->run->exit_reason = KVM_EXIT_MEMORY_FAULT;
        *ak_run_memory_fault(v->run) = (struct ak_memory_fault){.flags = t->flags, .gpa = t->gpa, .size = AK_PAGE_SIZE};
        return t->err;
    }
    if (t->pfn == KVM_PFN_ERR_HWPOISON) {
        v->exit.hva = t->fault_hva;
        ak_send_hwpoison_signal(v);
        return -EINTR;
    }
    if (t->pfn == KVM_PFN_ERR_SIGPENDING) { /* kvm_handle_signal_exit() */
        v->run->exit_reason = KVM_EXIT_INTR;
        return -EINTR;
    }
    if (t->pfn == KVM_PFN_NOSLOT || t->pfn == KVM_PFN_ERR_RO_FAULT)
        return -ENOENT;
    return t->pfn == KVM_PFN_OK ? 0 : -EFAULT;
}

/* AK_STALE_PRE_FAULT: KVM 6.12 does not reload the page tables that the deletion of a slot has made obsolete, so a page, or
 * its want of a slot, is RET_PF_RETRY (is_page_fault_stale()), again and again until there is a signal. That is waited for. */
static int retried_in_vain(struct ak_vcpu *v)
{
    const struct timespec while_nothing = {.tv_nsec = 1000000};
    while (!ak_signal_pending(v) && !v->vm->dead)
        nanosleep(&while_nothing, NULL);
    return -EINTR;
}

/* One page, during which slots wait. 0 or a negative errno. */
static int pre_fault_page(struct ak_vcpu *v, u64 gpa)
{
    struct ak_translation t = {0};
    if (ak_signal_pending(v))
        return -EINTR;
    ak_guest_enter(v); /* for each page: who changes slots need not wait for all of them */
    v->in_guest = 1;
    ak_ticker_arm(v);
    ak_current = v;
    v->interruptible = 1;
    t.is_private = ak_gfn_is_private(v->vm, gpa >> 12);
    ak_faultin_pfn(v, gpa, AK_READ, &t);
    v->interruptible = 0;
    ak_current = NULL;
    v->in_guest = 0;
    ak_guest_exit(v);
    if (v->pokes != v->pokes_seen)
        ak_pokes_settle(v);
    int r = pre_fault_error(v, &t);
    bool stale = (v->behaviour & AK_STALE_PRE_FAULT) && v->zaps != v->vm->zaps;
    return stale && (!r || r == -ENOENT) ? retried_in_vain(v) : r;
}

/* KVM_PRE_FAULT_MEMORY, kvm_vcpu_pre_fault_memory(): gpa and size of the request are moved past what was done, and all of
 * it goes back to the caller's structure at user. 0 if anything was done, else the negative errno of the first page. A page
 * that fails on the way with an annotation leaves it in kvm_run, also when the result is 0; so does a signal that comes
 * while it waits for a page. It reads, and follows the attributes. */
int ak_pre_fault_memory(struct ak_vcpu *v, struct ak_pre_fault_memory *range, u64 user)
{
    u64 size = range->size, mask = ak_signals_defer(); /* one that comes while it waits for the vCPU is pending then */
    int r = ak_vcpu_lock(v);
    if (r) {
        ak_signals_restore(mask);
        return r;
    }
    ak_signals_enter(v);
    v->outer_mask = v->active_mask = mask; /* KVM_SET_SIGNAL_MASK is for KVM_RUN */
    while (range->size && !(r = pre_fault_page(v, range->gpa))) {
        range->gpa += AK_PAGE_SIZE;
        range->size -= AK_PAGE_SIZE;
    }
    ak_signals_leave(v);
    ak_vcpu_unlock(v);
    if (ak_copy_out(user, range, sizeof *range))
        return -EFAULT;
    return range->size == size ? r : 0;
}
