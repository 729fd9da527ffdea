/* A program that is no Python: it loads the engine, makes a guest_memfd, and does every file operation on an ordinary file
 * and on the guest_memfd. Each operation is called by name and through a pointer to the function, so that a program which is
 * not position-independent has a PLT entry of its own for it. Prints what each gave; alarm() ends one that never returns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char bytes[64];
static struct iovec vector = {bytes, 8};
static void *volatile pointers[] = {
    (void *)read, (void *)write, (void *)readv, (void *)writev, (void *)pread, (void *)pwrite, (void *)preadv,
    (void *)pwritev, (void *)preadv2, (void *)pwritev2, (void *)lseek, (void *)ftruncate, (void *)fchmod, (void *)fchown,
    (void *)futimens, (void *)fsync, (void *)fdatasync, (void *)fallocate, (void *)posix_fallocate, (void *)mmap,
    (void *)fstat, (void *)dlopen, (void *)dlsym,
};

#define TELL(name, call)                                                                                               \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long r = (long)(call);                                                                                         \
        printf("%s %s %d\n", what, name, r == -1 ? errno : r > 0 && !strcmp(name, "posix_fallocate") ? (int)r : 0);    \
        fflush(stdout);                                                                                                \
    } while (0)

static void all(const char *what, int fd)
{
    struct stat st;
    alarm(10);
    TELL("write", write(fd, bytes, 8));
    TELL("lseek", lseek(fd, 0, SEEK_SET));
    TELL("read", read(fd, bytes, 8));
    TELL("readv", readv(fd, &vector, 1));
    TELL("writev", writev(fd, &vector, 1));
    TELL("pread", pread(fd, bytes, 8, 0));
    TELL("pwrite", pwrite(fd, bytes, 8, 0));
    TELL("preadv", preadv(fd, &vector, 1, 0));
    TELL("pwritev", pwritev(fd, &vector, 1, 0));
    TELL("preadv2", preadv2(fd, &vector, 1, 0, 0));
    TELL("pwritev2", pwritev2(fd, &vector, 1, 0, 0));
    TELL("ftruncate", ftruncate(fd, 8192));
    TELL("fchmod", fchmod(fd, 0600));
    TELL("fchown", fchown(fd, getuid(), getgid()));
    TELL("futimens", futimens(fd, NULL));
    TELL("fsync", fsync(fd));
    TELL("fdatasync", fdatasync(fd));
    TELL("fallocate", fallocate(fd, 0, 0, 4096));
    TELL("posix_fallocate", posix_fallocate(fd, 0, 4096));
    TELL("mmap", mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0));
    TELL("fstat", fstat(fd, &st));
    /* the same through the addresses that were taken at start, by whoever binds them */
    TELL("pointer to read", ((ssize_t(*)(int, void *, size_t))pointers[0])(fd, bytes, 1));
    TELL("pointer to fsync", ((int (*)(int))pointers[15])(fd));
    /* and as a foreign function library finds them */
    int (*found)(int) = (int (*)(int))dlsym(RTLD_DEFAULT, "fdatasync");
    TELL("dlsym of fdatasync", found(fd));
}

int main(int argc, char **argv)
{
    void *engine = argc > 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!engine) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    uint64_t (*vm_create)(void) = (uint64_t(*)(void))dlsym(engine, "ak_vm_create");
    int (*gmem_create)(uint64_t, int, uint64_t, uint32_t, uint64_t *) =
        (int (*)(uint64_t, int, uint64_t, uint32_t, uint64_t *))dlsym(engine, "ak_gmem_create");
    int file = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600), memfd = memfd_create("gmem", 0);
    uint64_t gmem, vm = vm_create();
    if (file < 0 || memfd < 0 || ftruncate(memfd, 8192) || gmem_create(vm, memfd, 8192, 0, &gmem))
        return 3;
    all("file", file);
    all("gmem", memfd);
    return 0;
}
