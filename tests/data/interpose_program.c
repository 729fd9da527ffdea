/* Calls each function that the engine stands in front of, in each way a program can, on an ordinary file and on a
 * guest_memfd. test_interpose.py builds it in all the ways a Python can have been linked, and runs it:
 * program ENGINE PLUGIN. It prints what is wrong, and is ended by SIGALRM if a function never returns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SIZE 0x4000

static int plain, gmem, wrong;
static void *libc;
static char buffer[16];
static const struct iovec vector = {buffer, 1};
static struct stat status;
static const struct timespec times[2];

static void check(const char *name, const char *way, int is_gmem, long result, long good, int code)
{
    int errors = errno, refused = result == -1 && errors == code;
    if (is_gmem ? refused : result == good)
        return;
    printf("%s, %s, of the %s: %ld, errno %d\n", name, way, is_gmem ? "guest_memfd" : "ordinary file", result, errors);
    wrong++;
}

#define LIST(TRY)                                                                                                      \
    TRY(read, ssize_t, 1, EINVAL, (int, void *, size_t), (fd, buffer, 1))                                              \
    TRY(write, ssize_t, 1, EINVAL, (int, const void *, size_t), (fd, buffer, 1))                                       \
    TRY(readv, ssize_t, 1, EINVAL, (int, const struct iovec *, int), (fd, &vector, 1))                                 \
    TRY(writev, ssize_t, 1, EINVAL, (int, const struct iovec *, int), (fd, &vector, 1))                                \
    TRY(pread, ssize_t, 1, ESPIPE, (int, void *, size_t, off_t), (fd, buffer, 1, 0))                                   \
    TRY(pread64, ssize_t, 1, ESPIPE, (int, void *, size_t, off_t), (fd, buffer, 1, 0))                                 \
    TRY(pwrite, ssize_t, 1, ESPIPE, (int, const void *, size_t, off_t), (fd, buffer, 1, 0))                            \
    TRY(pwrite64, ssize_t, 1, ESPIPE, (int, const void *, size_t, off_t), (fd, buffer, 1, 0))                          \
    TRY(preadv, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t), (fd, &vector, 1, 0))                      \
    TRY(preadv64, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t), (fd, &vector, 1, 0))                    \
    TRY(pwritev, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t), (fd, &vector, 1, 0))                     \
    TRY(pwritev64, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t), (fd, &vector, 1, 0))                   \
    TRY(preadv2, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t, int), (fd, &vector, 1, 0, 0))             \
    TRY(preadv64v2, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t, int), (fd, &vector, 1, 0, 0))          \
    TRY(pwritev2, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t, int), (fd, &vector, 1, 0, 0))            \
    TRY(pwritev64v2, ssize_t, 1, ESPIPE, (int, const struct iovec *, int, off_t, int), (fd, &vector, 1, 0, 0))         \
    TRY(lseek, off_t, 0, ESPIPE, (int, off_t, int), (fd, 0, SEEK_SET))                                                 \
    TRY(lseek64, off_t, 0, ESPIPE, (int, off_t, int), (fd, 0, SEEK_SET))                                               \
    TRY(ftruncate, int, 0, EINVAL, (int, off_t), (fd, SIZE))                                                           \
    TRY(ftruncate64, int, 0, EINVAL, (int, off_t), (fd, SIZE))                                                         \
    TRY(fchmod, int, 0, EINVAL, (int, mode_t), (fd, 0600))                                                             \
    TRY(fchown, int, 0, EINVAL, (int, uid_t, gid_t), (fd, getuid(), getgid()))                                         \
    TRY(futimens, int, 0, EINVAL, (int, const struct timespec *), (fd, times))                                         \
    TRY(fsync, int, 0, EINVAL, (int), (fd))                                                                            \
    TRY(fdatasync, int, 0, EINVAL, (int), (fd))                                                                        \
    TRY(fallocate, int, 0, EOPNOTSUPP, (int, int, off_t, off_t), (fd, 0, 0, SIZE))                                     \
    TRY(fallocate64, int, 0, EOPNOTSUPP, (int, int, off_t, off_t), (fd, 0, 0, SIZE))                                   \
    TRY(posix_fallocate, int, 0, ESPIPE, (int, off_t, off_t), (fd, 0, SIZE))                                           \
    TRY(posix_fallocate64, int, 0, ESPIPE, (int, off_t, off_t), (fd, 0, SIZE))                                         \
    TRY(mmap, void *, 0, ENODEV, (void *, size_t, int, int, int, off_t), (NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0))   \
    TRY(mmap64, void *, 0, ENODEV, (void *, size_t, int, int, int, off_t), (NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0)) \
    TRY(fstat, int, 0, -1, (int, struct stat *), (fd, &status))                                                        \
    TRY(fstat64, int, 0, -1, (int, struct stat *), (fd, (void *)&status))                                              \
    TRY(__fxstat, int, 0, -1, (int, int, struct stat *), (1, fd, &status))                                             \
    TRY(__fxstat64, int, 0, -1, (int, int, struct stat *), (1, fd, (void *)&status))                                   \
    TRY(__read_chk, ssize_t, 1, EINVAL, (int, void *, size_t, size_t), (fd, buffer, 1, sizeof buffer))                 \
    TRY(__pread_chk, ssize_t, 1, ESPIPE, (int, void *, size_t, off_t, size_t), (fd, buffer, 1, 0, sizeof buffer))      \
    TRY(__pread64_chk, ssize_t, 1, ESPIPE, (int, void *, size_t, off_t, size_t), (fd, buffer, 1, 0, sizeof buffer))

int __fxstat(int, int, struct stat *);
int __fxstat64(int, int, struct stat64 *);
ssize_t __read_chk(int, void *, size_t, size_t);
ssize_t __pread_chk(int, void *, size_t, off_t, size_t);
ssize_t __pread64_chk(int, void *, size_t, off_t, size_t);

/* The result as check() wants it: what a function says otherwise than by -1 and errno is made that. */
static long result_of(const char *name, int is_gmem, long result)
{
    if (!strncmp(name, "posix_fallocate", 15) && result) {
        errno = (int)result;
        return -1;
    }
    if (!strncmp(name, "mmap", 4) && result != -1) {
        munmap((void *)result, SIZE);
        return 0;
    }
    if (strstr(name, "stat") && !result && is_gmem) {
        errno = status.st_blocks ? 0 : -1; /* not an error: a guest_memfd has no blocks */
        return -1;
    }
    return result;
}

