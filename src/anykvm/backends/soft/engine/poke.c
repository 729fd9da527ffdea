/* Waking a vCPU that sleeps in a page fault although a signal waits for it: what the ticker (ticker.c) does with one that it
 * has kicked and that does not leave the guest. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLIND_TICKS 128 /* between two pokes that may be for nothing */

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

/* The signals that wait for a vCPU's thread. False: without /proc only those of the process can be told. */
static bool pending(const struct ak_vcpu *v, u64 *signals)
{
    char text[2048];
    if (read_proc(v->tid, "status", text, sizeof text)) {
        *signals = field(text, "SigPnd:") | field(text, "ShdPnd:");
        return true;
    }
    syscall(SYS_rt_sigpending, signals, sizeof *signals); /* this thread has none of its own */
    return false;
}

/* Where a thread sleeps in a page fault. False: it does not. 0: it cannot be told (no /proc; a process that has changed its user
 * may not read it). */
static bool asleep_at(const struct ak_vcpu *v, u64 *at)
{
    char text[256];
    unsigned long long sp, pc;
    *at = 0;
    if (!read_proc(v->tid, "syscall", text, sizeof text))
        return true;
    if (sscanf(text, "-1 %llx %llx", &sp, &pc) != 2)
        return false; /* it runs, or is in a system call */
    *at = pc;
    return true;
}

/* A kicked vCPU that does not leave sleeps in a page fault that somebody is to resolve: a userfaultfd's. The kernel's
 * KVM_RUN would end with EINTR when a signal comes (FOLL_INTERRUPTIBLE, KVM_PFN_ERR_SIGPENDING). Its signals are blocked
 * here, so look for one that it should take, and wake it with the one signal that is always open in KVM_RUN and always
 * ours: SIGSEGV, marked. Done so that it cannot arrive after KVM_RUN (ak_pokes_settle).
 *
 * Waking it for nothing makes its fault happen again, which a userfaultfd's handler sees. So without /proc it is done now and
 * then only, for a signal that was sent to the thread; the thread itself looks whether there is one (host.c). */
void ak_poke(struct ak_vcpu *v)
{
    u64 signals, pc;
    bool certain = pending(v, &signals);
    if (!ak_signals_would_end(v, signals) && (certain || v->tick_stuck % BLIND_TICKS))
        return;
    if (!asleep_at(v, &pc))
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
