/* Device memory: what KVM's instruction emulator does, done by the engine itself. The first access to a page that is
 * not RAM abandons the instruction and runs it again alone ("emulation"). Then a read that has no answer yet leaves
 * with RIP at the instruction, to be run again with the answers so far (complete_emulated_mmio); writes are collected
 * while the instruction retires and leave one by one afterwards, RIP past it, as KVM_EXIT_MMIO has it (ABI.md 1.3).
 * Inside emulation a host page that cannot be touched counts as a device page: long-standing ABI (ABI.md 0.9). */
#include "engine_internal.h"
#include <string.h>

/* Blocks of one instruction; without atomics they are a kind of their own in the engine's cache. */
u32 ak_alone_cflags(const struct ak_vcpu *v)
{
    return 1 | (v->emulate_alone ? CF_ALONE : 0);
}

/* Start: forget this instruction's effects so far (none is visible yet) and run it as a block of its own. */
void ak_emulate_start(struct ak_vcpu *v, uintptr_t retaddr)
{
    v->translating = 0;
    cpu_restore_state_x86_64(v->cpu, retaddr, true);
    if (!ak_kvm_emulates(v))
        ak_emulate_failed(v, 0);
    v->emulation = AK_ARMED;
    v->emulate_reached = 0;
    v->nlog = v->nreplay = v->nfragments = v->fragment = 0;
    v->cpu->interrupt_request |= CPU_INTERRUPT_HARD;
    v->cpu->cflags_next_tb = ak_alone_cflags(v);
    v->cpu->exception_index = -1;
    cpu_loop_exit_restore_x86_64(v->cpu, 0);
}

static void stop_emulating(struct ak_vcpu *v)
{
    v->emulation = AK_NATIVE;
    v->emulate_alone = 0;
    v->nlog = v->nreplay = 0;
}

/* KVM's emulator can do nothing and does not say so: the guest tries the instruction again, until a signal ends KVM_RUN. */
void ak_emulate_in_vain(struct ak_vcpu *v, uintptr_t retaddr)
{
    stop_emulating(v);
    v->nfragments = 0;
    ak_leave(v, AK_EXIT_KICKED, retaddr);
}

/* Between blocks, with emulation on: before the instruction, or after it has retired. True: chain nothing. */
bool ak_emulate_boundary(struct ak_vcpu *v)
{
    if (v->emulation == AK_ARMED) {
        v->emulation = AK_RUNNING;
        v->emulate_rip = v->env->eip;
        v->nreplay = v->nfragments = 0;
        v->cpu->cflags_next_tb = ak_alone_cflags(v);
        return true;
    }
    if (v->nlog && !v->nreplay && v->env->eip == v->emulate_rip) { /* a kick kept its block from running: no answer is used */
        v->cpu->cflags_next_tb = ak_alone_cflags(v);
        return true;
    }
    if (v->stopping && !v->nfragments && v->env->eip == v->emulate_rip && (v->env->regs[R_ECX] & 0x3ff)) {
        /* x86_emulate_instruction(), EMULATION_RESTART: a completion goes on with the next items of a REP */
        v->emulate_reached = 1;
        v->nlog = v->nreplay = 0;
        v->cpu->cflags_next_tb = ak_alone_cflags(v);
        return true;
    }
    stop_emulating(v);
    if ((v->stopping || v->nfragments) && v->env->eip == v->emulate_rip) /* a REP that goes on; x86_emulate_insn() */
        v->env->eflags |= RFLAGS_RF;
    if (v->nfragments) {
        v->fragment = 0;
        v->exit.kind = AK_EXIT_MMIO;
        v->cpu->exit_request = 1;
    }
    return true;
}

/* Put the next fragment into v->exit. False when all are done. */
bool ak_next_fragment(struct ak_vcpu *v)
{
    if (v->fragment >= v->nfragments) {
        v->nfragments = v->fragment = 0;
        return false;
    }
    const struct ak_access_log *f = &v->fragments[v->fragment++];
    v->exit.kind = AK_EXIT_MMIO;
    v->exit.gpa = f->gpa;
    v->exit.size = f->size;
    v->exit.data = f->data;
    v->exit.is_write = 1;
    v->completion = AK_COMPLETE_MMIO_WRITE;
    return true;
}

static void __attribute__((noreturn)) read_exit(struct ak_vcpu *v, u64 gpa, u32 size, uintptr_t retaddr)
{
    if (v->nlog == AK_LOG)
        ak_emulate_failed(v, retaddr);
    v->log[v->nlog] = (struct ak_access_log){.gpa = gpa, .size = (u8)size};
    v->exit.gpa = gpa;
    v->exit.size = size;
    v->exit.is_write = 0;
    v->exit.data = 0;
    cpu_restore_state_x86_64(v->cpu, retaddr, true);
    v->emulate_rip = v->env->eip;
    v->emulation = AK_ARMED; /* runs again once the answer is in log[nlog] */
    v->completion = AK_COMPLETE_MMIO_READ;
    ak_leave(v, AK_EXIT_MMIO, 0);
}

