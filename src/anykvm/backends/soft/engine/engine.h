/* The soft backend's vCPU: what the contract (run.py) and the adapter share.
 *
 * The adapter is C because Unicorn's internal functions must be replaced (stock faults: stores executed twice, lost
 * stops, no SYSCALL, ...) and because a TLB fill must not enter Python. One subject per file:
 *   vm.c          life, slots' updates, guest mode      slots.c     the memslot table
 *   heap.c        the memory of a vCPU's engine         alloc.c     what the engine calls for it
 *   memory.c      all other memory
 *   engine.c      vCPUs: create, enter, kick            mmu.c       guest page tables (first stage)
 *   fault.c       second stage, TLB fill                hva.c       host pages, asked as KVM asks
 *   dirty.c       dirty tracking                        mapped.c    what a first read dirties
 *   files.c       which object a descriptor stands for  search.c    files that were closed without a word
 *   exports.h     what the library is called by         layout.c    what Python knows too
 *   host.c        guarded access, SIGSEGV/SIGBUS        operand.c   which memory a host instruction accesses
 *   attributes.c  which guest frames are private        gmem.c      guest_memfd
 *   gmem_file.c   what its file refuses                 interpose.c in front of the C library
 *   file_size.c   RLIMIT_FSIZE
 *   signals.c     KVM_RUN's signal mask                 ticker.c    what makes it look for signals
 *   python_signals.c  Ctrl-C in CPython                 poke.c      and what wakes one that sleeps
 *   coherence.c   code that changes
 *   emulate.c     MMIO: one instruction, replayed       instruction.c  which of them KVM's emulator has
 *   pio.c         port I/O and its completion           string_io.c INS, OUTS
 *   events.c      exceptions, triple fault              inject.c    which event an entry takes
 *   ioctl.c       the vCPU's ioctls
 *   control.c     CR, EFER, XCR0, SYSCALL, SYSENTER     msr.c       MSRs        cpuid.c  CPUID, TSC
 *   translate.c   what is translated differently        decode.c    of which instructions
 *   state.c       regs, sregs, fpu
 *   loads.c, stores.c, atomic.c   accesses that translated code does not do by itself
 *   divide.c, string_compare.c   instructions that the engine's own helpers cannot do for every operand
 *   trap.c        host traps in the engine; the host's floating-point modes
 *   nested.c      SVM and SMM, which a guest must not reach
 */
#pragma once
#include <signal.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "heap.h"
#include "kvm_abi.h"
#include "memory.h"
#include "unicorn_layout.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define AK_PAGE_SIZE 4096ull
#define AK_PAGE_MASK (~(AK_PAGE_SIZE - 1))
#define AK_MAXPHYADDR 40 /* of the guest: 1 TiB; what CPUID 0x80000008 and the memslot checks say */

/* Engine-physical space. RAM is addressed by its host virtual address, so a memslot costs the engine nothing and two
 * slots over one host page share translated code; the device window holds every gpa that is not RAM. */
#define AK_HOST_WINDOW_BASE 0x1000ull
#define AK_HOST_WINDOW_SIZE ((1ull << 47) - 0x2000ull)
#define AK_MMIO_WINDOW_BASE (1ull << 50)
#define AK_MMIO_WINDOW_SIZE (1ull << 48)

enum ak_access { AK_READ = 0, AK_WRITE = 1, AK_FETCH = 2 }; /* the engine's MMUAccessType */

