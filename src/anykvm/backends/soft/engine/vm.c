/* A VM: its life, its settings, the update of its slots; and guest mode, which an update waits to end. A VM belongs to the
 * process that made it: in a child of fork() it is another mm's. */
#include "engine_internal.h"
#include <errno.h>
#include <stdlib.h>
#include <time.h>

/* -- life ----------------------------------------------------------------------------------------------------------- */

static u32 mm_generation = 1;

static void in_child(void)
{
    mm_generation++; /* VMs of the parent are another mm's: EIO */
    ak_signals_in_child();
    ak_ticker_in_child();
    ak_devices_in_child();
    ak_gmem_files_in_child();
}

static void __attribute__((constructor)) watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

u32 ak_mm_generation(void)
{
    return mm_generation;
}

struct ak_vm *ak_vm_create(void)
{
    struct ak_vm *vm = ak_calloc(1, sizeof *vm);
    struct timespec t;
    if (!vm)
        return NULL;
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->changed, NULL);
    clock_gettime(CLOCK_MONOTONIC, &t);
    vm->tsc_boot_ns = (u64)t.tv_sec * 1000000000ull + (u64)t.tv_nsec;
    vm->mm = ak_mm_generation();
    vm->tsc_khz = 1000000; /* 1 GHz: one tick a nanosecond */
    return vm;
}

void ak_vm_destroy(struct ak_vm *vm)
{
    for (u32 i = 0; i < vm->nslots; i++)
        ak_slot_free(vm->slots[i]);
    free(vm->slots);
    free(vm->slots_by_id);
    free(vm->poisoned);
    free(vm->private_ranges);
    pthread_mutex_destroy(&vm->lock);
    pthread_cond_destroy(&vm->changed);
    free(vm);
}

/* km:kvm_vm_ioctl(): another mm, or a dead VM. 0 or -EIO. */
int ak_vm_dead(const struct ak_vm *vm)
{
    return vm->dead || vm->mm != ak_mm_generation() ? -EIO : 0;
}

/* kvm_vm_dead(): every ioctl of the VM and its vCPUs is EIO from now on. */
void ak_vm_kill(struct ak_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->dead = 1;
    for (struct ak_vcpu *v = vm->vcpus; v; v = v->next)
        ak_kick(v);
    pthread_mutex_unlock(&vm->lock);
}

/* km:kvm_vcpu_ioctl: another mm, or a dead VM; for KVM_RUN also an engine that has failed. */
int ak_vcpu_dead(struct ak_vcpu *v)
{
    return v->broken ? -EIO : ak_vm_dead(v->vm);
}

/* vcpu->mutex. What the engine allocates on this thread is this vCPU's from now on. 0, or -EDEADLK: from inside a device's
 * fault handler that the vCPU's VM waits for. */
int ak_vcpu_lock(struct ak_vcpu *v)
{
    if (__builtin_expect(ak_device_deadlock(v->vm), 0))
        return -EDEADLK;
    int r = pthread_mutex_lock(&v->mutex);
    v->outer_heap = ak_heap;
    ak_heap = v->heap;
    return -r;
}

void ak_vcpu_unlock(struct ak_vcpu *v)
{
    ak_heap = v->outer_heap;
    pthread_mutex_unlock(&v->mutex);
}

/* -- settings and slots ---------------------------------------------------------------------------------------------- */

/* The guests' TSC frequency; before the first vCPU. */
void ak_vm_set_tsc_khz(struct ak_vm *vm, u64 khz)
{
    vm->tsc_khz = khz;
}

/* What a new VM has from its type, the bit of guest addresses by which the guest says what is private, or 0; and from its
 * profile. */
void ak_vm_configure(struct ak_vm *vm, u64 private_gpa_mask, u32 map_writable)
{
    vm->private_gpa_mask = private_gpa_mask;
    vm->map_writable = map_writable;
}

/* KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL): a bit for each hypercall that user space answers. */
void ak_vm_set_hypercall_exits(struct ak_vm *vm, u64 mask)
{
    vm->hypercall_exits = mask;
}

static int replace(struct ak_vm *vm, const struct ak_slot *old, const struct ak_slot *new)
{
    if (old && new && old->base_gfn == new->base_gfn)
        return ak_slot_flags(vm, new->base_gfn, new->id, new->flags, new->dirty_bitmap);
    struct ak_slot *prepared = new ? ak_slot_prepare(vm, new) : NULL; /* what can fail comes first */
    if (new && !prepared)
        return -ENOMEM;
    int r = old ? ak_slot_remove(vm, old->base_gfn, old->id) : 0;
    if (prepared && !r)
        ak_slot_link(vm, prepared);
    else if (prepared)
        ak_slot_free(prepared);
    return r;
}

/* kvm_set_memslot(): create (no old), delete (no new), move or change the flags of one slot while no vCPU is in guest
 * mode; afterwards none has a translation of before. 0 or a negative errno, and then nothing has changed. */
int ak_set_memslot(struct ak_vm *vm, const struct ak_slot *old, const struct ak_slot *new)
{
    ak_vm_pause(vm);
    int r = replace(vm, old, new);
    ak_vm_resume(vm, true);
    return r;
}

/* -- guest mode: updates to what a TLB fill reads wait until no vCPU is in it ---------------------------------------- */

/* What an update asked for (ak_vm_resume()), before guest code runs again. */
void ak_flush_pending(struct ak_vcpu *v)
{
    if (v->tlb_flush_pending) {
        v->tlb_flush_pending = NULL;
        tlb_flush_x86_64(v->cpu);
    }
}

bool ak_guest_enter(struct ak_vcpu *v)
{
    struct ak_vm *vm = v->vm;
    __atomic_add_fetch(&vm->in_guest, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&vm->paused, __ATOMIC_SEQ_CST)) {
        ak_guest_exit(v);
        pthread_mutex_lock(&vm->lock);
        while (vm->paused)
            pthread_cond_wait(&vm->changed, &vm->lock);
        pthread_mutex_unlock(&vm->lock);
        __atomic_add_fetch(&vm->in_guest, 1, __ATOMIC_SEQ_CST);
    }
    ak_flush_pending(v);
    if (__builtin_expect(vm->gmems != NULL, 0))
        ak_gmem_enter(v);
    return true;
}

void ak_guest_exit(struct ak_vcpu *v)
{
    struct ak_vm *vm = v->vm;
    __atomic_sub_fetch(&vm->in_guest, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&vm->paused, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&vm->lock);
        pthread_cond_broadcast(&vm->changed);
        pthread_mutex_unlock(&vm->lock);
    }
}

void ak_vm_pause(struct ak_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    while (vm->paused) /* one updater at a time */
        pthread_cond_wait(&vm->changed, &vm->lock);
    __atomic_store_n(&vm->paused, 1, __ATOMIC_SEQ_CST);
    for (struct ak_vcpu *v = vm->vcpus; v; v = v->next)
        ak_kick(v);
    while (__atomic_load_n(&vm->in_guest, __ATOMIC_SEQ_CST))
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
}

void ak_vm_resume(struct ak_vm *vm, bool flush)
{
    pthread_mutex_lock(&vm->lock);
    if (flush)
        for (struct ak_vcpu *v = vm->vcpus; v; v = v->next)
            v->tlb_flush_pending = v;
    __atomic_store_n(&vm->paused, 0, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}
