/* Signals and KVM_RUN. The kernel returns EINTR when a signal is deliverable under the active mask, and the handler runs
 * on the way out. In user space that is: block everything while the guest runs, look what is pending, restore the mask.
 * Looking needs the vCPU to leave guest code, so a ticker kicks one that has not left by itself for a millisecond, and
 * wakes one that sleeps in a page fault. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 1000000
#define IDLE_TICKS 50

/* -- the mask ------------------------------------------------------------------------------------------------------ */

#define BIT(signo) (1ull << ((signo) - 1))
#define KERNEL_SIGSET 8

/* All signals but those that a thread raises by what it executes. */
static const u64 everything = ~(BIT(SIGSEGV) | BIT(SIGBUS) | BIT(SIGILL) | BIT(SIGFPE) | BIT(SIGTRAP));

/* rt_sigprocmask() itself: twice in each KVM_RUN, and glibc's wrapper costs as much as a third of it. */
static void change_mask(int how, const u64 *set, u64 *old)
{
    syscall(SYS_rt_sigprocmask, how, set, old, KERNEL_SIGSET);
}

static void set_mask(const u64 *set, u64 *old)
{
    change_mask(SIG_SETMASK, set, old);
}

static __thread pid_t this_thread;

/* -- signals of faults that somebody sent ----------------------------------------------------------------------------
 *
 * Faults must find their signals open, else the kernel ends the process. A thread that has them blocked may have one
 * pending (SIGBUS of a poisoned page, to be taken by sigwait()): it must not be delivered because we open them. It is
 * taken out before, and sent again when the thread's own mask is back. So is one that is sent while KVM_RUN lasts. */

static __thread struct {
    bool running;    /* KVM_RUN: they are open */
    u64 signals;     /* taken out: bits, and what came with them */
    siginfo_t *info;
} held __attribute__((tls_model("initial-exec"))); /* no allocation in a handler */

static siginfo_t *held_info(int signo)
{
    return &held.info[__builtin_popcountll(~everything & (BIT(signo) - 1))];
}

/* In the handler: somebody sent this signal of a fault to a thread in KVM_RUN. False: it is not in KVM_RUN. */
bool ak_hold_signal(const siginfo_t *info)
{
    if (!held.running)
        return false;
    if (!(held.signals & BIT(info->si_signo))) /* more of the same are one */
        *held_info(info->si_signo) = *info;
    held.signals |= BIT(info->si_signo);
    if (ak_current)
        ak_kick(ak_current);
    return true;
}

/* The pending ones of `blocked`, which are blocked. */
static void hold_pending(u64 blocked)
{
    const struct timespec now = {0};
    siginfo_t info;
    long signo;
    while ((signo = syscall(SYS_rt_sigtimedwait, &blocked, &info, &now, KERNEL_SIGSET)) > 0) {
        *held_info((int)signo) = info;
        held.signals |= BIT(signo);
    }
}

static void release_held(void)
{
    u64 signals = held.signals;
    held.signals = 0;
    for (; signals; signals &= signals - 1) {
        int signo = __builtin_ctzll(signals) + 1;
        syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), signo, held_info(signo));
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
    opened = mask & ~(BIT(SIGSEGV) | BIT(SIGBUS));
    set_mask(&opened, NULL);
    return mask;
}

void ak_faults_close(u64 mask)
{
    if (!mask)
        return;
    set_mask(&mask, NULL);
    release_held();
}

/* -- KVM_RUN's mask -------------------------------------------------------------------------------------------------- */

