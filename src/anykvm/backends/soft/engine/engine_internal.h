/* Unicorn's own functions that the adapter calls or replaces, and QEMU's numbers they take. Declared here because the
 * wheel has no internal headers; the link fails if one is missing. */
#pragma once
#include "engine.h"

enum { R_EAX, R_ECX, R_EDX, R_EBX, R_ESP, R_EBP, R_ESI, R_EDI };
enum { R_ES, R_CS, R_SS, R_DS, R_FS, R_GS };

#define EXCP_INTERRUPT 0x10000
#define EXCP_HLT 0x10001
#define CPU_INTERRUPT_HARD 2u
#define CF_COUNT_MASK 0x7fffu
#define CF_PARALLEL 0x80000u
#define CF_ALONE 0x8000u /* CF_LAST_IO: means nothing without icount, so it can mark blocks without atomics */

#define HF_CPL_MASK 3u
#define HF_INHIBIT_IRQ_MASK (1u << 3)
#define HF_CS32_MASK (1u << 4)
#define HF_SS32_MASK (1u << 5)
#define HF_ADDSEG_MASK (1u << 6)
#define HF_PE_MASK (1u << 7)
#define HF_LMA_MASK (1u << 14)
#define HF_CS64_MASK (1u << 15)
#define HF_AC_MASK (1u << 18)
#define HF_SVME_MASK (1u << 20)
#define HF_OSFXSR_MASK (1u << 22)
#define HF_SMAP_MASK (1u << 23)
#define HF2_GIF_MASK 1u
#define HF2_NMI_MASK 4u

#define CR0_PE (1u << 0)
#define CR0_MP (1u << 1)
#define CR0_TS (1u << 3)
#define CR0_NE (1u << 5)
#define CR0_WP (1u << 16)
#define CR0_AM (1u << 18)
#define CR0_NW (1u << 29)
#define CR0_CD (1u << 30)
#define CR0_PG (1u << 31)
#define CR4_TSD (1u << 2)
#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_PGE (1u << 7)
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXMMEXCPT (1u << 10)
#define CR4_FSGSBASE (1u << 16)
#define CR4_OSXSAVE (1u << 18)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define EFER_SCE 1u
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define EFER_NXE (1u << 11)
#define EFER_SUPPORTED ((u64)(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE))
#define RFLAGS_TF (1u << 8)
#define RFLAGS_IF (1u << 9)
#define RFLAGS_DF (1u << 10)
#define RFLAGS_VM (1u << 17)
#define RFLAGS_AC (1u << 18)
#define RFLAGS_RF (1u << 16)
#define CC_ALL 0x8d5u /* O S Z A P C */
#define CC_OP_EFLAGS 1

#define EXCP_DB 1
#define EXCP_UD 6
#define EXCP_DF 8
#define EXCP_NP 11
#define EXCP_GP 13
#define EXCP_PF 14
#define EXCP_AC 17
#define EXCP_XM 19

#define DESC_G (1u << 23)
#define DESC_B (1u << 22)
#define DESC_L (1u << 21)
#define DESC_AVL (1u << 20)
#define DESC_P (1u << 15)
#define DESC_S (1u << 12)
#define DESC_CS (1u << 11)
#define DESC_RW (1u << 9)
#define DESC_A (1u << 8)

/* si_code of the ticker's SIGSEGV to a vCPU's thread; si_value is where it sleeps. */
#define AK_SI_POKE (-0x616b)

struct TCGContext;

#define MMU_KSMAP_IDX 0
#define MMU_USER_IDX 1

typedef u32 MemTxAttrs;

extern int cpu_exec_x86_64(struct uc_struct *uc, struct CPUState *cpu);
extern _Bool cpu_restore_state_x86_64(struct CPUState *cpu, uintptr_t host_pc, _Bool will_exit);
extern void cpu_loop_exit_x86_64(struct CPUState *cpu) __attribute__((noreturn));
extern void cpu_loop_exit_restore_x86_64(struct CPUState *cpu, uintptr_t pc) __attribute__((noreturn));
extern void raise_exception_err_ra_x86_64(struct CPUX86State *, int, int, uintptr_t) __attribute__((noreturn));
extern void raise_interrupt_x86_64(struct CPUX86State *, int, int, int, int) __attribute__((noreturn));
extern void x86_cpu_do_interrupt_x86_64(struct CPUState *cpu);
extern void do_interrupt_x86_hardirq_x86_64(struct CPUX86State *env, int vector, int is_hw);
extern void tlb_flush_x86_64(struct CPUState *cpu);
extern void tlb_flush_page_x86_64(struct CPUState *cpu, u64 va);
extern void tlb_set_page_x86_64(struct CPUState *, u64 va, u64 pa, int prot, int mmu_idx, u64 size);
extern void tlb_reset_dirty_x86_64(struct CPUState *cpu, u64 start, u64 length);
extern u64 get_page_addr_code_x86_64(struct CPUX86State *env, u64 va);
extern void tb_flush_x86_64(struct CPUState *cpu);
extern void tb_cleanup_x86_64(struct uc_struct *uc);
extern void tb_invalidate_phys_range_x86_64(struct uc_struct *uc, u64 start, u64 end);
extern void cpu_x86_update_cr0_x86_64(struct CPUX86State *env, u32 cr0);
extern void cpu_x86_update_cr3_x86_64(struct CPUX86State *env, u64 cr3);
extern void cpu_x86_update_cr4_x86_64(struct CPUX86State *env, u32 cr4);
extern u32 cpu_cc_compute_all_x86_64(struct CPUX86State *env, int op);
extern u32 cpu_ldub_code_x86_64(struct CPUX86State *env, u64 va);
extern void helper_ldmxcsr_x86_64(struct CPUX86State *env, u32 value);
extern void update_mxcsr_status_x86_64(struct CPUX86State *env);
extern void cpu_set_fpuc_x86_64(struct CPUX86State *env, u16 fpuc);

/* The engine takes the return address itself: its restore subtracts the two bytes. */
#define GETPC() ((uintptr_t)__builtin_return_address(0))
