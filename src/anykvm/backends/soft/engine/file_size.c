/* The size of a memory file. The kernel's KVM makes its files whatever RLIMIT_FSIZE says; here they are memfds, for which
 * ftruncate(2) is EFBIG beyond that limit, and SIGXFSZ. The limit is the process's: if this one changed it for a moment, its
 * other threads would write without a limit meanwhile. So a child does it that shares the descriptors and has limits of
 * its own. */
#define _GNU_SOURCE
#include "engine.h"
#include <errno.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct job {
    int fd;
    u64 size;
    int result;
};

/* In the child, which shares memory with a caller that waits. No signal is open. */
static int resize_without_limit(void *argument)
{
    struct job *job = argument;
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = limit.rlim_max;
    if (job->size > limit.rlim_max)
        limit.rlim_cur = limit.rlim_max = RLIM_INFINITY; /* for CAP_SYS_RESOURCE only */
    if (!setrlimit(RLIMIT_FSIZE, &limit))
        job->result = ftruncate(job->fd, (off_t)job->size) ? -errno : 0;
    syscall(SYS_exit, 0);
    return 0;
}

static int resize_in_child(int fd, u64 size)
{
    static const int as_caller = CLONE_VM | CLONE_VFORK | CLONE_FILES; /* no signal when it ends: nobody else notices it */
    struct job job = {.fd = fd, .size = size, .result = -ENOMEM};
    char stack[16384] __attribute__((aligned(16)));
    u64 mask = ak_signals_block();
    int child = clone(resize_without_limit, stack + sizeof stack, as_caller, &job), failed = errno;
    if (child > 0)
        while (waitpid(child, NULL, __WCLONE) < 0 && errno == EINTR)
            ;
    ak_signals_restore(mask);
    return child < 0 ? -failed : job.result;
}

/* ftruncate(2) whatever the soft limit. 0 or a negative errno; ENOMEM: it is beyond the hard limit, which this user cannot
 * change; EAGAIN: no child could be made. */
int ak_set_file_size(int fd, u64 size)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_FSIZE, &limit) && size > limit.rlim_cur)
        return resize_in_child(fd, size);
    return ftruncate(fd, (off_t)size) ? -errno : 0;
}
