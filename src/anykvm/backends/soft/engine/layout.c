/* What C and Python both know: sizes and offsets of structures, values of names, types of functions. Python compares its own
 * with these rows when it loads the library (layout.py), and does not run with another engine than it was written for. A
 * structure's row says its size, so that a field that is missing in Python cannot go unnoticed. */
#include "layout.h"

struct row {
    const char *name;
    u64 value, size;
};

#define STRUCT(type) {"struct " #type, sizeof(struct type), 0},
#define FIELD(type, field) {"struct " #type "." #field, offsetof(struct type, field), sizeof((struct type *)0)->field},
#define VALUE(name) {#name, name, 0},
#define FUNCTION(type, name, arguments) {#type " " #name #arguments, 0, 0},

#define SLOT(field) FIELD(ak_slot, field)
#define EXIT(field) FIELD(ak_exit, field)
#define VCPU(field) FIELD(ak_vcpu, field)

static const struct row rows[] = {
    STRUCT(ak_slot)
    SLOT(base_gfn) SLOT(npages) SLOT(hva) SLOT(flags) SLOT(id) SLOT(dirty_bitmap) SLOT(gmem) SLOT(gmem_offset)
    SLOT(gmem_only) SLOT(mapped) SLOT(any_mapped)
    STRUCT(ak_exit)
    EXIT(kind) EXIT(size) EXIT(gpa) EXIT(hva) EXIT(access) EXIT(err) EXIT(annotate) EXIT(flags) EXIT(host_fault)
    EXIT(slot_id) EXIT(port) EXIT(count) EXIT(is_write) EXIT(ninsn) EXIT(data) EXIT(insn)
    /* the head: what the contract reads and writes */
    VCPU(run) VCPU(exit) VCPU(completion) VCPU(stopping) VCPU(string_in) VCPU(has_sigmask) VCPU(annotate_all) VCPU(ran)
    VCPU(purge) VCPU(sync_supported) VCPU(mp_state)
    /* the kernel's, which Python hands over as buffers (ioctl.c) */
    STRUCT(kvm_regs) STRUCT(kvm_sregs) STRUCT(kvm_fpu) STRUCT(kvm_xcrs) STRUCT(kvm_debugregs) STRUCT(kvm_vcpu_events)
    STRUCT(kvm_msrs) STRUCT(kvm_msr_entry) STRUCT(kvm_cpuid2) STRUCT(kvm_cpuid_entry2) STRUCT(kvm_mp_state)
    STRUCT(kvm_translation) STRUCT(kvm_interrupt) STRUCT(kvm_signal_mask) STRUCT(kvm_xsave)
    STRUCT(ak_pre_fault_memory)
    AK_EXIT_KINDS(VALUE)
    AK_COMPLETIONS(VALUE)
    VALUE(AK_DEVICE_PRESENT) VALUE(AK_DEVICE_FAILED) VALUE(AK_DEVICE_READ_ONLY) VALUE(AK_DEVICE_INTERRUPTED)
    VALUE(AK_DEVICE_RAISED)
    AK_PURGES(VALUE)
    VALUE(AK_READ) VALUE(AK_WRITE) VALUE(AK_FETCH)
    VALUE(AK_INIT_AFTER_SHUTDOWN) VALUE(AK_EMULATE_IN_DELIVERY) VALUE(AK_ANY_EFER) VALUE(AK_SYNC_LOW_HALF)
    VALUE(AK_STALE_PRE_FAULT) VALUE(AK_HYPERCALL_6_12)
    VALUE(AK_GMEM_MMAP) VALUE(AK_GMEM_INIT_SHARED)
    VALUE(AK_MAXPHYADDR) VALUE(AK_PAGE_SIZE) VALUE(AK_DIRTY_RING_RESERVED)
    AK_EXPORTS(FUNCTION)
    AK_CONTRACT_EXPORTS(FUNCTION)
};

/* Row by row: NULL ends it. Three functions of plain numbers, so that reading the table needs no structure. */
const char *ak_layout_name(u32 row)
{
    return row < sizeof rows / sizeof *rows ? rows[row].name : NULL;
}

u64 ak_layout_value(u32 row)
{
    return rows[row].value;
}

u64 ak_layout_size(u32 row)
{
    return rows[row].size;
}

u64 ak_engine_stamp(void)
{
    return ak_contract_stamp();
}
