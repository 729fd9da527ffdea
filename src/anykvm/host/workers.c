/* Threads of ours. A Python program's signal handlers run on its main thread, between any two bytecodes, and exceptions can be
 * thrown at any thread of it. Neither reaches a thread that the program does not know of. So a call that must not be
 * interrupted is done on such a thread, while the caller waits here.
 *
 * An idle worker is taken, or one is made: a job that blocks holds up its own client alone. Few idle ones are kept. Nothing
 * here knows of Python, or of the interpreter's lock: the client has released it. */
#define _GNU_SOURCE
#include "workers.h"
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_IDLE 2
#define STACK (4ul << 20) /* room for the interpreter's recursion limit; only what is used costs memory */
#define NOWHERE (-1)
#define WAKING_NS 3000
#define LOOKING_NS 30000

enum state { IDLE, JOB, DONE, END };

struct worker {
    struct worker *next; /* in the list of idle ones */
    unsigned state;      /* a futex: in JOB the client waits for it to change, else the worker */
    unsigned asleep[2];  /* the client, the worker: it waits in the kernel */
    int cpu[2];          /* the client's, the worker's; NOWHERE: it has yet to run */
    struct workers_job *job;
    void *keep;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct worker *idle;
static unsigned nidle;
static __thread struct worker *self;

static long futex(unsigned *word, int operation, unsigned value)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static unsigned load(struct worker *w)
{
    return __atomic_load_n(&w->state, __ATOMIC_SEQ_CST);
}

static void change(struct worker *w, enum state to)
{
    __atomic_store_n(&w->state, to, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&w->asleep[to != DONE], __ATOMIC_SEQ_CST))
        futex(&w->state, FUTEX_WAKE, 1);
}

static unsigned long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (unsigned long)t.tv_sec * 1000000000ul + (unsigned long)t.tv_nsec;
}

static bool job_is(struct worker *w, bool there)
{
    unsigned now = load(w);
    return there ? now == JOB || now == END : now != JOB;
}

/* Whether looking for a while can save the sleep: the other side must be at work, on another processor. */
static bool worth_looking(struct worker *w, bool is_worker, unsigned long looked)
{
    int other = __atomic_load_n(&w->cpu[!is_worker], __ATOMIC_RELAXED);
    if (other == NOWHERE) /* a worker that was woken, and does not run yet */
        return looked < WAKING_NS;
    return other != sched_getcpu() && looked < LOOKING_NS;
}

/* Wait until there is a job (the worker), or until it is done (the client). To sleep and be woken costs more than most
 * jobs. */
static void wait_for(struct worker *w, bool is_worker)
{
    unsigned long start = nanoseconds();
    do {
        for (int i = 0; i < 32; i++) {
            if (job_is(w, is_worker))
                return;
            __builtin_ia32_pause();
        }
    } while (worth_looking(w, is_worker, nanoseconds() - start));
    if (is_worker)
        __atomic_store_n(&w->cpu[is_worker], NOWHERE, __ATOMIC_RELAXED);
    __atomic_store_n(&w->asleep[is_worker], 1, __ATOMIC_SEQ_CST);
    for (unsigned now; now = load(w), !job_is(w, is_worker);)
        futex(&w->state, FUTEX_WAIT, now);
    __atomic_store_n(&w->asleep[is_worker], 0, __ATOMIC_SEQ_CST);
}

static void *work(void *argument)
{
    struct worker *w = self = argument;
    pthread_setname_np(pthread_self(), "anykvm-worker");
    for (;;) {
        wait_for(w, true);
        if (load(w) == END)
            break;
        __atomic_store_n(&w->cpu[true], sched_getcpu(), __ATOMIC_RELAXED);
        w->job->run(w->job->argument, &w->keep);
        change(w, DONE);
    }
    w->job->end(&w->keep);
    free(w->job);
    pthread_mutex_lock(&lock); /* until who said END has let go of it */
    pthread_mutex_unlock(&lock);
    free(w);
    return NULL;
}

/* A new thread, with every signal blocked: none of the program's is for it. sigfillset() leaves out the C library's own, by
 * which setuid() has each thread change its user. 0 or a negative errno. */
static int start(struct worker *w)
{
    sigset_t all, old;
    pthread_attr_t attributes;
    pthread_t thread;
    int r = pthread_attr_init(&attributes);
    if (r)
        return -r;
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = pthread_create(&thread, &attributes, work, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    return -r;
}

static struct worker *take_idle(void)
{
    pthread_mutex_lock(&lock);
    struct worker *w = idle;
    if (w) {
        idle = w->next;
        nidle--;
    }
    pthread_mutex_unlock(&lock);
    return w;
}

/* The client gives its worker back; one too many ends, by a job that only says how. Such a worker frees itself, but not while
 * the lock is held. */
static void give_back(struct worker *w, const struct workers_job *job)
{
    struct workers_job *last = NULL;
    pthread_mutex_lock(&lock);
    if (nidle >= MAX_IDLE && (last = malloc(sizeof *last))) {
        *last = *job;
        w->job = last;
        change(w, END);
    } else {
        __atomic_store_n(&w->state, IDLE, __ATOMIC_RELEASE);
        w->next = idle;
        idle = w;
        nidle++;
    }
    pthread_mutex_unlock(&lock);
}

int workers_do(struct workers_job *job)
{
    struct worker *w = take_idle();
    if (w) {
        w->job = job;
        w->cpu[false] = sched_getcpu();
        change(w, JOB);
    } else {
        if (!(w = calloc(1, sizeof *w)))
            return -ENOMEM;
        w->job = job;
        w->cpu[false] = sched_getcpu();
        w->cpu[true] = NOWHERE;
        w->state = JOB;
        int r = start(w);
        if (r) {
            free(w);
            return r;
        }
    }
    wait_for(w, false);
    give_back(w, job);
    return 0;
}

int workers_inside(void)
{
    return self != NULL;
}

unsigned long workers_client(void)
{
    return self ? self->job->client : 0;
}

/* A child of fork() has none of these threads, and a lock of theirs may have been held. */
static void in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    idle = NULL;
    nidle = 0;
    self = NULL;
}

static void __attribute__((constructor)) initialize(void)
{
    pthread_atfork(NULL, NULL, in_child);
}
