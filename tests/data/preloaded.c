/* A library that somebody preloads: its fsync() counts, and calls the C library's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

int fsync(int fd)
{
    static int (*next)(int);
    if (!next)
        next = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    fputs("preloaded fsync\n", stdout);
    return next(fd);
}
