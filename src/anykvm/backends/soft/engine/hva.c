/* A host virtual address, asked for as KVM asks: km:hva_to_pfn(). The host's MMU answers. What it refuses may be memory
 * that answers for itself: a page that was made to count as poisoned, without root and without harm to anybody else, or a
 * device's mapping (VM_IO, VM_PFNMAP) whose fault handler is asked, as km:hva_to_pfn_remapped() does. Asking costs
 * nothing where the host does not refuse. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* -- poison --------------------------------------------------------------------------------------------------------- */

static bool is_poisoned(const struct ak_vm *vm, u64 hva)
{
    for (u32 i = 0; i < vm->npoisoned; i++)
        if (vm->poisoned[i] == (hva & AK_PAGE_MASK))
            return true;
    return false;
}

/* Let a host page count as poisoned for this VM's guests, or no longer: what MADV_HWPOISON does, without being root.
 * Nobody can touch the page meanwhile; who maps another page over it has lifted the poison. 0, -ENOMEM (not mapped, or
 * no memory for the list). Takes effect for every vCPU before it returns. */
int ak_poison(struct ak_vm *vm, u64 hva, bool poisoned)
{
    int r = 0;
    hva &= AK_PAGE_MASK;
    ak_vm_pause(vm);
    u64 *grown = ak_realloc(vm->poisoned, (vm->npoisoned + 1) * sizeof *grown);
    if (grown)
        vm->poisoned = grown;
    else if (poisoned)
        r = -ENOMEM;
    if (!r && mprotect((void *)hva, AK_PAGE_SIZE, poisoned ? PROT_NONE : PROT_READ | PROT_WRITE))
        r = -errno;
    for (u32 i = 0; !r && i < vm->npoisoned; i++)
        if (vm->poisoned[i] == hva)
            vm->poisoned[i--] = vm->poisoned[--vm->npoisoned];
    if (poisoned && !r)
        vm->poisoned[vm->npoisoned++] = hva;
    ak_vm_resume(vm, true);
    return r;
}

/* -- device mappings: of the process, as VMAs are --------------------------------------------------------------------- */

static struct range {
    u64 start, end;
} *devices;
static u32 ndevices, devices_room;
static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;
static int (*device_fault)(u64 hva, u32 access);

/* Fault handlers that this thread is inside of. */
static __thread u32 device_depth __attribute__((tls_model("initial-exec")));

/* What to call for a device page that is not there: AK_DEVICE_*. It may take the interpreter's lock. */
void ak_device_handler(ak_device_fault *fault)
{
    device_fault = fault;
}

/* Let a range of host addresses be a device's. 0 or -ENOMEM. */
int ak_device_add(u64 start, u64 size)
{
    int r = 0;
    pthread_mutex_lock(&devices_lock);
    if (ndevices == devices_room) {
        u32 room = devices_room ? devices_room * 2 : 16;
        struct range *grown = ak_realloc(devices, room * sizeof *grown);
        if (grown) {
            devices = grown;
            devices_room = room;
        } else
            r = -ENOMEM;
    }
    if (!r)
        devices[ndevices++] = (struct range){start, start + size};
    pthread_mutex_unlock(&devices_lock);
    return r;
}

void ak_device_remove(u64 start)
{
    pthread_mutex_lock(&devices_lock);
    for (u32 i = 0; i < ndevices; i++)
        if (devices[i].start == start) {
            devices[i] = devices[--ndevices];
            break;
        }
    pthread_mutex_unlock(&devices_lock);
}

void ak_devices_in_child(void)
{
    pthread_mutex_init(&devices_lock, NULL); /* another thread may have held it */
}

static bool is_device(u64 hva)
{
    bool found = false;
    if (!__atomic_load_n(&ndevices, __ATOMIC_ACQUIRE))
        return false;
    pthread_mutex_lock(&devices_lock);
    for (u32 i = 0; i < ndevices && !found; i++)
        found = hva >= devices[i].start && hva < devices[i].end;
    pthread_mutex_unlock(&devices_lock);
    return found;
}

/* fixup_user_fault() and the second follow_pfnmap_start(): the handler made the page present, or it failed, or what is
 * present may only be read. It runs as in the kernel, inside the fault: slots wait for it, signals do not end it. */
static u32 ask_device(struct ak_vcpu *v, u64 hva, enum ak_access access)
{
    struct ak_vcpu *current = ak_current;
    ak_current = NULL; /* a crash in there is not the guest's */
    __atomic_add_fetch(&v->vm->device_faults, 1, __ATOMIC_SEQ_CST);
    device_depth++;
    int answer = device_fault(hva & AK_PAGE_MASK, access);
    device_depth--;
    __atomic_sub_fetch(&v->vm->device_faults, 1, __ATOMIC_SEQ_CST);
    ak_current = current;
    if (answer & AK_DEVICE_RAISED)
        v->device_raised = true;
    answer &= ~AK_DEVICE_RAISED;
    if (answer == AK_DEVICE_INTERRUPTED) {
        v->device_interrupted = true;
        if (v->emulation == AK_NATIVE)
            return KVM_PFN_ERR_SIGPENDING; /* as if a signal had come: the instruction is executed again */
    }
    return answer == AK_DEVICE_PRESENT     ? KVM_PFN_OK
           : answer == AK_DEVICE_READ_ONLY ? KVM_PFN_ERR_RO_FAULT
                                           : KVM_PFN_ERR_FAULT;
}

/* A device's fault handler must not wait for a VM of which a vCPU waits for such a handler: its own, or another whose handler
 * may wait for ours. True: this thread is in a handler, and vm is such a VM. */
bool ak_device_deadlock(const struct ak_vm *vm)
{
    return device_depth && ak_vm_in_device_fault(vm);
}

/* Whether a vCPU of the VM is in a device's fault handler. */
bool ak_vm_in_device_fault(const struct ak_vm *vm)
{
    return __atomic_load_n(&vm->device_faults, __ATOMIC_SEQ_CST) != 0;
}

/* Whether a fault handler has raised an exception since the vCPU last entered KVM_RUN (ak_signals_enter). */
bool ak_device_raised(const struct ak_vcpu *v)
{
    return v->device_raised;
}

/* -- both ------------------------------------------------------------------------------------------------------------- */

/* The host refused an access for the reason in *host_fault: what KVM makes of it. KVM_PFN_OK: try again. */
u32 ak_hva_refused(struct ak_vcpu *v, u64 hva, enum ak_access access, u32 *host_fault)
{
    if (*host_fault == AK_HOST_INTERRUPTED)
        return KVM_PFN_ERR_SIGPENDING;
    if (v->vm->npoisoned && is_poisoned(v->vm, hva))
        *host_fault = AK_HOST_POISONED;
    if (*host_fault == AK_HOST_POISONED)
        return KVM_PFN_ERR_HWPOISON;
    return is_device(hva) ? ask_device(v, hva, access) : KVM_PFN_ERR_FAULT;
}

/* hva_to_pfn(): enum ak_pfn, and why in *host_fault. Never KVM_PFN_NOSLOT. */
u32 ak_hva_to_pfn(struct ak_vcpu *v, u64 hva, enum ak_access access, u32 *host_fault)
{
    for (u32 tries = 0; (*host_fault = (u32)ak_host_touch(hva, access == AK_WRITE, NULL)); tries++) {
        u32 pfn = ak_hva_refused(v, hva, access, host_fault);
        if (pfn != KVM_PFN_OK)
            return pfn;
        if (tries == AK_DEVICE_TRIES)
            return KVM_PFN_ERR_FAULT;
    }
    return KVM_PFN_OK;
}