/* Why the engine came back. The contract turns these into errno and exit_reason. */
enum ak_exit_kind {
    AK_EXIT_NONE = 0,
    AK_EXIT_KICKED,       /* ak_kick(): look at signals and requests, then go on */
    AK_EXIT_IO,           /* port, size, count, is_write; data in the PIO page */
    AK_EXIT_MMIO,         /* gpa, size, is_write, data */
    AK_EXIT_HLT,
    AK_EXIT_SHUTDOWN,     /* triple fault */
    AK_EXIT_FAULT,        /* a guest page fault KVM cannot resolve: gpa, hva, access, err, annotate */
    AK_EXIT_EMULATION,    /* KVM_INTERNAL_ERROR_EMULATION */
    AK_EXIT_SET_TPR,      /* the guest lowered CR8; it has done so */
    AK_EXIT_DELIVERY,     /* KVM_INTERNAL_ERROR_DELIVERY_EV: gpa of the device page met while delivering */
    AK_EXIT_IRQ_WINDOW,   /* an interrupt can be taken and somebody waits for that */
    AK_EXIT_HYPERCALL,    /* VMCALL/VMMCALL */
    AK_EXIT_DIRTY_FULL,   /* the dirty ring is at its soft limit */
    AK_EXIT_ENGINE,       /* the engine could not go on, and never will */
    AK_EXIT_HWPOISON,     /* a poisoned page of ordinary memory: SIGBUS for this thread, at hva */
};

/* Why host memory could not be had (fault.c); kvm's error pfns by their own names. */
enum ak_pfn {
    KVM_PFN_OK = 0,
    KVM_PFN_NOSLOT,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_FAULT,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_SIGPENDING,
};

/* What the host said of a page that could not be touched. */
enum ak_host_fault {
    AK_HOST_OK = 0,
    AK_HOST_UNMAPPED,  /* SIGSEGV, SEGV_MAPERR */
    AK_HOST_DENIED,    /* SIGSEGV, SEGV_ACCERR */
    AK_HOST_BEYOND,    /* SIGBUS, BUS_ADRERR: beyond the end of the file, no memory for it */
    AK_HOST_POISONED,  /* SIGBUS, BUS_MCEERR_AR */
    AK_HOST_INTERRUPTED, /* a signal came while the fault waited for its handler */
};

/* What a device mapping's fault handler says. */
#define AK_DEVICE_TRIES 100 /* it says the page is there, and the host refuses it: somebody protects it by himself */
#define AK_DIRTY_RING_RESERVED 64 /* entries, for what one instruction or delivery can still dirty beyond the soft limit */

enum ak_device_answer {
    AK_DEVICE_PRESENT = 0,
    AK_DEVICE_FAILED,
    AK_DEVICE_READ_ONLY,
    AK_DEVICE_INTERRUPTED, /* as by a signal: KVM_RUN ends with EINTR */
    AK_DEVICE_RAISED = 16, /* a bit: the handler's caller has an exception for who called KVM_RUN */
};

struct ak_exit {
    u32 kind;
    u32 size;
    u64 gpa;
    u64 hva;
    u32 access;
    int32_t err;      /* negative errno */
    u32 annotate;     /* kvm would call kvm_prepare_memory_fault_exit() in every profile */
    u32 flags;        /* memory_fault.flags */
    u32 host_fault;   /* enum ak_host_fault */
    u32 slot_id;
    u32 port;
    u32 count;
    u32 is_write;
    u32 ninsn;        /* instruction bytes, for emulation failures */
    u64 data;
    u8 insn[16];
};

/* kvm_memory_slot: guest frames to host addresses. */
struct ak_slot {
    u64 base_gfn, npages, hva;
    u32 flags;
    u32 id;           /* as_id << 16 | slot */
    u64 *dirty_bitmap;
    struct ak_gmem *gmem;     /* KVM_MEM_GUEST_MEMFD; NULL once the file is closed */
    u64 gmem_offset;
    u32 gmem_only;            /* the file can be mapped: shared accesses use it too */
    u64 *mapped;              /* mapped.c, which owns it; else NULL */
    u32 any_mapped;
};

#define AK_FAULT_SIGNALS 5 /* SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP: open in KVM_RUN */

struct ak_vcpu;
struct ak_gmem;
struct code_page;

