/* Ctrl-C in a Python program with several threads. While its main thread is in KVM_RUN with signals blocked, another thread
 * takes a SIGINT sent to the process: CPython notes it there and waits for its main thread, which the guest keeps. A guest
 * that keeps the main thread for long therefore has CPython asked now and then. In other programs this does nothing. */
#define _GNU_SOURCE
#include "engine.h"
#include <dlfcn.h>
#include <unistd.h>

#define TICKS 32 /* between two questions: one needs the interpreter's lock, for which other threads may make it wait */

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

/* A SIGINT waits for this thread in CPython. Outside guest mode, and without the interpreter's lock. */
bool ak_python_interrupted(struct ak_vcpu *v)
{
    if (__builtin_expect(v->ticks - v->ticks_asked < TICKS, 1))
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
