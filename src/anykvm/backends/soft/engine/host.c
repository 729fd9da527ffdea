/* Host memory that may not be there. Guest memory is the process's own, so the host's MMU is the second stage of the
 * guest's: what it refuses arrives here as SIGSEGV or SIGBUS. Two cases are ours: an access under a guard (a TLB fill
 * probing a page, a copy from or to the caller), and an access by guest code whose mapping changed without a
 * word to us (fault.c leaves the guest precisely). So is a trap of the engine itself, for which SIGILL and SIGFPE are
 * taken too (trap.c). A last one is the ticker's (poke.c): a fault waits for its handler, and a signal waits for the
 * thread. What somebody sent waits until KVM_RUN is over (signals.c). Everything else goes to whoever
 * handled the signal before. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <errno.h>
#include <string.h>
#include <ucontext.h>

struct guard {
    sigjmp_buf env;
    volatile sig_atomic_t armed;
    enum ak_host_fault outcome;
    u64 address;
};
static __thread struct guard guard __attribute__((tls_model("initial-exec"))); /* no allocation in a handler */
static const int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static struct sigaction previous[4];

bool ak_at_guest_access(struct ak_vcpu *v, const ucontext_t *context);
bool ak_guest_host_fault(struct ak_vcpu *v, u64 address, enum ak_host_fault why, ucontext_t *uc);
bool ak_engine_trap(struct ak_vcpu *v, int signo, const ucontext_t *context);
void ak_float_of_interrupted(const ucontext_t *context);

static struct sigaction *previous_of(int signo)
{
    return &previous[signo == SIGSEGV ? 0 : signo == SIGBUS ? 1 : signo == SIGILL ? 2 : 3];
}

static enum ak_host_fault classify(int signo, const siginfo_t *si)
{
    if (signo == SIGBUS)
        return si->si_code == BUS_MCEERR_AR ? AK_HOST_POISONED : AK_HOST_BEYOND;
    return si->si_code == SEGV_ACCERR ? AK_HOST_DENIED : AK_HOST_UNMAPPED;
}

static void pass_on(int signo, siginfo_t *si, void *context)
{
    struct sigaction *old = previous_of(signo);
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(signo, si, context);
    else if (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN)
        old->sa_handler(signo);
    else {
        sigaction(signo, old, NULL); /* the default action, at the faulting instruction or by raising again */
        if (si->si_code <= 0)
            raise(signo);
    }
}

/* The ticker's word that this thread sleeps in a page fault, at pc, while a signal waits for it (poke.c). By now it
 * may sleep no longer; at pc it has not executed the access, so leaving is as exact as at the fault itself, if the access
 * is the guest's. Any other, of the engine's own memory, ends by itself. With pc 0 the ticker could not look: it is wherever it
 * is, and there may be no signal. */
static void on_poke(u64 pc, ucontext_t *context)
{
    struct ak_vcpu *v = ak_current;
    if (!v || (!pc && !ak_signal_waits(v)))
        return;
    pc = pc ? pc : (u64)context->uc_mcontext.gregs[REG_RIP];
    if (guard.armed) {
        if (!v->interruptible)
            return;
        guard.outcome = AK_HOST_INTERRUPTED;
        ak_float_of_interrupted(context);
        siglongjmp(guard.env, 1);
    }
    if (v->emulation == AK_NATIVE && (u64)context->uc_mcontext.gregs[REG_RIP] == pc && ak_at_guest_access(v, context)) {
        ak_kick(v);
        ak_guest_host_fault(v, pc, AK_HOST_INTERRUPTED, context);
    }
}

/* A fault of this thread's own. Does not return if it is ours: of an access under a guard, or of a guest. */
static void on_fault(int signo, siginfo_t *si, void *context)
{
    if (signo == SIGSEGV || signo == SIGBUS) {
        enum ak_host_fault why = classify(signo, si);
        if (guard.armed) {
            guard.outcome = why;
            guard.address = (u64)si->si_addr;
            ak_float_of_interrupted(context);
            siglongjmp(guard.env, 1);
        }
        if (ak_current)
            ak_guest_host_fault(ak_current, (u64)si->si_addr, why, context);
    }
    if (ak_current)
        ak_engine_trap(ak_current, signo, context);
}

static void on_signal(int signo, siginfo_t *si, void *context)
{
    int saved = errno;
    if (ak_is_poke(si)) {
        on_poke(si->si_code == AK_SI_POKE ? (u64)si->si_value.sival_ptr : 0, context);
        errno = saved;
        return;
    }
    if (si->si_code > 0) /* from the kernel: a fault of this thread, not kill() */
        on_fault(signo, si, context);
    errno = saved;
    if (si->si_code > 0 || !ak_hold_signal(si))
        pass_on(signo, si, context);
}

/* Install the handlers, once more if somebody replaced them. SA_NODEFER: a guard is left by a jump, which must not
 * leave the signal blocked. SA_ONSTACK is not set: guest code runs on this thread's own stack. */
int ak_host_init(void)
{
    for (int i = 0; i < 4; i++) {
        struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
        ours.sa_sigaction = on_signal;
        sigemptyset(&ours.sa_mask);
        if (sigaction(signals[i], NULL, &now))
            return -errno;
        if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_signal)
            continue;
        previous[i] = now;
        if (sigaction(signals[i], &ours, NULL))
            return -errno;
    }
    return 0;
}