enum ak_lookup { AK_LOOKUP_HVA, AK_LOOKUP_GMEM }; /* hva_to_pfn(), kvm_gmem_get_pfn() */
typedef int ak_refusal_hook(u32 lookup, u32 vcpu_id, u64 gpa, u32 access);

struct ak_range {
    u64 first, last;          /* guest frames */
};

struct ak_vm {
    pthread_mutex_t lock;     /* the vCPU list, and one updater at a time */
    pthread_cond_t changed;
    struct ak_slot **slots;   /* by base_gfn; as_id 0 */
    u32 nslots, slots_room;
    struct ak_slot **slots_by_id;
    u32 ids_room;
    volatile u32 paused;      /* updaters waiting or at work: vCPUs stay out of guest mode */
    u32 in_guest;
    u32 dead;
    u32 npoisoned;
    u64 *poisoned;            /* host pages that count as poisoned: injected failures */
    u32 mm;                   /* which fork of the process made it */
    u64 tsc_khz, tsc_boot_ns;
    struct ak_vcpu *vcpus;
    u32 nvcpus;
    struct ak_range *private_ranges; /* KVM_MEMORY_ATTRIBUTE_PRIVATE: sorted, apart from each other */
    u32 nprivate, private_room;
    u32 gmem_closings;        /* files that were found closed */
    struct ak_gmem *gmems;
    u64 private_gpa_mask;     /* the guest says by this bit of an address which access is private; 0: by attribute */
    u64 hypercall_exits;      /* KVM_CAP_EXIT_HYPERCALL: numbers that go to user space */
    u32 map_writable;         /* profile: a page that is read is mapped for writing if it can be (mapped.c) */
    volatile u32 zaps;        /* how often a slot has gone or moved */
    u32 device_faults;        /* vCPUs in a device's fault handler */
    ak_refusal_hook *refusal_hook; /* asked in front of a page's look-up; NULL: nobody (refusal.c) */
};

/* A pending exception: kvm_queued_exception, kept over a KVM_RUN that failed while delivering it. */
struct ak_event {
    u8 injected, vector, has_error, nmi_pending;
    u32 error_code;
    u8 irq_injected, irq_vector, nmi_injected;
    u8 pending; /* exception.pending: queued and never tried; KVM_SET_REGS forgets it, not an injected one */
    u8 requested, unasked; /* KVM_REQ_EVENT is set; the next entries do not look at events, for want of it */
    u64 unasked_rip;
};

/* Device accesses of the one instruction being emulated: done ones are replayed, the next one is the exit. */
#define AK_LOG 64
struct ak_access_log {
    u64 gpa, data;
    u8 size, is_write;
};

enum ak_emulation { AK_NATIVE = 0, AK_ARMED, AK_RUNNING };

/* What KVMs do differently, as profiles.py says it (vcpu.py) */
enum ak_behaviour {
    AK_INIT_AFTER_SHUTDOWN = 1,  /* a triple fault resets the vCPU, as SVM's KVM does */
    AK_EMULATE_IN_DELIVERY = 2,  /* an event's delivery that meets a device has the instruction at RIP emulated */
    AK_ANY_EFER = 4,             /* KVM_SET_SREGS does not look at EFER's bits */
    AK_SYNC_LOW_HALF = 8,        /* of kvm_valid_regs and kvm_dirty_regs the upper 32 bits are not looked at */
    AK_STALE_PRE_FAULT = 16,     /* KVM_PRE_FAULT_MEMORY waits for a signal from a slot's deletion to the next KVM_RUN */
    AK_HYPERCALL_6_12 = 32,      /* kvm_run.hypercall.ret is not written; a 32-bit call's RAX counts with 64 bits */
};

/* Where run.py resets exit_reason: mainline's point, or a research profile's additional one. */
enum ak_purge { AK_PURGE_VCPU_RUN = 0, AK_PURGE_BEFORE_LOCK, AK_PURGE_AFTER_LOCK, AK_PURGE_AFTER_COMPLETION,
                AK_PURGE_NEVER };

