/* The ticker: one thread that kicks a vCPU which has not left guest code by itself for a millisecond, so that KVM_RUN can
 * look for signals (signals.c), and wakes one that sleeps in a page fault although a signal waits for it. */
#define _GNU_SOURCE
#include "engine_internal.h"
#include <linux/close_range.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 1000000
#define IDLE_TICKS 50
#define STACK_SIZE (256u << 10)

static pthread_mutex_t ticker_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ticker_wake = PTHREAD_COND_INITIALIZER;
static struct ak_vcpu *watched; /* by next_watched */
static bool ticker_started;
static bool ticker_idle = true;
static u32 idle_ticks = IDLE_TICKS;
static u32 idle_pause_us;

/* For tests: after how many quiet ticks the ticker sleeps, and how long it dawdles between looking and saying so. */
void ak_ticker_tune(u32 ticks, u32 pause_us)
{
    pthread_mutex_lock(&ticker_lock);
    idle_ticks = ticks ? ticks : IDLE_TICKS;
    idle_pause_us = pause_us;
    pthread_mutex_unlock(&ticker_lock);
}

static bool tick(void)
{
    bool busy = false;
    for (struct ak_vcpu *v = watched; v; v = v->next_watched) {
        if (v->in_guest && v->entries == v->tick_entries) {
            v->ticks++;
            ak_kick(v);
            if (v->tick_stuck++)
                ak_poke(v);
        } else
            v->tick_stuck = 0;
        busy |= v->in_guest || v->entries != v->tick_entries;
        v->tick_entries = v->entries;
    }
    return busy;
}

/* Nothing to do: sleep until a vCPU enters the guest. It says so (entries) before it looks at ticker_idle, and here it is the
 * other way round, each with a full barrier between: whichever comes second sees the other. */
static void idle(void)
{
    __atomic_store_n(&ticker_idle, true, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (tick()) {
        __atomic_store_n(&ticker_idle, false, __ATOMIC_SEQ_CST);
        return;
    }
    while (ticker_idle)
        pthread_cond_wait(&ticker_wake, &ticker_lock);
}

static void *ticker(void *unused)
{
    u32 quiet = 0;
    (void)unused;
    /* A table of descriptors of its own, an empty one: the program may have used up its own, and poke.c needs one. */
    syscall(SYS_close_range, 0, ~0u, CLOSE_RANGE_UNSHARE);
    pthread_mutex_lock(&ticker_lock);
    for (;;) {
        struct timespec pause = {.tv_nsec = TICK_NS};
        ak_host_init(); /* the program may have put its own handler over ours */
        quiet = tick() ? 0 : quiet + 1;
        if (quiet > idle_ticks) {
            if (idle_pause_us)
                usleep(idle_pause_us);
            idle();
            quiet = 0;
        }
        pthread_mutex_unlock(&ticker_lock);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&ticker_lock);
    }
    return NULL;
}

/* Have the thread, without which no signal would end a KVM_RUN: before there is a vCPU. 0 or what pthread_create() says,
 * negative: -EAGAIN. */
int ak_ticker_start(void)
{
    pthread_t thread;
    pthread_attr_t attributes;
    int r = 0;
    pthread_mutex_lock(&ticker_lock);
    if (!ticker_started) {
        u64 old = ak_signals_block(); /* no signal of the process is for the ticker */
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK_SIZE);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        r = -pthread_create(&thread, &attributes, ticker, NULL);
        pthread_attr_destroy(&attributes);
        ticker_started = !r;
        if (!r)
            pthread_setname_np(thread, "anykvm-ticker"); /* its maker's name otherwise; it never ends */
        ak_signals_restore(old);
    }
    pthread_mutex_unlock(&ticker_lock);
    return r;
}

/* Before guest code runs, v->in_guest set: have it watched. The count is a full barrier (idle()). */
void ak_ticker_arm(struct ak_vcpu *v)
{
    __atomic_add_fetch(&v->entries, 1, __ATOMIC_SEQ_CST);
    if (__builtin_expect(!__atomic_load_n(&ticker_idle, __ATOMIC_SEQ_CST), 1))
        return;
    ak_host_init();
    pthread_mutex_lock(&ticker_lock);
    __atomic_store_n(&ticker_idle, false, __ATOMIC_SEQ_CST);
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
