/* What run.py is compiled from and the library is built from must be the same engine.h. Both compute this number. */
#pragma once
#include <stddef.h>
#include "engine.h"

#define AK_CONTRACT_FIELDS(X)                                                                                          \
    X(run) X(exit) X(exit.kind) X(exit.err) X(exit.annotate) X(completion) X(stopping) X(string_in) X(has_sigmask)     \
    X(annotate_all) X(ran) X(purge) X(sync_supported) X(mp_state)
#define AK_EXIT_KINDS(X)                                                                                               \
    X(AK_EXIT_NONE) X(AK_EXIT_KICKED) X(AK_EXIT_IO) X(AK_EXIT_MMIO) X(AK_EXIT_HLT) X(AK_EXIT_SHUTDOWN)                 \
    X(AK_EXIT_FAULT) X(AK_EXIT_EMULATION) X(AK_EXIT_SET_TPR) X(AK_EXIT_DELIVERY) X(AK_EXIT_IRQ_WINDOW)                 \
    X(AK_EXIT_HYPERCALL) X(AK_EXIT_DIRTY_FULL) X(AK_EXIT_ENGINE) X(AK_EXIT_HWPOISON)
#define AK_COMPLETIONS(X)                                                                                              \
    X(AK_COMPLETE_NONE) X(AK_COMPLETE_PIO) X(AK_COMPLETE_STRING_IN) X(AK_COMPLETE_MMIO_READ)                           \
    X(AK_COMPLETE_MMIO_WRITE) X(AK_COMPLETE_HYPERCALL)
#define AK_PURGES(X)                                                                                                   \
    X(AK_PURGE_VCPU_RUN) X(AK_PURGE_BEFORE_LOCK) X(AK_PURGE_AFTER_LOCK) X(AK_PURGE_AFTER_COMPLETION) X(AK_PURGE_NEVER)

static inline u64 ak_contract_stamp(void)
{
    u64 stamp = 0xcbf29ce484222325ull; /* FNV-1a, of words */
#define AK_STAMP(value) stamp = (stamp ^ (u64)(value)) * 0x100000001b3ull;
#define AK_STAMP_FIELD(field) AK_STAMP(offsetof(struct ak_vcpu, field)) AK_STAMP(sizeof((struct ak_vcpu *)0)->field)
    AK_CONTRACT_FIELDS(AK_STAMP_FIELD)
    AK_EXIT_KINDS(AK_STAMP)
    AK_COMPLETIONS(AK_STAMP)
    AK_PURGES(AK_STAMP)
    return stamp;
}
u64 ak_engine_stamp(void);
