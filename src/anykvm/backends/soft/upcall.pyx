# cython: language_level=3
"""Calls from the engine into Python, and what becomes of the exceptions they raise. See upcall.pyi."""

from libc.stdint cimport uint32_t, uint64_t

from anykvm.host.atomic import client_thread

cdef extern from "python_flag.h":
    const int *python_signals_flag()

cdef extern from "Python.h":
    void PyErr_SetObject(object kind, object value)
    void PyErr_WriteUnraisable(object where)

# enum ak_device_answer
cdef enum:
    FAILED = 1
    INTERRUPTED = 3
    RAISED = 16

cdef object resolver = None
cdef dict depths = {}  # thread: how many fault handlers it is inside of
cdef dict raised = {}  # thread: what a fault handler has raised


cdef int device_fault(uint64_t hva, uint32_t access) noexcept with gil:
    # The engine calls this inside of a guest's fault. It gives no exception back to C, where none can be.
    try:
        thread = client_thread()
        depths[thread] = depths.get(thread, 0) + 1
        try:
            return resolver(hva, access)
        finally:
            depths[thread] -= 1
            if not depths[thread]:
                del depths[thread]
    except BaseException as error:
        if isinstance(error, Exception):
            raised.setdefault(thread, error)
            PyErr_SetObject(type(error), error)
            PyErr_WriteUnraisable(resolver)
            return FAILED | RAISED
        raised[thread] = error
        return INTERRUPTED | RAISED


def device_fault_address():
    return <size_t>&device_fault


def python_signals_address():
    return <size_t>python_signals_flag()


def install(function):
    global resolver
    resolver = function


def in_device_fault():
    return bool(depths) and client_thread() in depths


def check(int result=0, message=""):
    if not raised:
        return
    error = raised.pop(client_thread(), None)
    if error is None:
        return
    if not isinstance(error, Exception):
        raise error
    if result < 0:
        raise OSError(-result, message) from error