/* What run.py completes at the next KVM_RUN (vcpu->arch.complete_userspace_io) */
enum ak_completion { AK_COMPLETE_NONE = 0, AK_COMPLETE_PIO, AK_COMPLETE_STRING_IN, AK_COMPLETE_MMIO_READ, AK_COMPLETE_MMIO_WRITE,
                     AK_COMPLETE_HYPERCALL };

struct ak_msr_state {
    u64 apic_base, misc_enable, tsc_adjust, hwcr, bios_sign_id, platform_info, mcg_status;
    u64 mtrr_def, mtrr_fixed[11], mtrr_base[8], mtrr_mask[8];
    u64 sysenter_cs; /* all 64 bits, of which SYSENTER uses 16 */
    int64_t tsc_offset;
};

/* struct kvm_pre_fault_memory, which headers before 6.11 lack. */
struct ak_pre_fault_memory {
    u64 gpa, size, flags, padding[5];
};

/* struct kvm_dirty_ring: of kvm_dirty_gfn entries in the vCPU file, from page 64 on. */
struct ak_dirty_gfn;
struct ak_dirty_ring {
    struct ak_dirty_gfn *gfns;
    u32 size;                 /* entries; 0: there is none */
    u32 dirty_index, reset_index;
};

struct ak_vcpu {
    /* -- shared with run.py (native.pxd and native.py name these; layout.h) -------------------------------- */
    struct kvm_run *run;      /* pages 0..2 of the vCPU file */
    struct ak_exit exit;
    u32 completion;           /* enum ak_completion: vcpu->arch.complete_userspace_io */
    u32 stopping;             /* complete the pending instruction, nothing else */
    u32 string_in;            /* INS items wait in the PIO page */
    u32 has_sigmask;          /* KVM_SET_SIGNAL_MASK is in force */
    u32 annotate_all;         /* profile: a bare -EFAULT is annotated, as api.rst says */
    u32 ran;                  /* KVM_RUN reached the guest once: CPUID is final */
    u32 purge;                /* profile: enum ak_purge */
    u64 sync_supported;       /* KVM_CAP_SYNC_REGS: register sets */
    u32 mp_state;
    /* -- the engine's side --------------------------------------------------------------------------------- */
    struct ak_vm *vm;
    struct ak_vcpu *next;
    struct ak_vcpu *next_watched; /* ticker.c */
    pthread_mutex_t mutex;    /* vcpu->mutex: one vCPU ioctl at a time */
    u32 id;
    u64 cr8;                  /* userspace irqchip: the task priority */
    u64 sigmask;              /* KVM_SET_SIGNAL_MASK */
    u64 outer_mask, active_mask;
    u64 sigbus_hva;           /* SIGBUS to send when the mask is restored */
    siginfo_t *outer_info;
    struct ak_vcpu *outer_vcpu;    /* NULL, or of the KVM_RUN that this one is inside of (in a device's fault handler) */
    siginfo_t held_info[AK_FAULT_SIGNALS]; /* signals of faults that wait for that too (signals.c) */
    volatile u32 in_guest;
    volatile u64 entries, tick_entries;
    struct uc_struct *uc;
    struct CPUState *cpu;
    struct CPUX86State *env;
    struct ak_event event;
    struct ak_msr_state msr;
    struct kvm_cpuid_entry2 *cpuid;
    u32 ncpuid;
    volatile u32 kick;
    u32 emulation;            /* enum ak_emulation */
    u32 exclusive;            /* the next instruction is a locked one for which the whole VM waits */
    u32 emulate_alone;        /* CF_PARALLEL off: an atomic that cannot be one on this memory */
    u32 nlog, nreplay;
    struct ak_access_log log[AK_LOG];
    u32 nfragments, fragment; /* writes of a retired instruction, one exit each */
    struct ak_access_log fragments[AK_LOG];
    u32 translating;          /* number of the instruction being translated, from 1 */
    u32 delivering;           /* an exception or interrupt is being delivered */
    u64 deliver_eip;          /* eip to go back to when delivery faults (software interrupts and exceptions) */
    u32 deliver_soft;
    u32 deliver_rf;           /* RF is set for the image on the stack only */
    uintptr_t descriptor_pc;  /* where translated code last called a helper that loads descriptors */
    u32 table_fault;          /* what is delivered is a page fault for want of a table's slot */
    u32 single_step_sse;      /* MXCSR has an unmasked exception: instruction by instruction */
    u64 emulate_rip;          /* where the instruction waits for a read's answer */
    u64 emulate_gpa;          /* the page that started it */
    u32 behaviour;            /* profile: enum ak_behaviour */
    u32 zaps;                 /* those of the VM that were before it last entered the guest */
    u32 emulate_reached;      /* it has been got to: what comes before it faults as in native execution */
    u64 pio_rip;              /* linear rip of the pending PIO instruction */
    u32 pio_len, pio_size, pio_count, pio_in;
    struct ak_heap *heap;     /* of its engine */
    struct ak_heap *outer_heap; /* of the vCPU that this thread works for as well: in ak_vcpu_lock() */
    u32 broken;               /* the engine has failed: it cannot run any more */
    struct code_page *code_pages; /* set of host pages with translated code (open addressing) */
    u32 code_count, code_room;
    struct ak_code_copy {     /* the pages of the block being translated, as they were before it was read */
        u64 hva;              /* 0: none */
        u32 first, last;      /* the block's bytes in it */
        u8 bytes[AK_PAGE_SIZE];
    } code_copy[2];
    u64 code_va;              /* where the translator reads: in the page copied last */
    uintptr_t frame;          /* of ak_enter */
    uintptr_t load_site, load_retaddr; /* loads.c: where the last load was called from, and the instruction it is of */
    void *uc_hook;
    u64 fills, faults;        /* statistics */
    pid_t tid;                /* the thread in KVM_RUN */
    volatile u32 interruptible; /* a guarded access that a signal may end: GUP with FOLL_INTERRUPTIBLE */
    volatile u32 pokes;       /* by the ticker; odd: one is on its way */
    u32 pokes_seen, tick_stuck;
    volatile u32 ticks;       /* by the ticker: in which it did not leave guest mode by itself */
    u32 ticks_asked;
    u32 align_need;
    u32 operand_bytes;        /* of a memory operand of which the engine would read more; 0: it does not */
    u32 operand_loads;        /* of this instruction so far */
    u64 insn_pc;              /* translate.c: bytes shown to the decoder instead of memory */
    u32 insn_len;
    u8 insn_bytes[16];
    u32 string_out;           /* OUTS waits for a device's answer, at pio_rip */
    u32 insn_hidden;          /* bytes of it that the decoder was not shown */
    void *tlb_flush_pending;
    u32 gmem_closings;        /* those of the VM that its TLB knows of */
    struct ak_dirty_ring ring;
    bool device_raised, device_interrupted; /* by a device's fault handler, in this KVM_RUN */
    struct ak_file *file;     /* files.c */
    u32 interrupted;          /* a look-up was refused as if a signal had come (refusal.c) */
};

