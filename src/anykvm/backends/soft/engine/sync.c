/* What KVM_RUN reads from and writes to the shared kvm_run page. run.py decides; these move the bytes. */
#include "engine_internal.h"
#include <errno.h>
#include <string.h>

#define KVM_HYPERCALL_UNKNOWN ((u64)-1000) /* KVM_ENOSYS */
#define KVM_HYPERCALL_DENIED ((u64)-1)     /* KVM_EPERM */
#define HYPERCALL_LONG_MODE 1ull           /* KVM_EXIT_HYPERCALL_LONG_MODE */

int ak_set_events(struct ak_vcpu *v, const struct kvm_vcpu_events *events);
void ak_get_events(struct ak_vcpu *v, struct kvm_vcpu_events *events);

/* x86:sync_regs(): take over the register sets user space marked dirty. Any refusal is -EINVAL. */
int ak_sync_regs(struct ak_vcpu *v)
{
    struct kvm_run *run = v->run;
    const struct kvm_sync_regs *s = &run->s.regs;
    if (run->kvm_dirty_regs & KVM_SYNC_X86_REGS) {
        ak_set_regs(v, &s->regs);
        run->kvm_dirty_regs &= ~(u64)KVM_SYNC_X86_REGS;
    }
    if (run->kvm_dirty_regs & KVM_SYNC_X86_SREGS) {
        struct kvm_sregs copy = s->sregs; /* the page may change under us */
        if (ak_set_sregs(v, &copy))
            return -EINVAL;
        run->kvm_dirty_regs &= ~(u64)KVM_SYNC_X86_SREGS;
    }
    if (run->kvm_dirty_regs & KVM_SYNC_X86_EVENTS) {
        struct kvm_vcpu_events copy = s->events;
        if (ak_set_events(v, &copy))
            return -EINVAL;
        run->kvm_dirty_regs &= ~(u64)KVM_SYNC_X86_EVENTS;
    }
    return 0;
}

/* x86:store_regs(), on errors too. */
void ak_store_regs(struct ak_vcpu *v)
{
    struct kvm_run *run = v->run;
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS)
        ak_get_regs(v, &run->s.regs.regs);
    if (run->kvm_valid_regs & KVM_SYNC_X86_SREGS)
        ak_get_sregs(v, &run->s.regs.sregs);
    if (run->kvm_valid_regs & KVM_SYNC_X86_EVENTS)
        ak_get_events(v, &run->s.regs.events);
}

/* The userspace task priority: kvm_set_cr8(). */
int ak_set_cr8(struct ak_vcpu *v)
{
    if (v->run->cr8 > 15)
        return -EINVAL;
    v->cr8 = v->run->cr8;
    return 0;
}

/* kvm_vcpu_ready_for_interrupt_injection() */
static bool ready_for_interrupt_injection(struct ak_vcpu *v)
{
    const struct ak_event *e = &v->event;
    return ak_interrupt_allowed(v) && !e->irq_injected && !e->nmi_injected && !e->injected && !e->pending;
}

void ak_post_kvm_run_save(struct ak_vcpu *v)
{
    struct kvm_run *run = v->run;
    run->if_flag = !!(v->env->eflags & RFLAGS_IF);
    run->cr8 = v->cr8;
    run->apic_base = v->msr.apic_base;
    run->ready_for_interrupt_injection = ready_for_interrupt_injection(v);
}

bool ak_irq_window(struct ak_vcpu *v)
{
    return v->run->request_interrupt_window && ready_for_interrupt_injection(v);
}

void ak_fill_memory_fault(struct ak_vcpu *v)
{
    *ak_run_memory_fault(v->run) = (struct ak_memory_fault){.flags = v->exit.flags, .gpa = v->exit.gpa, .size = v->exit.size};
}

void ak_exit_mmio(struct ak_vcpu *v)
{
    struct kvm_run *run = v->run;
    run->mmio.phys_addr = v->exit.gpa;
    run->mmio.len = v->exit.size;
    run->mmio.is_write = (u8)v->exit.is_write;
    if (v->exit.is_write)
        memcpy(run->mmio.data, &v->exit.data, v->exit.size < 8 ? v->exit.size : 8);
}

void ak_exit_io(struct ak_vcpu *v)
{
    struct kvm_run *run = v->run;
    run->io.direction = v->exit.is_write ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
    run->io.size = (u8)v->exit.size;
    run->io.port = (u16)v->exit.port;
    run->io.count = v->exit.count;
    run->io.data_offset = 4096;
}


/* prepare_emulation_failure_exit(): a word of flags, the instruction's bytes if they can be had, then what the processor
 * says of its exit: nothing here. kvm_prepare_event_vectoring_exit(). */
