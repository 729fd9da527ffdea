/* One engine instance per vCPU: create it, enter it, get it out again. cpu_exec() is called directly: uc_emu_start()
 * clears a stop that came just before it, and runs hooks nobody has. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unicorn/unicorn.h>

__thread struct ak_vcpu *ak_current __attribute__((tls_model("initial-exec")));
static uintptr_t jit_slot_offset; /* from ak_enter's frame down to the return address of a helper that translated code calls */

extern void ak_unaligned_access(struct CPUState *, u64, int, int, uintptr_t);

static u64 device_stub_read(uc_engine *uc, u64 offset, unsigned size, void *user)
{
    (void)uc, (void)offset, (void)size, (void)user;
    return 0; /* never called: the dispatch is replaced (emulate.c) */
}

static void device_stub_write(uc_engine *uc, u64 offset, unsigned size, u64 value, void *user)
{
    (void)uc, (void)offset, (void)size, (void)value, (void)user;
}

static bool open_engine(struct ak_vcpu *v)
{
    uc_engine *uc = NULL;
    uc_hook hook;
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &uc) != UC_ERR_OK)
        return false;
    v->uc = (struct uc_struct *)uc;
    if (uc_ctl_set_cpu_model(uc, UC_CPU_X86_EPYC_ROME) || uc_ctl_set_tcg_buffer_size(uc, AK_CODE_SIZE) ||
        uc_ctl_exits_enable(uc) ||
        uc_mem_map_ptr(uc, AK_HOST_WINDOW_BASE, AK_HOST_WINDOW_SIZE, UC_PROT_ALL, (void *)AK_HOST_WINDOW_BASE) ||
        uc_mmio_map(uc, AK_MMIO_WINDOW_BASE, AK_MMIO_WINDOW_SIZE, device_stub_read, NULL, device_stub_write, NULL) ||
        uc_hook_add(uc, &hook, UC_HOOK_INTR, (void *)ak_event_hook, NULL, 1, 0))
        return false;
    v->cpu = v->uc->cpu;
    v->env = v->cpu->env_ptr;
    v->uc->stop_interrupt = NULL; /* #UD goes the way of all exceptions */
    v->cpu->cc->do_unaligned_access = (void *)ak_unaligned_access;
    v->uc->nested_level = 1;
    return true;
}

/* Make the engine of a vCPU, on its heap. False: it would have ended the process. */
static bool make_engine(struct ak_vcpu *v)
{
    struct ak_heap *outer = ak_heap;
    sigjmp_buf landing;
    volatile bool made = false;
    ak_heap = v->heap;
    if (!sigsetjmp(landing, 0)) {
        v->heap->landing = &landing;
        made = open_engine(v);
        if (made)
            ak_vcpu_reset(v);
    }
    v->heap->landing = NULL;
    ak_heap = outer;
    return made;
}

/* kvm_vm_ioctl_create_vcpu(). 0 or -ENOMEM. All memory that the vCPU will use is taken here. */
int ak_vcpu_create(struct ak_vm *vm, u32 id, struct kvm_run *run, struct ak_vcpu **result)
{
    struct ak_vcpu *v = ak_calloc(1, sizeof *v);
    if (!v)
        return -ENOMEM;
    v->vm = vm;
    v->id = id;
    v->run = run;
    if (ak_heap_create(&v->heap)) {
        free(v);
        return -ENOMEM;
    }
    if (!make_engine(v)) {
        ak_heap_destroy(v->heap);
        free(v);
        return -ENOMEM;
    }
    v->heap->vcpu = v;
    pthread_mutex_init(&v->mutex, NULL);
    v->sync_supported = KVM_SYNC_X86_VALID_FIELDS;
    ak_watch(v);
    pthread_mutex_lock(&vm->lock);
    v->next = vm->vcpus;
    vm->vcpus = v;
    vm->nvcpus++;
    pthread_mutex_unlock(&vm->lock);
    *result = v;
    return 0;
}