#include "exports.h"

/* vm.c */
void ak_vm_pause(struct ak_vm *vm);
void ak_vm_resume(struct ak_vm *vm, bool flush);
void ak_flush_pending(struct ak_vcpu *v);
bool ak_guest_enter(struct ak_vcpu *v);
void ak_guest_exit(struct ak_vcpu *v);

/* engine.c */
void ak_vcpu_reset(struct ak_vcpu *v);
void ak_enter(struct ak_vcpu *v);
void ak_kick(struct ak_vcpu *v);
void ak_leave(struct ak_vcpu *v, u32 kind, uintptr_t retaddr) __attribute__((noreturn));
void ak_flush_tlb(struct ak_vcpu *v);
void ak_note_helper_frame(struct ak_vcpu *v, uintptr_t return_slot);
uintptr_t ak_helper_return(const struct ak_vcpu *v);
extern __thread struct ak_vcpu *ak_current __attribute__((tls_model("initial-exec")));

/* signals.c */
bool ak_signal_waits(const struct ak_vcpu *v);
bool ak_python_interrupted(struct ak_vcpu *v);
bool ak_python_signal_waits(const struct ak_vcpu *v);
bool ak_hold_signal(const siginfo_t *info);
bool ak_is_poke(const siginfo_t *info);
u64 ak_faults_open(siginfo_t info[AK_FAULT_SIGNALS]);
void ak_faults_close(u64 mask);
bool ak_signals_would_end(const struct ak_vcpu *v, u64 pending);
u64 ak_signals_block(void);
u64 ak_signals_defer(void);
void ak_signals_restore(u64 mask);
void ak_signals_in_child(void);