/* kvm_sigset_activate(): the caller's own mask unless KVM_SET_SIGNAL_MASK gave one. */
void ak_signals_enter(struct ak_vcpu *v)
{
    if (__builtin_expect(!this_thread, 0))
        this_thread = gettid();
    v->tid = this_thread;
    held.info = v->held_info;
    change_mask(SIG_BLOCK, &everything, &v->outer_mask);
    if (__builtin_expect(v->outer_mask & ~everything, 0)) {
        hold_pending(v->outer_mask & ~everything);
        set_mask(&everything, NULL);
    }
    held.running = true;
    v->active_mask = v->has_sigmask ? v->sigmask : v->outer_mask;
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
    held.running = false;
    set_mask(&v->outer_mask, NULL);
    if (__builtin_expect(held.signals != 0, 0))
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

/* signal_pending() under the active mask. */
bool ak_signal_pending(struct ak_vcpu *v)
{
    u64 pending = 0;
    syscall(SYS_rt_sigpending, &pending, KERNEL_SIGSET);
    return deliverable(v, pending | held.signals) || ak_python_interrupted(v);
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

/* -- the ticker ---------------------------------------------------------------------------------------------------- */

static pthread_mutex_t ticker_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ticker_wake = PTHREAD_COND_INITIALIZER;
static struct ak_vcpu *watched[4096];
static u32 nwatched;
static bool ticker_started;
static volatile bool ticker_idle = true;

static bool read_proc(pid_t tid, const char *what, char *text, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/%s", (int)tid, what);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    return n > 0;
}

static u64 field(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, 16) : 0;
}

/* A kicked vCPU that does not leave sleeps in a page fault that somebody is to resolve: a userfaultfd's. The kernel's
 * KVM_RUN would end with EINTR when a signal comes (FOLL_INTERRUPTIBLE, KVM_PFN_ERR_SIGPENDING). Its signals are blocked
 * here, so look for one that it should take, and wake it with the one signal that is always open in KVM_RUN and always
 * ours: SIGSEGV, marked. Done so that it cannot arrive after KVM_RUN (ak_pokes_settle). */
static void poke(struct ak_vcpu *v)
{
    char text[2048];
    unsigned long long sp, pc;
    if (!read_proc(v->tid, "syscall", text, sizeof text) || sscanf(text, "-1 %llx %llx", &sp, &pc) != 2)
        return; /* it runs, or is in a system call: not in a page fault */
    if (!read_proc(v->tid, "status", text, sizeof text) ||
        !deliverable(v, (field(text, "SigPnd:") | field(text, "ShdPnd:")) & everything))
        return;
    siginfo_t info = {.si_signo = SIGSEGV, .si_code = AK_SI_POKE};
    info.si_pid = getpid();
    info.si_value.sival_ptr = (void *)(uintptr_t)pc;
    __atomic_add_fetch(&v->pokes, 1, __ATOMIC_SEQ_CST);
    if (v->in_guest && v->entries == v->tick_entries)
        syscall(SYS_rt_tgsigqueueinfo, getpid(), v->tid, SIGSEGV, &info);
    __atomic_add_fetch(&v->pokes, 1, __ATOMIC_SEQ_CST);
}

/* Out of guest mode: let the pokes that were sent arrive before anything else happens on this thread. */
void ak_pokes_settle(struct ak_vcpu *v)
{
    u32 now;
    while ((now = __atomic_load_n(&v->pokes, __ATOMIC_SEQ_CST)) & 1)
        sched_yield();
    syscall(SYS_getpid); /* signals are delivered when a system call returns */
    v->pokes_seen = now;
}

static bool tick(void)
{
    bool busy = false;
    for (u32 i = 0; i < nwatched; i++) {
        struct ak_vcpu *v = watched[i];
        if (v->in_guest && v->entries == v->tick_entries) {
            v->ticks++;
            ak_kick(v);
            if (v->tick_stuck++)
                poke(v);
        } else
            v->tick_stuck = 0;
        busy |= v->in_guest || v->entries != v->tick_entries;
        v->tick_entries = v->entries;
    }
    return busy;
}

static void *ticker(void *unused)
{
    u32 quiet = 0;
    (void)unused;
    pthread_mutex_lock(&ticker_lock);
    for (;;) {
        struct timespec pause = {.tv_nsec = TICK_NS};
        ak_host_init(); /* the program may have put its own handler over ours */
        quiet = tick() ? 0 : quiet + 1;
        if (quiet > IDLE_TICKS) {
            ticker_idle = true;
            while (ticker_idle)
                pthread_cond_wait(&ticker_wake, &ticker_lock);
            quiet = 0;
        }
        pthread_mutex_unlock(&ticker_lock);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&ticker_lock);
    }
    return NULL;
}

static void start_ticker(void)
{
    pthread_t thread;
    u64 old;
    set_mask(&everything, &old); /* no signal of the process is for the ticker */
    if (!pthread_create(&thread, NULL, ticker, NULL)) {
        pthread_detach(thread);
        ticker_started = true;
    }
    set_mask(&old, NULL);
}

/* Before guest code runs: have it watched. */
void ak_ticker_arm(struct ak_vcpu *v)
{
    v->entries++;
    if (__builtin_expect(!ticker_idle, 1))
        return;
    ak_host_init();
    pthread_mutex_lock(&ticker_lock);
    ticker_idle = false;
    if (!ticker_started)
        start_ticker();
    pthread_cond_signal(&ticker_wake);
    pthread_mutex_unlock(&ticker_lock);
}

int ak_watch(struct ak_vcpu *v)
{
    int r = 0;
    pthread_mutex_lock(&ticker_lock);
    if (nwatched < sizeof watched / sizeof *watched)
        watched[nwatched++] = v;
    else
        r = -ENOMEM;
    pthread_mutex_unlock(&ticker_lock);
    return r;
}

void ak_unwatch(struct ak_vcpu *v)
{
    pthread_mutex_lock(&ticker_lock);
    for (u32 i = 0; i < nwatched; i++)
        if (watched[i] == v) {
            watched[i] = watched[--nwatched];
            break;
        }
    pthread_mutex_unlock(&ticker_lock);
}

/* -- vcpu->mutex, and a VM's life ---------------------------------------------------------------------------------- */

static u32 mm_generation = 1;

static void in_child(void)
{
    mm_generation++; /* VMs of the parent are another mm's: EIO */
    ticker_started = false;
    ticker_idle = true;
    nwatched = 0;
    this_thread = 0;
    pthread_mutex_init(&ticker_lock, NULL);
    pthread_cond_init(&ticker_wake, NULL); /* the parent's ticker waits in it, who is not here to leave it */
    ak_devices_in_child();
}

static void __attribute__((constructor)) watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

u32 ak_mm_generation(void)
{
    return mm_generation;
}

/* km:kvm_vcpu_ioctl: another mm, or a dead VM. */
int ak_vcpu_dead(struct ak_vcpu *v)
{
    return v->vm->dead || v->vm->mm != mm_generation ? -EIO : 0;
}

int ak_vcpu_lock(struct ak_vcpu *v)
{
    return -pthread_mutex_lock(&v->mutex);
}

void ak_vcpu_unlock(struct ak_vcpu *v)
{
    pthread_mutex_unlock(&v->mutex);
}
