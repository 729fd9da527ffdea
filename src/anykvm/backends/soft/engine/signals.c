/* Signals and KVM_RUN. The kernel returns EINTR when a signal is deliverable under the active mask, and the handler runs
 * on the way out. In user space that is: block everything while the guest runs, look what is pending, restore the mask.
 * Looking needs the vCPU to leave guest code, of which the ticker takes care (ticker.c). */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* -- the mask ------------------------------------------------------------------------------------------------------ */

#define BIT(signo) (1ull << ((signo) - 1))
#define KERNEL_SIGSET 8

/* All signals but those that a thread raises by what it executes. */
static const u64 everything = ~(BIT(SIGSEGV) | BIT(SIGBUS) | BIT(SIGILL) | BIT(SIGFPE) | BIT(SIGTRAP));

/* The C library's own: it stops a process's threads by them, for setuid() say, and waits for each to answer. */
#ifdef __GLIBC__
static const u64 of_libc = BIT(32) | BIT(33);
#else
static const u64 of_libc = BIT(32) | BIT(33) | BIT(34);
#endif

/* rt_sigprocmask() itself: twice in each KVM_RUN, and glibc's wrapper costs as much as a third of it. */
static void change_mask(int how, const u64 *set, u64 *old)
{
    syscall(SYS_rt_sigprocmask, how, set, old, KERNEL_SIGSET);
}

static void set_mask(const u64 *set, u64 *old)
{
    change_mask(SIG_SETMASK, set, old);
}

/* Block every signal of the program: for a thread that is none of the program's, which must not take one that the program waits for.
 * Those of faults too: such a thread touches no guest memory. Returns the mask to restore. */
u64 ak_signals_block(void)
{
    const u64 all = ~of_libc;
    u64 old;
    set_mask(&all, &old);
    return old;
}

void ak_signals_restore(u64 mask)
{
    set_mask(&mask, NULL);
}

/* Let signals wait; returns the mask the thread had. */
u64 ak_signals_defer(void)
{
    u64 old;
    change_mask(SIG_BLOCK, &everything, &old);
    return old;
}

static __thread pid_t this_thread;

void ak_signals_in_child(void)
{
    this_thread = 0;
}

/* -- signals of faults that somebody sent ----------------------------------------------------------------------------
 *
 * Faults must find their signals open, else the kernel ends the process. A thread that has them blocked may have one
 * pending (SIGBUS of a poisoned page, to be taken by sigwait()): it must not be delivered because we open them. It is
 * taken out before, and sent again when the thread's own mask is back. So is one that is sent while KVM_RUN lasts. */

static __thread struct {
    bool running;    /* KVM_RUN: they are open */
    struct ak_vcpu *vcpu; /* whose */
    bool opened;     /* for one access */
    u64 signals;     /* taken out: bits, and what came with them */
    u64 of_process;  /* those that any thread may take */
    siginfo_t *info;
} held __attribute__((tls_model("initial-exec"))); /* no allocation in a handler */

static siginfo_t *held_info(int signo)
{
    return &held.info[__builtin_popcountll(~everything & (BIT(signo) - 1))];
}

/* In the handler: somebody sent this signal of a fault. False: it was not us who opened it. */
bool ak_hold_signal(const siginfo_t *info)
{
    if (!held.running && !held.opened)
        return false;
    if (info->si_code != SI_TKILL)
        held.of_process |= BIT(info->si_signo);
    if (!(held.signals & BIT(info->si_signo))) /* more of the same are one */
        *held_info(info->si_signo) = *info;
    held.signals |= BIT(info->si_signo);
    if (ak_current)
        ak_kick(ak_current);
    return true;
}

/* In the handler: a SIGSEGV of the ticker's (poke.c) for this thread. Where more signals are pending than RLIMIT_SIGPENDING allows,
 * the kernel delivers one without its information: as if process 0 had sent it. */
bool ak_is_poke(const siginfo_t *info)
{
    if (info->si_code == AK_SI_POKE)
        return info->si_pid == getpid();
    return info->si_signo == SIGSEGV && info->si_code == SI_USER && !info->si_pid && held.running &&
           held.vcpu->pokes != held.vcpu->pokes_seen;
}

/* Signals that are pending for this thread alone; all, where there is no /proc to say which. */
static u64 pending_for_thread(void)
{
    char text[2048];
    int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *at = strstr(text, "SigPnd:");
    return at ? strtoull(at + strlen("SigPnd:"), NULL, 16) : ~0ull;
}

/* The pending ones of `blocked`, which are blocked. One that was sent to the process goes back to the process: this may be
 * a thread that nobody waits for it on. */
static void hold_pending(u64 blocked)
{
    const struct timespec now = {0};
    siginfo_t info;
    u64 pending = 0;
    long signo;
    syscall(SYS_rt_sigpending, &pending, KERNEL_SIGSET);
    if (!(pending & blocked))
        return;
    held.of_process |= pending & blocked & ~pending_for_thread();
    while ((signo = syscall(SYS_rt_sigtimedwait, &blocked, &info, &now, KERNEL_SIGSET)) > 0) {
        *held_info((int)signo) = info;
        held.signals |= BIT(signo);
    }
}