/* ticker.c, poke.c */
int ak_ticker_start(void);
void ak_ticker_arm(struct ak_vcpu *v);
void ak_poke(struct ak_vcpu *v);
void ak_pokes_settle(struct ak_vcpu *v);
void ak_watch(struct ak_vcpu *v);
void ak_unwatch(struct ak_vcpu *v);
void ak_ticker_in_child(void);

/* host.c */
void ak_host_disposition(int signo, struct sigaction *action);
int ak_host_touch(u64 hva, bool write, u64 *poison);
int ak_host_merge(u64 hva, u64 bytes, u64 value, u64 *before);
void ak_host_unmerge(u64 hva, u64 bytes, u64 value, u64 before);
bool ak_host_equal(u64 hva, const void *bytes, u64 size);

/* trap.c */
#define AK_MXCSR_DEFAULT 0x1f80u
struct ak_float {
    u32 mxcsr;
    u16 control;       /* of the x87 unit */
};
struct ak_float ak_float_enter(void);
void ak_float_leave(struct ak_float mine);

/* hva.c, dirty.c */
u32 ak_hva_to_pfn(struct ak_vcpu *v, u64 hva, enum ak_access access, u32 *host_fault);
bool ak_device_deadlock(const struct ak_vm *vm);
u32 ak_hva_refused(struct ak_vcpu *v, u64 hva, enum ak_access access, u32 *host_fault);

/* refusal.c */
int ak_refused(struct ak_vcpu *v, enum ak_lookup lookup, u64 gpa, enum ak_access access);
u32 ak_refusal_pfn(int why);
void ak_devices_in_child(void);
void ak_mark_page_dirty(struct ak_vcpu *v, struct ak_slot *slot, u64 gfn);
void ak_dirty_ring_check(struct ak_vcpu *v, uintptr_t retaddr);

/* mapped.c */
int ak_mapped_alloc(const struct ak_vm *vm, struct ak_slot *slot);
void ak_map_page(struct ak_vcpu *v, struct ak_slot *slot, u64 gfn, enum ak_access access);
void ak_unmap_page(struct ak_slot *slot, u64 gfn);
void ak_zap_all(struct ak_vm *vm);

/* slots.c */
void ak_slot_free(struct ak_slot *slot);
struct ak_slot *ak_gfn_to_memslot(struct ak_vm *vm, u64 gfn);
struct ak_slot *ak_slot_prepare(struct ak_vm *vm, const struct ak_slot *slot);
void ak_slot_link(struct ak_vm *vm, struct ak_slot *slot);
int ak_slot_remove(struct ak_vm *vm, u64 base_gfn, u32 id);
int ak_slot_flags(struct ak_vm *vm, u64 base_gfn, u32 id, u32 flags, u64 *dirty_bitmap);

