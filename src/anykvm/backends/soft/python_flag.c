/* Where CPython says that it has noted a signal whose Python function it has not called yet. There is no public function for
 * this question: PyErr_CheckSignals() answers by calling the function. So the runtime's own structure is read, as the headers
 * of the interpreter that this is compiled for describe it. */
#define Py_BUILD_CORE_MODULE 1
#include <Python.h>
#include "python_flag.h"

#if __has_include(<internal/pycore_runtime.h>)
#include <internal/pycore_runtime.h>

const int *python_signals_flag(void)
{
#if PY_VERSION_HEX >= 0x030c0000
    _Static_assert(sizeof _PyRuntime.signals.is_tripped == sizeof(int), "the flag is an int");
    return (const int *)&_PyRuntime.signals.is_tripped;
#else
    _Static_assert(sizeof _PyRuntime.ceval.signals_pending == sizeof(int), "the flag is an int");
    return (const int *)&_PyRuntime.ceval.signals_pending;
#endif
}

#else /* an interpreter without these headers */

const int *python_signals_flag(void)
{
    return NULL;
}

#endif