void ak_exit_internal(struct ak_vcpu *v, u32 suberror)
{
    struct kvm_run *run = v->run;
    u8 bytes[15];
    u32 size;
    memset(run->internal.data, 0, sizeof run->internal.data);
    run->internal.suberror = suberror;
    run->internal.ndata = suberror == KVM_INTERNAL_ERROR_DELIVERY_EV ? 5 : 6;
    if (suberror == KVM_INTERNAL_ERROR_DELIVERY_EV)
        run->internal.data[3] = v->exit.gpa;
    else if (v->exit.kind != AK_EXIT_ENGINE && (size = ak_instruction_bytes(v, bytes))) {
        run->emulation_failure.insn_size = (u8)size;
        memset(run->emulation_failure.insn_bytes, 0x90, sizeof run->emulation_failure.insn_bytes); /* the kernel's filling */
        memcpy(run->emulation_failure.insn_bytes, bytes, size);
        run->emulation_failure.flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
        run->internal.ndata = 8;
    }
}

/* complete_hypercall_exit(): the result, and the instruction (VMCALL or VMMCALL) is done. */
static void finish_hypercall(struct ak_vcpu *v, u64 result)
{
    v->env->regs[R_EAX] = v->env->hflags & HF_CS64_MASK ? result : (u32)result;
    v->env->eip += 3;
}

void ak_complete_hypercall(struct ak_vcpu *v)
{
    finish_hypercall(v, ak_run_hypercall(v->run)->ret);
}

/* kvm_emulate_hypercall(). True: KVM_HC_MAP_GPA_RANGE (gpa, pages, attributes), and user space asked to answer it; its
 * arguments are in kvm_run. Any other is answered here. kvm_run.hypercall.ret is written in either case; but see AK_HYPERCALL_6_12:
 * kvm_emulate_hypercall() of 6.12 takes all of RAX for the call's number when it looks whether user space is to answer. */
bool ak_hypercall(struct ak_vcpu *v)
{
    const u64 *regs = v->env->regs, mask = v->env->hflags & HF_CS64_MASK ? ~0ull : 0xffffffffull;
    u64 nr = regs[R_EAX] & mask, gpa = regs[R_EBX] & mask, npages = regs[R_ECX] & mask, result = KVM_HYPERCALL_UNKNOWN;
    struct ak_hypercall_exit *exit = ak_run_hypercall(v->run);
    if (v->env->hflags & HF_CPL_MASK)
        result = KVM_HYPERCALL_DENIED;
    else if (nr == AK_HC_MAP_GPA_RANGE && (v->vm->hypercall_exits & (1ull << AK_HC_MAP_GPA_RANGE))) {
        if (!(gpa & ~AK_PAGE_MASK) && (gpa >> 12) + npages > gpa >> 12) {
            exit->nr = nr;
            exit->ret = v->behaviour & AK_HYPERCALL_6_12 ? exit->ret : 0;
            exit->args[0] = gpa;
            exit->args[1] = npages;
            exit->args[2] = regs[R_EDX] & mask;
            exit->flags = mask == ~0ull ? HYPERCALL_LONG_MODE : 0;
            if (!(v->behaviour & AK_HYPERCALL_6_12) || regs[R_EAX] == nr)
                return true;
            v->run->exit_reason = KVM_EXIT_HYPERCALL; /* and the guest goes on, with the completion pending */
            v->completion = AK_COMPLETE_HYPERCALL;
            result = 0;
        } else
            result = (u64)-EINVAL;
    }
    if (!(v->behaviour & AK_HYPERCALL_6_12))
        exit->ret = result;
    finish_hypercall(v, result);
    return false;
}

/* One locked instruction that no host atomic can do: the whole VM waits for it. */
static void run_exclusive(struct ak_vcpu *v)
{
    bool completing = v->stopping;
    v->exclusive = 0;
    ak_emulate_alone(v);
    v->stopping = 1;
    ak_vm_pause(v->vm);
    ak_flush_pending(v); /* of an update that came first */
    ak_enter(v);
    ak_vm_resume(v->vm, false);
    v->stopping = completing;
}

/* Guest mode, once. */
void ak_run_guest(struct ak_vcpu *v)
{
    if (v->exclusive) {
        run_exclusive(v);
        return;
    }
    ak_guest_enter(v);
    v->zaps = v->vm->zaps;
    v->in_guest = 1;
    ak_ticker_arm(v);
    ak_enter(v);
    v->in_guest = 0;
    ak_guest_exit(v);
    if (__builtin_expect(v->pokes != v->pokes_seen, 0))
        ak_pokes_settle(v);
}