/* fault.c */
struct ak_translation {
    u64 gpa, hva;      /* page bases */
    u32 prot;          /* 1 read, 2 write, 4 fetch: what the TLB entry may allow */
    u32 error_code;    /* of a guest #PF */
    u32 pfn;           /* enum ak_pfn */
    u32 host_fault;
    u32 slot_id;
    u64 fault_hva;
    u32 fault_access;
    u32 is_private;    /* the guest chose so, by ak_vm.private_gpa_mask */
    u32 not_shared;    /* a private access, or one that a guest_memfd answers */
    int err;           /* with annotate: the errno */
    u32 annotate;      /* kvm would call kvm_mmu_prepare_memory_fault_exit() */
    u32 flags;         /* of memory_fault */
    u32 no_table;      /* the guest's page fault is one because no slot has a table, */
    u64 table_gpa;     /* whose entry would be there */
};
int ak_faultin_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t);
int ak_emulator_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t);
void ak_restart(struct ak_vcpu *v, bool kick, uintptr_t retaddr) __attribute__((noreturn));
bool ak_in_code(const struct ak_vcpu *v, uintptr_t pc);

/* attributes.c */
bool ak_gfn_is_private(const struct ak_vm *vm, u64 gfn);

/* gmem_file.c */
int ak_gmem_file_add(int fd, u64 size, u32 flags);
void ak_gmem_file_remove(int fd);
void ak_gmem_files_in_child(void);

/* gmem.c */
#define AK_GMEM_MMAP 1u /* GUEST_MEMFD_FLAG_* */
#define AK_GMEM_INIT_SHARED 2u
bool ak_gmem_held(const struct ak_gmem *g);
void ak_gmem_enter(struct ak_vcpu *v);
bool ak_gmem_faultin(struct ak_vcpu *v, const struct ak_slot *slot, u64 gfn, enum ak_access access,
                     struct ak_translation *t);
int ak_data_pfn(struct ak_vcpu *v, u64 gpa, enum ak_access access, struct ak_translation *t);
bool ak_is_guest_memory(const struct ak_vm *vm, u64 hva);
u64 ak_gfn_to_hva(struct ak_vcpu *v, u64 gfn);
/* Whether an access to this slot (or to none) can be private or a guest_memfd's: nothing else costs anything. */
static inline bool ak_may_be_private(const struct ak_vm *vm, const struct ak_slot *slot)
{
    return vm->nprivate || vm->private_gpa_mask || (slot && slot->gmem_only);
}

/* mmu.c */
enum ak_walk { AK_WALK_OK = 0, AK_WALK_PF, AK_WALK_GP, AK_WALK_STAGE2 };
int ak_walk(struct ak_vcpu *v, u64 va, enum ak_access access, int mmu_idx, bool side_effects, struct ak_translation *t);
int ak_translate(struct ak_vcpu *v, u64 va, u64 *gpa, u32 *writeable, u32 *usermode); /* KVM_TRANSLATE */

/* instruction.c */
u64 ak_linear_rip(const struct ak_vcpu *v);
u32 ak_instruction_bytes(struct ak_vcpu *v, u8 bytes[15]);
u32 ak_peek_instruction(struct ak_vcpu *v, u8 bytes[15]);
bool ak_kvm_emulates(struct ak_vcpu *v);
bool ak_one_memory_operand(struct ak_vcpu *v);

/* emulate.c */
void ak_emulate_start(struct ak_vcpu *v, uintptr_t retaddr) __attribute__((noreturn));
void ak_emulate_in_vain(struct ak_vcpu *v, uintptr_t retaddr) __attribute__((noreturn));
void ak_emulate_alone(struct ak_vcpu *v);
bool ak_locked_in_read_only_slot(struct ak_vcpu *v, u64 addr, int mmu_idx);
u32 ak_alone_cflags(const struct ak_vcpu *v);
bool ak_emulate_boundary(struct ak_vcpu *v);
bool ak_answered(const struct ak_vcpu *v, u64 gpa);
bool ak_unaligned_load(struct ak_vcpu *v, u64 addr, u32 oi, u32 size, uintptr_t retaddr, u64 *value);
void ak_write_check(struct ak_vcpu *v, u64 gpa, uintptr_t retaddr);
bool ak_emulate_reaches(struct ak_vcpu *v, u64 gpa, bool device);
void ak_emulate_failed(struct ak_vcpu *v, uintptr_t retaddr) __attribute__((noreturn));
void ak_emulate_instead(struct ak_vcpu *v);

