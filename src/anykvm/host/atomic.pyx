# cython: language_level=3
"""Calls that nothing interrupts: done on a thread of ours, while the caller's thread waits in C (workers.c).

See atomic.pyi for what is public. No line of this module is bytecode, so no signal handler runs between two of them, and no
exception is thrown there.
"""

import gc
import os
import weakref

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject

cdef extern from "workers.h" nogil:
    struct workers_job:
        void (*run)(void *argument, void **keep) noexcept nogil
        void (*end)(void **keep) noexcept nogil
        void *argument
        unsigned long client
    int workers_do(workers_job *job)
    int workers_inside()
    unsigned long workers_client()

cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030d0000
    #define Py_IsFinalizing _Py_IsFinalizing
    #endif
    #define GC_IS_SCHEDULED (PY_VERSION_HEX >= 0x030c0000)

    /* A worker's thread state is made for its first job and kept; between jobs it does not have the interpreter's lock. */
    static void attach(void **keep)
    {
        if (*keep)
            PyEval_RestoreThread((PyThreadState *)*keep);
        else
            PyGILState_Ensure();
    }

    static void detach(void **keep)
    {
        *keep = PyEval_SaveThread();
    }

    static void end_worker(void **keep)
    {
        if (*keep && !Py_IsFinalizing()) {
            PyEval_RestoreThread((PyThreadState *)*keep);
            PyGILState_Release(PyGILState_UNLOCKED);
        }
    }

    /* Objects of a type without fields of its own are made as plain ones are. Cython's function for it does not give a
     * subclass's objects the room for attributes that CPython 3.11 and 3.12 find quickly; each access cost 20 ns more. */
    static void make_as_object(PyObject *type)
    {
        if (((PyTypeObject *)type)->tp_basicsize == PyBaseObject_Type.tp_basicsize)
            ((PyTypeObject *)type)->tp_new = PyBaseObject_Type.tp_new;
    }
    """
    void make_as_object(object type)
    int Py_IsFinalizing()
    bint GC_IS_SCHEDULED
    void attach(void **keep) noexcept nogil
    void detach(void **keep) noexcept nogil
    void end_worker(void **keep) noexcept nogil

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil
    int PyErr_ResourceWarning(object source, Py_ssize_t stack_level, const char *format, ...) except -1


class NoThread(OSError):
    """There is no thread to do a call on (EAGAIN, ENOMEM); nothing was done."""


# -- the garbage collector: it would run finalizers of the program in the middle of a call --------------------------------

cdef int busy = 0
cdef bint held_back = False  # until the thresholds are the program's again
cdef object thresholds = None
cdef object get_threshold = gc.get_threshold
cdef object set_threshold = gc.set_threshold


cdef int hold_garbage() except -1:
    # By the threshold, not by gc.disable(): that switch is the program's, and another thread may turn it meanwhile.
    global busy, held_back, thresholds
    if busy == 0:
        now = get_threshold()
        if not held_back or now[0]:
            thresholds = now
        held_back = True
        set_threshold(0)
        if GC_IS_SCHEDULED:
            PyErr_CheckSignals()  # a collection that was scheduled before is done here; signals are the main thread's
    busy += 1
    return 0


cdef int release_garbage() except -1:
    global busy, held_back
    busy -= 1
    if busy == 0:
        if get_threshold()[0] == 0:  # else the program has set its own meanwhile
            set_threshold(*thresholds)
        held_back = False
    return 0


def _in_child():
    global busy
    if busy:
        busy = 1
        release_garbage()


os.register_at_fork(after_in_child=_in_child)

# -- jobs ------------------------------------------------------------------------------------------------------------------

cdef struct Request:
    PyObject *function
    PyObject *arguments
    PyObject *result
    PyObject *error


cdef void perform(Request *request) noexcept with gil:
    cdef bint held = False
    try:
        hold_garbage()
        held = True
        result = (<object>request.function)(*<tuple>request.arguments)
        Py_INCREF(result)
        request.result = <PyObject *>result
    except BaseException as error:
        Py_INCREF(error)
        request.error = <PyObject *>error
    if held:
        try:
            release_garbage()
        except MemoryError:
            pass  # no room for three numbers: the next call sets them again


cdef void run(void *argument, void **keep) noexcept nogil:
    attach(keep)
    perform(<Request *>argument)
    detach(keep)


cdef object hand_over(object function, tuple arguments, bint here_if_none):
    cdef Request request
    cdef workers_job job
    cdef int refused
    if workers_inside() or Py_IsFinalizing():
        return function(*arguments)
    request.function = <PyObject *>function
    request.arguments = <PyObject *>arguments
    request.result = NULL
    request.error = NULL
    job.run = run
    job.end = end_worker
    job.argument = &request
    job.client = PyThread_get_thread_ident()
    with nogil:
        refused = workers_do(&job)
    if refused:
        if here_if_none:
            return function(*arguments)
        raise NoThread(-refused, f"no thread to do it on: {os.strerror(-refused)}")
    if request.error != NULL:
        error = <object>request.error
        Py_XDECREF(request.error)
        if isinstance(error, OSError):
            error.__traceback__ = None  # where we found out is nobody's business
        raise error
    result = <object>request.result
    Py_XDECREF(request.result)
    return result


def atomically(function, *arguments):
    return hand_over(function, arguments, False)


def atomically_or_here(function, *arguments):
    return hand_over(function, arguments, True)


def client_thread():
    cdef unsigned long client = workers_client()
    return client if client else PyThread_get_thread_ident()


# -- the end of objects ------------------------------------------------------------------------------------------------------

cdef set living = set()
cdef object new_reference = weakref.ref


cdef class Finalizer:
    cdef object reference, function
    cdef tuple arguments

    def __init__(self, owner, function, *arguments):
        self.function = function
        self.arguments = arguments
        self.reference = new_reference(owner, self)
        living.add(self)

    @property
    def alive(self):
        return self.function is not None

    def __call__(self, reference=None):
        function, arguments = self.function, self.arguments
        if function is None:
            return
        self.function = self.reference = None
        self.arguments = ()
        living.discard(self)
        if not Py_IsFinalizing():
            hand_over(function, arguments, True)


cdef class Dropped:
    def __del__(self):
        try:
            warning = hand_over(self._dropped, (), True)
            if warning is not None:
                PyErr_ResourceWarning(self, 1, "%U", <PyObject *>warning)
        except BaseException:
            if not Py_IsFinalizing():  # then what the method needs may be gone, and who is told too
                raise

    def _dropped(self):
        return None


make_as_object(Dropped)