/* By a call; by an address that the linker or the dynamic linker put into a variable; by an address looked up in the
 * program, or in the C library. A guest_memfd does not refuse what was looked up, but for Python's ctypes. */
#define TRY(name, type, good, code, parameters, arguments)                                                             \
    static type(*volatile in_data_##name) parameters = (void *)name;                                                   \
    static void try_##name(void)                                                                                       \
    {                                                                                                                  \
        type(*looked_up) parameters = (void *)dlsym(RTLD_DEFAULT, #name);                                              \
        type(*in_libc) parameters = (void *)dlsym(libc, #name);                                                        \
        for (int is_gmem = 0; is_gmem < 2; is_gmem++) {                                                                \
            int fd = is_gmem ? gmem : plain;                                                                           \
            lseek(plain, 0, SEEK_SET);                                                                                 \
            check(#name, "called", is_gmem, result_of(#name, is_gmem, (long)name arguments), good, code);              \
            lseek(plain, 0, SEEK_SET);                                                                                 \
            check(#name, "by a variable", is_gmem, result_of(#name, is_gmem, (long)in_data_##name arguments), good,    \
                  code);                                                                                               \
            if (is_gmem)                                                                                               \
                break;                                                                                                 \
            lseek(plain, 0, SEEK_SET);                                                                                 \
            check(#name, "looked up", is_gmem, result_of(#name, is_gmem, (long)looked_up arguments), good, code);      \
            lseek(plain, 0, SEEK_SET);                                                                                 \
            check(#name, "of libc", is_gmem, result_of(#name, is_gmem, (long)in_libc arguments), good, code);          \
        }                                                                                                              \
    }
LIST(TRY)

/* The addresses of these two are taken as well. */
static void *(*volatile our_dlopen)(const char *, int) = dlopen;
static void *(*volatile our_dlsym)(void *, const char *) = dlsym;

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    alarm(20);
    void *engine = our_dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    libc = dlopen("libc.so.6", RTLD_NOW);
    if (!engine || !libc) {
        printf("%s\n", dlerror());
        return 1;
    }
    int (*add)(int, unsigned long, unsigned) = our_dlsym(engine, "ak_gmem_file_add");
    plain = memfd_create("plain", 0), gmem = memfd_create("gmem", 0);
    if (ftruncate(plain, SIZE) || ftruncate(gmem, SIZE) || fallocate(gmem, 0, 0, SIZE) || add(gmem, SIZE, 0))
        return 3;
    const volatile int *wrapped = dlsym(RTLD_DEFAULT, "wrapped_calls"); /* a preloaded library's, if there is one */
    int count = wrapped ? *wrapped : 0;
    fsync(plain);
    if (wrapped && *wrapped != count + 1)
        printf("the preloaded fsync() was called %d times, not once\n", *wrapped - count), wrong++;
#define CALL(name, ...) try_##name();
    LIST(CALL)
    void *plugin = dlopen(argv[2], RTLD_NOW);
    int (*reads)(int) = plugin ? dlsym(plugin, "reads") : NULL;
    lseek(plain, 0, SEEK_SET);
    if (!reads || reads(plain) != 1 || reads(gmem) != -1 || errno != EINVAL)
        printf("a library that was loaded later is not reached: %s\n", reads ? strerror(errno) : dlerror()), wrong++;
    return wrong != 0;
}