/* pio.c */
u8 *ak_pio_data(struct ak_vcpu *v);
void ak_check_io(struct ak_vcpu *v, u32 port, u32 size, uintptr_t retaddr);

/* string_io.c */
int ak_data_mmu_index(const struct ak_vcpu *v);
bool ak_answer_string_out(struct ak_vcpu *v);
void ak_string_io(struct ak_vcpu *v);
void ak_finish_string_in(struct ak_vcpu *v);

/* events.c */
void ak_event_hook(struct uc_struct *uc, u32 vector, void *user);
void ak_deliver(struct ak_vcpu *v, void (*how)(struct ak_vcpu *));
bool ak_is_fault(u32 vector);
bool ak_is_soft(u32 vector);
void ak_raise(struct ak_vcpu *v, int vector, int error_code, uintptr_t retaddr) __attribute__((noreturn));

/* inject.c */
bool ak_deliver_pending(struct ak_vcpu *v);
void ak_delivery_failed(struct ak_vcpu *v);
bool ak_interrupt_allowed(struct ak_vcpu *v);
void ak_request_event(struct ak_vcpu *v);

/* msr.c, cpuid.c, control.c */
int ak_msr_get(struct ak_vcpu *v, u32 index, u64 *value, bool host);
int ak_msr_set(struct ak_vcpu *v, u32 index, u64 value, bool host);
void ak_cpuid(struct ak_vcpu *v, u32 function, u32 index, u32 out[4]);
int ak_cpuid_load(struct ak_vcpu *v, const struct kvm_cpuid_entry2 *entries, u32 n);
int ak_set_cpuid(struct ak_vcpu *v, const struct kvm_cpuid2 *c);
int ak_get_cpuid(struct ak_vcpu *v, struct kvm_cpuid2 *c);
bool ak_cpuid_has(struct ak_vcpu *v, u32 function, int reg, int bit);
bool ak_is_amd(struct ak_vcpu *v);
u64 ak_tsc(struct ak_vcpu *v);
u64 ak_cr4_reserved(struct ak_vcpu *v);
u64 ak_efer_reserved(struct ak_vcpu *v);
int ak_check_cr0(u64 cr0);

/* state.c */
void ak_get_regs(struct ak_vcpu *v, struct kvm_regs *regs);
void ak_set_regs(struct ak_vcpu *v, const struct kvm_regs *regs);
void ak_get_sregs(struct ak_vcpu *v, struct kvm_sregs *sregs);
int ak_set_sregs(struct ak_vcpu *v, const struct kvm_sregs *sregs);
void ak_get_fpu(struct ak_vcpu *v, struct kvm_fpu *fpu);
void ak_set_fpu(struct ak_vcpu *v, const struct kvm_fpu *fpu);
u64 ak_get_rip(struct ak_vcpu *v);
void ak_set_rip(struct ak_vcpu *v, u64 rip);
u64 ak_get_rflags(struct ak_vcpu *v);
void ak_update_hflags(struct ak_vcpu *v);

/* translate.c, coherence.c */
void ak_check_code(struct ak_vcpu *v);
void ak_code_read(struct ak_vcpu *v, u64 hva, bool goes_on);
void ak_code_span(struct ak_vcpu *v, u64 hva, u32 size);
void ak_code_span_rest(struct ak_vcpu *v, u64 hva, u32 size);
void ak_check_code_page(struct ak_vcpu *v, u64 hva);
void ak_forget_code(struct ak_vcpu *v);
