/* A KVM that breaks at one step, for programs it is preloaded into. FAIL_AT: the step ("open", "mmap", or an ioctl's number in
 * hex); HOW: "signal N", "hang" (SIGTERM and SIGINT do not end it), "errno N", or "value N". What comes before works, far enough. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int breaks(const char *step, long *result)
{
    const char *at = getenv("FAIL_AT"), *how = getenv("HOW");
    if (!at || strcmp(at, step))
        return 0;
    if (!strncmp(how, "signal ", 7)) {
        signal(atoi(how + 7), SIG_DFL);
        raise(atoi(how + 7));
    }
    if (!strcmp(how, "hang")) {
        signal(SIGTERM, SIG_IGN);
        signal(SIGINT, SIG_IGN);
        for (;;)
            pause();
    }
    *result = atol(strchr(how, ' ') + 1);
    if (!strncmp(how, "errno", 5)) {
        errno = (int)*result;
        *result = -1;
    }
    return 1;
}

int open64(const char *path, int flags, ...)
{
    long result;
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    if (strstr(path, "broken-kvm") && breaks("open", &result))
        return (int)result;
    return real(path, flags, 0600);
}

int ioctl(int fd, unsigned long request, ...)
{
    char step[16];
    long result;
    (void)fd;
    snprintf(step, sizeof step, "%lx", request & 0xffff);
    if (breaks(step, &result))
        return (int)result;
    switch (request & 0xffff) {
    case 0xae00: return 12;
    case 0xae04: return 4096;
    case 0xae01: return dup(0);
    case 0xae41: {
        int vcpu = memfd_create("vcpu", 0);
        return ftruncate(vcpu, atoi(getenv("VCPU_BYTES") ?: "12288")) ? -1 : vcpu;
    }
    default: return 0;
    }
}