static void release_held(void)
{
    u64 signals = held.signals, of_process = held.of_process;
    held.signals = held.of_process = 0;
    for (; signals; signals &= signals - 1) {
        int signo = __builtin_ctzll(signals) + 1;
        if (!(of_process & BIT(signo)))
            syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), signo, held_info(signo));
        else if (syscall(SYS_rt_sigqueueinfo, getpid(), signo, held_info(signo)))
            kill(getpid(), signo); /* a kill() can be repeated as it was by the main thread alone */
    }
}

/* Before an access that may fault, outside KVM_RUN; `info` is room until ak_faults_close(), which wants the result: 0, or
 * the thread's mask. */
u64 ak_faults_open(siginfo_t info[AK_FAULT_SIGNALS])
{
    u64 mask, opened;
    if (held.running)
        return 0;
    change_mask(SIG_BLOCK, NULL, &mask);
    if (!(mask & (BIT(SIGSEGV) | BIT(SIGBUS))))
        return 0;
    held.info = info;
    hold_pending(mask & (BIT(SIGSEGV) | BIT(SIGBUS)));
    held.opened = true;
    opened = mask & ~(BIT(SIGSEGV) | BIT(SIGBUS));
    set_mask(&opened, NULL);
    return mask;
}

void ak_faults_close(u64 mask)
{
    if (!mask)
        return;
    set_mask(&mask, NULL);
    held.opened = false;
    release_held();
}

/* -- KVM_RUN's mask -------------------------------------------------------------------------------------------------- */

/* kvm_sigset_activate(): the caller's own mask unless KVM_SET_SIGNAL_MASK gave one. */
void ak_signals_enter(struct ak_vcpu *v)
{
    if (__builtin_expect(!this_thread, 0))
        this_thread = gettid();
    v->tid = this_thread;
    v->outer_vcpu = held.running ? held.vcpu : NULL;
    held.vcpu = v;
    v->outer_info = held.running ? held.info : NULL;
    if (!v->outer_info)
        held.info = v->held_info;
    change_mask(SIG_BLOCK, &everything, &v->outer_mask);
    if (__builtin_expect(v->outer_mask & ~everything, 0)) {
        hold_pending(v->outer_mask & ~everything);
        set_mask(&everything, NULL);
    }
    held.running = true;
    v->device_raised = v->device_interrupted = false;
    v->active_mask = v->has_sigmask ? v->sigmask : v->outer_mask;
    v->interrupted = 0;
}

static void send_sigbus(u64 hva)
{
    siginfo_t info = {.si_signo = SIGBUS, .si_code = BUS_MCEERR_AR};
    info.si_addr = (void *)(hva & AK_PAGE_MASK);
    info.si_addr_lsb = 12;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGBUS, &info);
}

void ak_signals_leave(struct ak_vcpu *v)
{
    held.running = v->outer_info != NULL;
    held.vcpu = v->outer_vcpu;
    set_mask(&v->outer_mask, NULL);
    if (__builtin_expect(held.signals != 0 && !held.running, 0)) /* inside of another KVM_RUN what waits goes on waiting */
        release_held();
    if (v->sigbus_hva) {
        send_sigbus(v->sigbus_hva); /* now that the caller's mask decides, as in the kernel */
        v->sigbus_hva = 0;
    }
}

/* A signal that does nothing is never pending for the kernel, but stays pending while it is blocked. */
static bool ignored(int signo)
{
    struct sigaction action;
    ak_host_disposition(signo, &action);
    if (action.sa_flags & SA_SIGINFO)
        return false;
    if (action.sa_handler == SIG_IGN)
        return true;
    return action.sa_handler == SIG_DFL && (signo == SIGCHLD || signo == SIGCONT || signo == SIGURG || signo == SIGWINCH);
}

static bool deliverable(const struct ak_vcpu *v, u64 pending)
{
    for (pending &= ~v->active_mask; pending; pending &= pending - 1)
        if (!ignored(__builtin_ctzll(pending) + 1))
            return true;
    return false;
}

/* Whether one of these, which are pending, or one that CPython has noted, would end the vCPU's KVM_RUN. Any thread; those of faults are never blocked. */
bool ak_signals_would_end(const struct ak_vcpu *v, u64 pending)
{
    return deliverable(v, pending & everything) || ak_python_signal_waits(v);
}

/* Whether one waits for this thread that the vCPU should take. Also in a signal handler. */
bool ak_signal_waits(const struct ak_vcpu *v)
{
    u64 pending = 0;
    syscall(SYS_rt_sigpending, &pending, KERNEL_SIGSET);
    return v->device_interrupted || deliverable(v, pending | held.signals) || ak_python_signal_waits(v);
}

/* signal_pending() under the active mask. */
bool ak_signal_pending(struct ak_vcpu *v)
{
    return v->interrupted || ak_signal_waits(v) || ak_python_interrupted(v);
}

/* kvm_send_hwpoison_signal(): the vCPU's thread gets SIGBUS with the page's host address. True: it is deliverable, and
 * sent when KVM_RUN restores the mask. Else the guest retries, and KVM_RUN goes on until another signal comes. */
bool ak_send_hwpoison_signal(struct ak_vcpu *v)
{
    if (ignored(SIGBUS))
        return false;
    v->sigbus_hva = v->exit.hva | 1; /* page 0 is an address too */
    return !(v->active_mask & BIT(SIGBUS));
}