/* The engine is not closed: all that it has is memory of its heap. */
void ak_vcpu_destroy(struct ak_vcpu *v)
{
    struct ak_vm *vm = v->vm;
    ak_unwatch(v);
    pthread_mutex_lock(&vm->lock);
    for (struct ak_vcpu **p = &vm->vcpus; *p; p = &(*p)->next)
        if (*p == v) {
            *p = v->next;
            vm->nvcpus--;
            break;
        }
    pthread_mutex_unlock(&vm->lock);
    ak_heap_destroy(v->heap);
    free(v->cpuid);
    free(v);
}

/* kvm_vcpu_reset(), what RESET and INIT have in common: AMD APM vol. 2, 14.1.3. */
static void reset_or_init(struct ak_vcpu *v)
{
    struct CPUX86State *env = v->env;
    u32 leaf[4];
    memset(env->regs, 0, sizeof env->regs);
    ak_cpuid(v, 1, 0, leaf);
    env->regs[R_EDX] = leaf[0] ? leaf[0] : 0x600; /* the processor's signature */
    env->eip = 0xfff0;
    env->eflags = 2;
    env->hflags = 0;
    env->hflags2 = HF2_GIF_MASK;
    env->a20_mask = -1;
    for (int i = 0; i < 6; i++)
        env->segs[i] = (struct SegmentCache){.limit = 0xffff, .flags = DESC_P | DESC_S | DESC_RW | DESC_A};
    env->segs[R_CS] = (struct SegmentCache){
        .selector = 0xf000, .base = 0xffff0000, .limit = 0xffff, .flags = DESC_P | DESC_S | DESC_CS | DESC_RW | DESC_A};
    env->ldt = (struct SegmentCache){.limit = 0xffff, .flags = DESC_P | 2 << 8};
    env->tr = (struct SegmentCache){.limit = 0xffff, .flags = DESC_P | 9 << 8};
    env->gdt = env->idt = (struct SegmentCache){.limit = 0xffff};
    memset(env->cr, 0, sizeof env->cr);
    env->cr[0] = 0x60000010;
    env->efer = 0;
    memset(env->dr, 0, sizeof env->dr);
    env->dr[6] = 0xffff0ff0;
    env->dr[7] = 0x400;
    env->old_exception = -1;
    v->event = (struct ak_event){0};
    v->cr8 = 0;
    ak_update_hflags(v);
    tlb_flush_x86_64(v->cpu);
}

void ak_vcpu_reset(struct ak_vcpu *v)
{
    struct kvm_fpu fpu = {.fcw = 0x37f, .mxcsr = 0x1f80}; /* fpu_init_fpstate_user(): not what a processor resets to */
    reset_or_init(v);
    v->env->xcr0 = 1;
    v->env->pat = 0x0007040600070406ull;
    v->msr = (struct ak_msr_state){.apic_base = 0xfee00800 | (v->id ? 0 : 0x100), .misc_enable = 1, .bios_sign_id = 0x1000065};
    ak_set_fpu(v, &fpu);
}

/* After a triple fault SVM's state is undefined, so KVM gives the vCPU an INIT (shutdown_interception()). It keeps the
 * cache bits of CR0, CR8, the FPU and the MSRs, and whether NMIs are blocked. */
static void init_after_shutdown(struct ak_vcpu *v)
{
    u64 cache = v->env->cr[0] & (CR0_CD | CR0_NW);
    u64 cr8 = v->cr8;
    u32 blocked = v->env->hflags2 & HF2_NMI_MASK;
    u8 irq_vector = v->event.irq_vector; /* kvm_clear_interrupt_queue() */
    reset_or_init(v);
    v->cr8 = cr8;
    v->event.irq_vector = irq_vector;
    v->env->cr[0] = cache | 0x10;
    v->env->hflags2 |= blocked;
}

/* Leave guest code for the contract, the state restored to the instruction that translated code was in. */
void ak_leave(struct ak_vcpu *v, u32 kind, uintptr_t retaddr)
{
    v->exit.kind = kind;
    v->translating = 0;
    v->cpu->exception_index = EXCP_INTERRUPT;
    cpu_loop_exit_restore_x86_64(v->cpu, retaddr);
}