/* complete_emulated_mmio(): the answer to the last read exit. Dropped if the caller moved RIP. */
void ak_answer_read(struct ak_vcpu *v)
{
    if (ak_answer_string_out(v))
        return;
    if (v->emulation == AK_ARMED && v->env->eip != v->emulate_rip) {
        stop_emulating(v);
        return;
    }
    struct ak_access_log *answer = &v->log[v->nlog++];
    answer->data = 0; /* what user space left behind the bytes it was asked for is no part of the answer */
    memcpy(&answer->data, v->run->mmio.data, answer->size < 8 ? answer->size : 8);
}

/* The emulated instruction has an answer for its next read, and it is in this page. */
bool ak_answered(const struct ak_vcpu *v, u64 gpa)
{
    return v->emulation == AK_RUNNING && v->nreplay < v->nlog && v->log[v->nreplay].gpa >> 12 == gpa >> 12;
}

/* A locked instruction is about to write memory where a device answered its read: a slot has come meanwhile, and what it
 * would write was made from the device's value. KVM compares and, as memory has something else, runs the instruction again
 * (emulator_cmpxchg_emulated()). One without lock writes: also KVM's. */
void ak_write_check(struct ak_vcpu *v, u64 gpa, uintptr_t retaddr)
{
    if (!v->emulate_alone)
        return;
    for (u32 i = 0; i < v->nreplay; i++)
        if (v->log[i].gpa >> 12 == gpa >> 12) {
            stop_emulating(v);
            v->nfragments = 0;
            v->exclusive = 1; /* as it was found to need that before */
            ak_leave(v, AK_EXIT_KICKED, retaddr);
        }
}

/* A page that is no RAM, met while emulating. False: the host refuses it, and it comes before the device access because
 * of which KVM would have begun to emulate at all; so it is a fault of native execution. */
bool ak_emulate_reaches(struct ak_vcpu *v, u64 gpa, bool device)
{
    if (device || gpa >> 12 == v->emulate_gpa >> 12)
        v->emulate_reached = 1;
    return v->emulate_reached;
}

static u64 device_read(struct ak_vcpu *v, u64 gpa, u32 size, uintptr_t retaddr)
{
    if (v->nreplay < v->nlog) /* of the 8 bytes in kvm_run only as many are the answer as were asked for */
        return v->log[v->nreplay++].data & (~0ull >> (64 - 8 * size));
    read_exit(v, gpa, size, retaddr);
}

static void device_write(struct ak_vcpu *v, u64 gpa, u64 data, u32 size, uintptr_t retaddr)
{
    struct ak_access_log *last = v->nfragments ? &v->fragments[v->nfragments - 1] : NULL;
    /* The engine splits an unaligned store into bytes; on the bus it is one access (within one page, 8 bytes). */
    if (last && size == 1 && last->gpa + last->size == gpa && last->size < 8 && (gpa & ~AK_PAGE_MASK) &&
        last->is_write == 1) {
        last->data |= (data & 0xff) << (8 * last->size);
        last->size++;
        return;
    }
    if (v->nfragments == AK_LOG)
        ak_emulate_failed(v, retaddr);
    v->fragments[v->nfragments++] =
        (struct ak_access_log){.gpa = gpa, .data = data, .size = (u8)size, .is_write = size == 1 ? 1 : 2};
}

#define MO_BSWAP 8 /* of an access: MOVBE's */

static u64 swapped(u64 data, u32 size, int op)
{
    return op & MO_BSWAP ? __builtin_bswap64(data) >> (64 - 8 * size) : data;
}

/* Replace the engine's device dispatch: whole accesses of up to 8 bytes, and no call into its callbacks. addr is the
 * offset in the window, so the gpa. */
u32 memory_region_dispatch_read_x86_64(struct uc_struct *uc, void *mr, u64 addr, u64 *value, int op, MemTxAttrs attrs)
{
    struct ak_vcpu *v = ak_current;
    (void)uc;
    (void)mr;
    (void)attrs;
    u32 size = 1u << (op & 3);
    *value = swapped(device_read(v, addr, size, v->cpu->mem_io_pc), size, op);
    return 0;
}

u32 memory_region_dispatch_write_x86_64(struct uc_struct *uc, void *mr, u64 addr, u64 data, int op, MemTxAttrs attrs)
{
    struct ak_vcpu *v = ak_current;
    (void)uc;
    (void)mr;
    (void)attrs;
    u32 size = 1u << (op & 3);
    device_write(v, addr, swapped(data, size, op), size, v->cpu->mem_io_pc);
    return 0;
}

/* An unaligned load from a device page: the engine would read the two aligned words around it, which a device must not
 * see. Read exactly the bytes asked for, split at the page boundary. */