/* What the program itself wants with a signal: what is behind our handler. */
void ak_host_disposition(int signo, struct sigaction *action)
{
    if (sigaction(signo, NULL, action))
        *action = (struct sigaction){.sa_handler = SIG_DFL};
    if ((action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_signal)
        *action = *previous_of(signo);
}

/* An access under the guard; `refused` runs if the host refuses it, with guard.outcome. */
#define UNDER_GUARD(access, refused)                                                                                   \
    siginfo_t waiting[AK_FAULT_SIGNALS];                                                                               \
    u64 mask = ak_faults_open(waiting);                                                                                \
    if (sigsetjmp(guard.env, 0)) {                                                                                     \
        guard.armed = 0;                                                                                               \
        ak_faults_close(mask);                                                                                         \
        refused;                                                                                                       \
    }                                                                                                                  \
    guard.armed = 1;                                                                                                   \
    __asm__ volatile("" ::: "memory");                                                                                 \
    access;                                                                                                            \
    __asm__ volatile("" ::: "memory");                                                                                 \
    guard.armed = 0;                                                                                                   \
    ak_faults_close(mask)

static inline void touch(u64 hva, bool write)
{
    if (write)
        __asm__ volatile("lock orb $0, %0" : "+m"(*(volatile u8 *)hva));
    else
        (void)*(volatile u8 *)hva;
}

/* Touch one page as get_user_pages() would: read for reads, write (without a change) for writes. */
int ak_host_touch(u64 hva, bool write, u64 *address)
{
    UNDER_GUARD(touch(hva, write), {
        if (address)
            *address = guard.address;
        return guard.outcome;
    });
    return AK_HOST_OK;
}

/* Byte by byte upwards, as far as anybody can see: what stops it leaves all bytes before it copied, and none behind it.
 * memcpy() copies in an order of its own. */
static inline void copy_upwards(void *to, const void *from, u64 size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

static int guarded_copy(void *to, const void *from, u64 size)
{
    if (!size)
        return 0;
    UNDER_GUARD(copy_upwards(to, from, size), return -EFAULT);
    return 0;
}

/* Whether host memory still holds these bytes; memory that is not there does not. */
bool ak_host_equal(u64 hva, const void *bytes, u64 size)
{
    bool same;
    UNDER_GUARD(same = !memcmp((const void *)hva, bytes, size), return false);
    return same;
}

static bool user_range(u64 at, u64 size)
{
    return at + size >= at && at + size <= (1ull << 47) - AK_PAGE_SIZE;
}

int ak_copy_in(void *to, u64 from, u64 size)
{
    return user_range(from, size) ? guarded_copy(to, (const void *)from, size) : -EFAULT;
}

int ak_copy_out(u64 to, const void *from, u64 size)
{
    return user_range(to, size) ? guarded_copy((void *)to, from, size) : -EFAULT;
}

static inline u64 load(u64 hva, u32 size, bool write)
{
    if (write)
        touch(hva, true);
    return size == 8 ? *(volatile u64 *)hva : *(volatile u32 *)hva;
}

/* One guarded load of a 4- or 8-byte entry; with write, also prove the page writable. enum ak_host_fault. */
int ak_host_load(u64 hva, u32 size, bool write, u64 *value)
{
    UNDER_GUARD(*value = load(hva, size, write), return guard.outcome);
    return AK_HOST_OK;
}

static inline bool replace(u64 hva, u32 size, u64 old, u64 new)
{
    return size == 8 ? __sync_bool_compare_and_swap((u64 *)hva, old, new)
                     : __sync_bool_compare_and_swap((u32 *)hva, (u32)old, (u32)new);
}

/* Replace an entry if it is still old. 0, 1 if it changed, or (negated) enum ak_host_fault. */
int ak_host_cmpxchg(u64 hva, u32 size, u64 old, u64 new)
{
    bool same;
    UNDER_GUARD(same = replace(hva, size, old, new), return -(int)guard.outcome);
    return same ? 0 : 1;
}

static inline u64 merge(u64 hva, u64 mask, u64 value)
{
    u64 old = *(volatile u64 *)hva;
    while (!__atomic_compare_exchange_n((u64 *)hva, &old, (old & ~mask) | (value & mask), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
        ;
    return old;
}

/* Replace the bytes of `bytes` in the 8 aligned ones at hva, in one step; *before: as they were. enum ak_host_fault */
int ak_host_merge(u64 hva, u64 bytes, u64 value, u64 *before)
{
    UNDER_GUARD(*before = merge(hva, bytes, value), return guard.outcome);
    return AK_HOST_OK;
}

static inline void unmerge(u64 hva, u64 mask, u64 value, u64 before)
{
    u64 old = *(volatile u64 *)hva;
    while (!((old ^ value) & mask) &&
           !__atomic_compare_exchange_n((u64 *)hva, &old, (old & ~mask) | (before & mask), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
        ;
}

/* Undo it. What others have written since, or a page that is gone, stays as it is. */
void ak_host_unmerge(u64 hva, u64 bytes, u64 value, u64 before)
{
    UNDER_GUARD(unmerge(hva, bytes, value, before), return);
}
