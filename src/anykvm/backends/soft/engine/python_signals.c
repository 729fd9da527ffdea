/* Signals that CPython has noted. While its main thread is in KVM_RUN with signals blocked, another thread takes a signal that
 * is sent to the process (Ctrl-C, a timer's SIGALRM, SIGTERM). CPython's own handler notes it there. The Python function is
 * for the main thread, which the guest keeps. So KVM_RUN ends with EINTR, as the kernel's does: there the main thread would
 * have taken the signal itself.
 *
 * CPython keeps a flag for it: "a signal was noted, and its function was not called". The extension module that knows its
 * address (python_flag.c) tells us. Without it only SIGINT can be asked for, and only now and then. In programs that are not
 * Python all of this does nothing. */
#define _GNU_SOURCE
#include "engine.h"
#include <dlfcn.h>
#include <unistd.h>

#define TICKS 32 /* between two questions: one needs the interpreter's lock, for which other threads may make it wait */

static const int *flag;

static struct {
    int (*ensure)(void);
    void (*release)(int);
    int (*interrupt_occurred)(void);
    void (*set_interrupt)(void);
} python;

/* The functions are looked up by name: Python may be in the program, in a library, or loaded later than this library. An
 * entry of the program's own (originals.c) will do, they are only called. */
static void __attribute__((constructor)) find_python(void)
{
    python.ensure = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    python.release = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    python.interrupt_occurred = dlsym(RTLD_DEFAULT, "PyOS_InterruptOccurred"); /* and forget it */
    python.set_interrupt = dlsym(RTLD_DEFAULT, "PyErr_SetInterrupt");
}

/* Where CPython has its flag; NULL: nobody knows. */
void ak_python_signals(const int *address)
{
    flag = address;
}

/* A signal is noted for the thread of this vCPU. Any thread may ask, also in a signal handler. */
bool ak_python_signal_waits(const struct ak_vcpu *v)
{
    return flag && __builtin_expect(__atomic_load_n(flag, __ATOMIC_RELAXED) != 0, 0) && v->tid == getpid();
}

/* The same for SIGINT alone, where the flag is not known. Outside guest mode, and without the interpreter's lock. */
bool ak_python_interrupted(struct ak_vcpu *v)
{
    if (__builtin_expect(flag || v->ticks - v->ticks_asked < TICKS, 1))
        return false;
    v->ticks_asked = v->ticks;
    if (!python.ensure)
        find_python();
    if (v->tid != getpid() || !python.ensure || !python.release || !python.interrupt_occurred || !python.set_interrupt)
        return false;
    int state = python.ensure();
    bool due = python.interrupt_occurred();
    if (due)
        python.set_interrupt(); /* the handler runs when KVM_RUN has returned */
    python.release(state);
    return due;
}
