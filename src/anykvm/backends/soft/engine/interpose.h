/* interpose.c: standing in front of C library functions. */
#pragma once
#include "engine.h"
#include <stddef.h>

struct ak_interposed {
    const char *name;
    void *ours, *real; /* real: filled in; NULL where the C library has no such function */
};

void ak_interpose(struct ak_interposed *functions, size_t n);
