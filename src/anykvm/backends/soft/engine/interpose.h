/* interpose.c: standing in front of C library functions. originals.c: which functions those are. */
#pragma once
#include "engine.h"
#include <stddef.h>

struct ak_interposed {
    const char *name;
    void *ours;
    void *real;    /* whom to call instead; NULL where nobody has such a function */
    void *address; /* what the program takes for its address: the same, or an entry of the program's own */
    void *libc;    /* the C library's own: the same, or one that a preloaded library stands in front of */
};

/* Put these in front of the functions of the same name, now and in what is loaded later. 0 or a negative errno: not all
 * objects are reached, call it again. Calls do not overlap. */
int ak_interpose(struct ak_interposed *functions, size_t n);

/* Fill in real, address and libc. 0 or a negative errno. */
int ak_find_originals(struct ak_interposed *functions, size_t n);

/* Such an address stands for the function. */
bool ak_is_original(const struct ak_interposed *f, const void *address);