/* Translated code keeps a constant stack pointer, so the return address of a helper it calls stands at a fixed distance
 * from ak_enter's frame. Found once, by the self-test's OUT; a host fault inside a helper needs it (fault.c). */
void ak_note_helper_frame(struct ak_vcpu *v, uintptr_t return_slot)
{
    if (!jit_slot_offset)
        jit_slot_offset = v->frame - return_slot;
}

uintptr_t ak_helper_return(const struct ak_vcpu *v)
{
    return jit_slot_offset ? *(uintptr_t *)(v->frame - jit_slot_offset) : 0;
}

static void __attribute__((noinline)) enter(struct ak_vcpu *v)
{
    struct CPUState *cpu = v->cpu;
    v->exit.kind = AK_EXIT_NONE;
    v->uc->invalid_error = 0;
    v->uc->stop_request = v->uc->quit_request = 0;
    v->uc->size_recur_mem = 0;
    v->translating = 0;
    v->kick = 0;
    cpu->stopped = 0;
    cpu->halted = 0;
    cpu->exception_index = -1;
    v->frame = (uintptr_t)__builtin_frame_address(0);
    ak_current = v;
    v->interruptible = 1;
    if (__builtin_expect(v->heap->low, 0))
        ak_forget_code(v);
    ak_check_code(v);
    v->interruptible = 0;
    ak_deliver_pending(v);
    int r = cpu_exec_x86_64(v->uc, cpu);
    if (v->delivering)
        ak_delivery_failed(v);
    if (v->exit.kind == AK_EXIT_SHUTDOWN) { /* an instruction that was being emulated has ended too */
        v->emulation = AK_NATIVE;
        v->emulate_alone = 0;
        v->nlog = v->nreplay = v->nfragments = 0;
    }
    if (v->exit.kind == AK_EXIT_SHUTDOWN && (v->behaviour & AK_INIT_AFTER_SHUTDOWN))
        init_after_shutdown(v);
    if (v->exit.kind == AK_EXIT_DELIVERY && (v->behaviour & AK_EMULATE_IN_DELIVERY))
        ak_emulate_instead(v);
    if (v->exit.kind == AK_EXIT_NONE)
        v->exit.kind = r == EXCP_HLT ? AK_EXIT_HLT : AK_EXIT_KICKED;
    if (v->exit.kind == AK_EXIT_MMIO && v->nfragments && !v->fragment)
        ak_next_fragment(v);
    ak_current = NULL;
}

/* The engine gave up in the middle of something. What it has cannot be relied on: the vCPU keeps its registers, and no more. */
static void failed(struct ak_vcpu *v)
{
    ak_current = NULL;
    v->broken = 1;
    v->interruptible = v->translating = v->delivering = v->emulation = 0;
    v->nlog = v->nreplay = v->nfragments = 0;
    v->exit.kind = AK_EXIT_ENGINE;
}

/* Run guest code until there is something to say; the reason is v->exit.kind. The caller holds the vCPU's lock. */
void ak_enter(struct ak_vcpu *v)
{
    sigjmp_buf landing;
    struct ak_heap *h = v->heap;
    const struct ak_float thread = ak_float_enter();
    if (sigsetjmp(landing, 0)) {
        ak_heap->landing = NULL;
        failed(ak_heap->vcpu);
    } else {
        h->landing = &landing;
        enter(v);
        h->landing = NULL;
    }
    ak_float_leave(thread);
}

/* Make the vCPU leave guest code at the next block boundary. Any thread; safe in a signal handler. */
void ak_kick(struct ak_vcpu *v)
{
    v->cpu->exit_request = 1;
    __sync_synchronize();
    v->cpu->icount_decr_ptr->u16.high = 0xffff;
}

void ak_flush_tlb(struct ak_vcpu *v)
{
    tlb_flush_x86_64(v->cpu);
}
