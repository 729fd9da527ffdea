/* The ticker: one thread that kicks a vCPU which has not left guest code by itself for a millisecond, so that KVM_RUN can
 * look for signals (signals.c), and wakes one that sleeps in a page fault although a signal waits for it. */
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

static pthread_mutex_t ticker_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ticker_wake = PTHREAD_COND_INITIALIZER;
static struct ak_vcpu *watched; /* by next_watched */
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
        !ak_signals_would_end(v, field(text, "SigPnd:") | field(text, "ShdPnd:")))
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
    for (struct ak_vcpu *v = watched; v; v = v->next_watched) {
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
    u64 old = ak_signals_block(); /* no signal of the process is for the ticker */
    if (!pthread_create(&thread, NULL, ticker, NULL)) {
        pthread_detach(thread);
        ticker_started = true;
    }
    ak_signals_restore(old);
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

void ak_watch(struct ak_vcpu *v)
{
    pthread_mutex_lock(&ticker_lock);
    v->next_watched = watched;
    watched = v;
    pthread_mutex_unlock(&ticker_lock);
}

void ak_unwatch(struct ak_vcpu *v)
{
    pthread_mutex_lock(&ticker_lock);
    for (struct ak_vcpu **p = &watched; *p; p = &(*p)->next_watched)
        if (*p == v) {
            *p = v->next_watched;
            break;
        }
    pthread_mutex_unlock(&ticker_lock);
}

void ak_ticker_in_child(void)
{
    ticker_started = false;
    ticker_idle = true;
    watched = NULL;
    pthread_mutex_init(&ticker_lock, NULL);
    pthread_cond_init(&ticker_wake, NULL); /* the parent's ticker waits in it, who is not here to leave it */
}