bool ak_unaligned_load(struct ak_vcpu *v, u64 addr, u32 oi, u32 size, uintptr_t retaddr, u64 *value)
{
    struct ak_translation t[2] = {{0}, {0}};
    u32 first = size, i, n = 1;
    bool device = false;
    if (v->emulation != AK_RUNNING || !(addr & (size - 1)))
        return false;
    if (((addr + size - 1) ^ addr) & AK_PAGE_MASK) {
        first = (u32)(AK_PAGE_SIZE - (addr & ~AK_PAGE_MASK));
        n = 2;
    }
    for (i = 0; i < n; i++) {
        u64 va = i ? addr + first : addr;
        int r = ak_walk(v, va, AK_READ, (int)(oi & 15), true, &t[i]);
        if (r == AK_WALK_PF && device) { /* a fault of the second page comes before the device is read */
            v->env->cr[2] = va;
            ak_raise(v, EXCP_PF, (int)t[i].error_code, retaddr);
        }
        if (r != AK_WALK_OK)
            return false; /* the ordinary path raises the fault */
        if (ak_data_pfn(v, t[i].gpa, AK_READ, &t[i]) == KVM_PFN_OK)
            continue;
        device = true;
        if (ak_locked_in_read_only_slot(v, va, (int)(oi & 15)))
            v->emulate_reached = 1;
        if (!ak_emulate_reaches(v, t[i].gpa, t[i].pfn == KVM_PFN_NOSLOT))
            return false;
    }
    if (!device)
        return false;
    *value = 0;
    for (i = 0; i < n; i++) {
        u32 part = i ? size - first : first, shift = i ? first * 8 : 0;
        u64 va = i ? addr + first : addr, data = 0;
        if (t[i].pfn != KVM_PFN_OK)
            data = device_read(v, t[i].gpa | (va & ~AK_PAGE_MASK), part, retaddr);
        else if (ak_copy_in(&data, t[i].hva | (va & ~AK_PAGE_MASK), part))
            return false;
        *value |= (part < 8 ? data & ((1ull << (8 * part)) - 1) : data) << shift;
    }
    return true;
}

/* Run the instruction at RIP alone and without atomics, from the next entry on. */
void ak_emulate_alone(struct ak_vcpu *v)
{
    v->emulation = AK_ARMED;
    v->emulate_alone = 1;
    v->emulate_gpa = ~0ull; /* for want of atomicity, not because of a device */
    v->emulate_reached = 0;
    v->nlog = v->nreplay = v->nfragments = v->fragment = 0;
}

/* A locked access that cannot be one host atomic: unaligned, or to a device. The engine would leave with an exception
 * nobody handles. It is run alone, without atomics: on memory while no other vCPU of the VM is in guest mode (sync.c:
 * ak_run_guest()); device memory has no atomicity to lose. */
void cpu_loop_exit_atomic_x86_64(struct CPUState *cpu, uintptr_t retaddr)
{
    struct ak_vcpu *v = ak_current;
    if (v->emulation == AK_NATIVE) {
        v->exclusive = 1;
        ak_leave(v, AK_EXIT_KICKED, retaddr);
    }
    v->emulate_alone = 1;
    v->emulation = AK_ARMED;
    cpu->cflags_next_tb = ak_alone_cflags(v);
    cpu->exception_index = -1;
    cpu_loop_exit_restore_x86_64(cpu, retaddr);
}

#define HLT 0xf4

static void queue_ud(struct ak_vcpu *v)
{
    v->event.pending = 1;
    v->event.vector = EXCP_UD;
    v->event.has_error = 0;
    v->event.error_code = 0;
}

/* KVM_INTERNAL_ERROR_EMULATION: an instruction KVM's emulator cannot fetch or handle. At CPL > 0 the guest gets #UD
 * (handle_emulation_failure()). */
void ak_emulate_failed(struct ak_vcpu *v, uintptr_t retaddr)
{
    stop_emulating(v);
    v->nfragments = 0;
    if ((v->env->hflags & HF_CPL_MASK) != 0)
        ak_raise(v, EXCP_UD, 0, retaddr);
    queue_ud(v); /* the guest gets it should the caller run it again */
    ak_leave(v, AK_EXIT_EMULATION, retaddr);
}

/* AK_EMULATE_IN_DELIVERY: the delivery of an event met a device. KVM 6.12 does not look whose access it was, and emulates
 * the instruction at RIP (x86_emulate_instruction(), which forgets exceptions); interrupts and NMIs stay injected, so each
 * entry is one more instruction that is emulated. */
void ak_emulate_instead(struct ak_vcpu *v)
{
    u8 code[15];
    bool user = v->env->hflags & HF_CPL_MASK;
    v->event.injected = 0;
    v->exit.kind = AK_EXIT_KICKED;
    if (!user && ak_instruction_bytes(v, code) && code[0] == HLT) { /* SVM's KVM asks nobody what emulator_halt() says */
        v->env->eip++;
        return;
    }
    if (ak_kvm_emulates(v)) {
        v->emulation = AK_ARMED;
        v->emulate_reached = 1; /* all of it is KVM's emulator's */
        v->nlog = v->nreplay = v->nfragments = v->fragment = 0;
        return;
    }
    queue_ud(v);
    if (!user)
        v->exit.kind = AK_EXIT_EMULATION;
}
