/* At start: prove that each replacement is in force and each layout fact holds, on one real-mode guest. An engine that was
 * linked differently would not crash, it would be wrong; so it is asked before anybody relies on it. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <string.h>
#include <sys/mman.h>

#define MEMORY 0x10000u
#define CODE 0x1000u
#define HANDLER 0x2000u

static const u8 code[] = {
    0xb0, 0x41, 0xe6, 0xe9,                   /* mov $0x41, %al; out %al, $0xe9 */
    0x66, 0xb9, 0x45, 0x23, 0x01, 0x00,       /* mov $0x12345, %ecx */
    0x0f, 0x32,                               /* rdmsr: #GP, handled at HANDLER */
    0x0f, 0xa2,                               /* cpuid: our table */
    0xb8, 0x00, 0x90, 0x8e, 0xd8,             /* mov $0x9000, %ax; mov %ax, %ds */
    0xc6, 0x06, 0x08, 0x00, 0x07,             /* movb $7, 8: no memslot at 0x90008 */
    0xb8, 0x00, 0x08, 0x8e, 0xd8,             /* mov $0x800, %ax; mov %ax, %ds */
    0xc6, 0x06, 0x00, 0x00, 0x07,             /* movb $7, 0: 0x8000, which the host denies */
    0xf4,                                     /* hlt */
};
static const u8 handler[] = {0x89, 0xe5, 0x83, 0x46, 0x00, 0x02, 0xcf}; /* mov %sp, %bp; addw $2, (%bp); iret */

static const char *run_guest(struct ak_vcpu *v, u8 *memory)
{
    struct kvm_cpuid_entry2 leaf = {.function = 0x12345, .eax = 0xa11c0de};
    ak_cpuid_load(v, &leaf, 1);
    v->env->segs[R_CS].selector = 0;
    v->env->segs[R_CS].base = 0;
    ak_set_rip(v, CODE);
    v->env->regs[R_ESP] = 0x7000;
    v->env->regs[R_EAX] = 0x12345;
    ak_update_hflags(v);
    ak_enter(v);
    if (v->exit.kind != AK_EXIT_IO || v->exit.port != 0xe9 || ((u8 *)v->run)[4096] != 0x41)
        return "port output does not leave the engine";
    if (ak_get_rip(v) != CODE + 2)
        return "RIP is wrong at an exit";
    ak_complete_pio(v);
    v->env->regs[R_EAX] = 0x12345;
    ak_enter(v);
    if (v->env->regs[R_EAX] == 0x12345)
        return "CPUID is not answered by the table";
    if (v->exit.kind != AK_EXIT_MMIO || v->exit.gpa != 0x90008 || !v->exit.is_write || v->exit.size != 1)
        return "RDMSR of an unknown register is not #GP, or a device write does not leave the engine";
    ak_next_fragment(v);
    ak_enter(v);
    if (v->exit.kind != AK_EXIT_FAULT || v->exit.gpa != 0x8000 || v->exit.hva != (u64)memory + 0x8000)
        return "a page that the host denies does not fault";
    if (!ak_helper_return(v))
        return "the frame of translated code was not found";
    mprotect(memory + 0x8000, AK_PAGE_SIZE, PROT_READ | PROT_WRITE);
    ak_enter(v);
    if (v->exit.kind != AK_EXIT_HLT || memory[0x8000] != 7)
        return "a page that came back is not used";
    return NULL;
}

/* NULL, or what does not hold. */
const char *ak_self_test(void)
{
    struct ak_vm *vm = ak_vm_create();
    void *run = mmap(NULL, 3 * AK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    u8 *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const char *wrong = "no memory";
    if (!vm || run == MAP_FAILED || memory == MAP_FAILED)
        return wrong;
    struct ak_slot slot = {.npages = MEMORY / AK_PAGE_SIZE, .hva = (u64)memory};
    memcpy(memory + CODE, code, sizeof code);
    memcpy(memory + HANDLER, handler, sizeof handler);
    memcpy(memory + 13 * 4, &(u32){HANDLER}, 4);
    mprotect(memory + 0x8000, AK_PAGE_SIZE, PROT_NONE);
    struct ak_slot *prepared = ak_slot_prepare(vm, &slot);
    struct ak_vcpu *v;
    if (prepared && !ak_vcpu_create(vm, 0, run, &v)) {
        ak_slot_link(vm, prepared);
        ak_vcpu_lock(v);
        wrong = run_guest(v, memory);
        ak_vcpu_unlock(v);
        ak_vcpu_destroy(v);
    }
    ak_vm_destroy(vm);
    munmap(run, 3 * AK_PAGE_SIZE);
    munmap(memory, MEMORY);
    return wrong;
}
