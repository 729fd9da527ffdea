/* The file operations of a guest_memfd, as far as a memfd does not have them: what kvm_gmem_fops lacks is refused as the
 * kernel's file layer refuses it, and kvm_gmem_fallocate() and kvm_gmem_mmap() check their arguments. Sources:
 * virt/kvm/guest_memfd.c, fs/read_write.c, fs/open.c; ABI.md 4.4. Files are known by their inode, so duplicates and
 * descriptors passed on are meant too, within this process (interpose.c). Safe in signal handlers, as read(2) is. */
#define _GNU_SOURCE
#include "interpose.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Never freed, so that a reader needs no lock; ino is 0 where there is no file. */
struct known {
    struct known *next;
    u64 dev, ino, size;
    u32 flags;
};

static struct known *known_files;
static volatile u32 count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER; /* interpose() */

/* Another thread of the parent may have held them. What it was about to change is whole: a file is known by one store. */
void ak_gmem_files_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&once, NULL);
    count = 0;
    for (const struct known *k = known_files; k; k = k->next)
        count += k->ino != 0;
}

static const struct known *gmem_of(int fd)
{
    struct stat st;
    if (!count || syscall(SYS_fstat, fd, &st))
        return NULL;
    for (const struct known *k = __atomic_load_n(&known_files, __ATOMIC_ACQUIRE); k; k = k->next)
        if (__atomic_load_n(&k->ino, __ATOMIC_ACQUIRE) == st.st_ino && k->dev == st.st_dev)
            return k;
    return NULL;
}

static long refuse(int code)
{
    errno = code;
    return -1;
}

/* Functions that a guest_memfd refuses whatever the arguments. */
#define REFUSED(LIST)                                                                                                  \
    LIST(read, ssize_t, EINVAL, (int fd, void *b, size_t n), (fd, b, n))                                               \
    LIST(write, ssize_t, EINVAL, (int fd, const void *b, size_t n), (fd, b, n))                                        \
    LIST(readv, ssize_t, EINVAL, (int fd, const struct iovec *v, int n), (fd, v, n))                                   \
    LIST(writev, ssize_t, EINVAL, (int fd, const struct iovec *v, int n), (fd, v, n))                                  \
    LIST(pread, ssize_t, ESPIPE, (int fd, void *b, size_t n, off_t at), (fd, b, n, at))                                \
    LIST(pread64, ssize_t, ESPIPE, (int fd, void *b, size_t n, off_t at), (fd, b, n, at))                              \
    LIST(pwrite, ssize_t, ESPIPE, (int fd, const void *b, size_t n, off_t at), (fd, b, n, at))                         \
    LIST(pwrite64, ssize_t, ESPIPE, (int fd, const void *b, size_t n, off_t at), (fd, b, n, at))                       \
    LIST(preadv, ssize_t, ESPIPE, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))                    \
    LIST(preadv64, ssize_t, ESPIPE, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))                  \
    LIST(pwritev, ssize_t, ESPIPE, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))                   \
    LIST(pwritev64, ssize_t, ESPIPE, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))                 \
    LIST(lseek, off_t, ESPIPE, (int fd, off_t at, int whence), (fd, at, whence))                                       \
    LIST(lseek64, off_t, ESPIPE, (int fd, off_t at, int whence), (fd, at, whence))                                     \
    LIST(ftruncate, int, EINVAL, (int fd, off_t size), (fd, size))                                                     \
    LIST(ftruncate64, int, EINVAL, (int fd, off_t size), (fd, size))                                                   \
    LIST(fchmod, int, EINVAL, (int fd, mode_t mode), (fd, mode))                                                       \
    LIST(fchown, int, EINVAL, (int fd, uid_t user, gid_t group), (fd, user, group))                                    \
    LIST(futimens, int, EINVAL, (int fd, const struct timespec *times), (fd, times))                                   \
    LIST(fsync, int, EINVAL, (int fd), (fd))                                                                           \
    LIST(fdatasync, int, EINVAL, (int fd), (fd))                                                                       \
    /* what the compiler makes of read() and pread() with _FORTIFY_SOURCE */                                           \
    LIST(__read_chk, ssize_t, EINVAL, (int fd, void *b, size_t n, size_t room), (fd, b, n, room))                      \
    LIST(__pread_chk, ssize_t, ESPIPE, (int fd, void *b, size_t n, off_t at, size_t room), (fd, b, n, at, room))       \
    LIST(__pread64_chk, ssize_t, ESPIPE, (int fd, void *b, size_t n, off_t at, size_t room), (fd, b, n, at, room))

enum {
#define INDEX(name, type, code, parameters, arguments) index_##name,
    REFUSED(INDEX) index_preadv2, index_preadv64v2, index_pwritev2, index_pwritev64v2, index_fallocate, index_fallocate64,
    index_posix_fallocate, index_posix_fallocate64, index_mmap, index_mmap64, index_fstat,
    index_fstat64, index___fxstat, index___fxstat64, functions_count
};

static struct ak_interposed functions[functions_count];

#define REAL(type, index) ((type)functions[index].real)

#define DEFINE(name, type, code, parameters, arguments)                                                                \
    static type our_##name parameters                                                                                  \
    {                                                                                                                  \
        return gmem_of(fd) ? (type)refuse(code) : REAL(type(*) parameters, index_##name) arguments;                    \
    }
REFUSED(DEFINE)

#define DEFINE_VECTOR(name)                                                                                            \
    static ssize_t our_##name(int fd, const struct iovec *v, int n, off_t at, int flags)                               \
    {                                                                                                                  \
        if (gmem_of(fd))                                                                                               \
            return refuse(at == -1 ? EINVAL : ESPIPE); /* -1: at the file's position, as readv() */                    \
        return REAL(ssize_t(*)(int, const struct iovec *, int, off_t, int), index_##name)(fd, v, n, at, flags);        \
    }
DEFINE_VECTOR(preadv2)
DEFINE_VECTOR(preadv64v2)
DEFINE_VECTOR(pwritev2)
DEFINE_VECTOR(pwritev64v2)

/* vfs_fallocate() and kvm_gmem_fallocate(), up to where the memfd does what is asked. 0 or an errno. */
static int check_fallocate(const struct known *file, int mode, off_t offset, off_t length)
{
    off_t end;
    if (offset < 0 || length <= 0)
        return EINVAL;
    if (!(mode & FALLOC_FL_KEEP_SIZE) || (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)))
        return EOPNOTSUPP;
    if (__builtin_add_overflow(offset, length, &end))
        return EFBIG;
    if ((offset | length) & (AK_PAGE_SIZE - 1))
        return EINVAL;
    return !(mode & FALLOC_FL_PUNCH_HOLE) && (u64)end > file->size ? EINVAL : 0;
}

static int fallocate_of(int index, int fd, int mode, off_t offset, off_t length)
{
    const struct known *file = gmem_of(fd);
    int code = file ? check_fallocate(file, mode, offset, length) : 0;
    return code ? (int)refuse(code) : REAL(int (*)(int, int, off_t, off_t), index)(fd, mode, offset, length);
}

static int our_fallocate(int fd, int mode, off_t offset, off_t length)
{
    return fallocate_of(index_fallocate, fd, mode, offset, length);
}

static int our_fallocate64(int fd, int mode, off_t offset, off_t length)
{
    return fallocate_of(index_fallocate64, fd, mode, offset, length);
}

/* What glibc makes of fallocate()'s EOPNOTSUPP: it goes on with pread(). Returns an errno. */
static int posix_fallocate_of(int index, int fd, off_t offset, off_t length)
{
    if (!gmem_of(fd))
        return REAL(int (*)(int, off_t, off_t), index)(fd, offset, length);
    return offset < 0 || length <= 0 ? EINVAL : ESPIPE;
}

static int our_posix_fallocate(int fd, off_t offset, off_t length)
{
    return posix_fallocate_of(index_posix_fallocate, fd, offset, length);
}

static int our_posix_fallocate64(int fd, off_t offset, off_t length)
{
    return posix_fallocate_of(index_posix_fallocate64, fd, offset, length);
}

#define BEYOND (1ll << 50) /* behind the end of any file that can be mapped */

/* kvm_gmem_mmap() and kvm_gmem_fault_user_mapping(): private pages can be mapped, but are SIGBUS when touched. */
static void *map_gmem(const struct known *file, void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    if (!(file->flags & AK_GMEM_MMAP))
        return (void *)refuse(ENODEV);
    if ((flags & MAP_TYPE) != MAP_SHARED && (flags & MAP_TYPE) != MAP_SHARED_VALIDATE)
        return (void *)refuse(EINVAL);
    return REAL(void *(*)(void *, size_t, int, int, int, off_t), index_mmap)(
        at, length, prot, flags, fd, file->flags & AK_GMEM_INIT_SHARED ? offset : offset + BEYOND);
}

/* The backend's mmap(): the address, or a negative errno. */
int64_t ak_gmem_mmap(int fd, u64 length, u64 offset)
{
    const struct known *file = gmem_of(fd);
    if (!file)
        return -ENODEV;
    void *at = map_gmem(file, NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    return at == MAP_FAILED ? -errno : (int64_t)at;
}

static void *mmap_of(int index, void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    const struct known *file = flags & MAP_ANONYMOUS ? NULL : gmem_of(fd);
    if (file)
        return map_gmem(file, at, length, prot, flags, fd, offset);
    return REAL(void *(*)(void *, size_t, int, int, int, off_t), index)(at, length, prot, flags, fd, offset);
}

static void *our_mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    return mmap_of(index_mmap, at, length, prot, flags, fd, offset);
}

static void *our_mmap64(void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    return mmap_of(index_mmap64, at, length, prot, flags, fd, offset);
}

/* simple_getattr(): the inode has no blocks. */
static int without_blocks(int result, int fd, struct stat *st)
{
    if (!result && gmem_of(fd))
        st->st_blocks = 0, st->st_blksize = AK_PAGE_SIZE;
    return result;
}

#define DEFINE_FSTAT(name)                                                                                             \
    static int our_##name(int fd, struct stat *st)                                                                     \
    {                                                                                                                  \
        return without_blocks(REAL(int (*)(int, struct stat *), index_##name)(fd, st), fd, st);                        \
    }
DEFINE_FSTAT(fstat)
DEFINE_FSTAT(fstat64)

/* What fstat() is in objects that were built with a C library before 2.33. */
#define DEFINE_FXSTAT(name)                                                                                            \
    static int our_##name(int version, int fd, struct stat *st)                                                        \
    {                                                                                                                  \
        return without_blocks(REAL(int (*)(int, int, struct stat *), index_##name)(version, fd, st), fd, st);          \
    }
DEFINE_FXSTAT(__fxstat)
DEFINE_FXSTAT(__fxstat64)

static struct ak_interposed functions[functions_count] = {
#define ENTRY(function, ...) [index_##function] = {.name = #function, .ours = (void *)our_##function},
    REFUSED(ENTRY) ENTRY(preadv2) ENTRY(preadv64v2) ENTRY(pwritev2) ENTRY(pwritev64v2) ENTRY(fallocate) ENTRY(fallocate64)
    ENTRY(posix_fallocate) ENTRY(posix_fallocate64) ENTRY(mmap) ENTRY(mmap64) ENTRY(fstat)
    ENTRY(fstat64) ENTRY(__fxstat) ENTRY(__fxstat64)};

/* Once, and again where it failed. 0 or a negative errno. */
static int interpose(void)
{
    static bool done;
    pthread_mutex_lock(&once);
    int code = done ? 0 : ak_interpose(functions, functions_count);
    done = !code;
    pthread_mutex_unlock(&once);
    return code;
}

/* The memfd fd is a guest_memfd from now on. 0 or a negative errno. */
int ak_gmem_file_add(int fd, u64 size, u32 flags)
{
    struct stat st;
    if (fstat(fd, &st))
        return -errno;
    int code = interpose();
    if (code)
        return code;
    pthread_mutex_lock(&lock);
    struct known *k = known_files;
    while (k && k->ino)
        k = k->next;
    bool fresh = !k;
    if (fresh && !(k = ak_calloc(1, sizeof *k))) {
        pthread_mutex_unlock(&lock);
        return -ENOMEM;
    }
    k->dev = st.st_dev, k->size = size, k->flags = flags;
    __atomic_store_n(&k->ino, st.st_ino, __ATOMIC_RELEASE);
    if (fresh) {
        k->next = known_files;
        __atomic_store_n(&known_files, k, __ATOMIC_RELEASE);
    }
    count++;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* It is over: nobody has the file any more. */
void ak_gmem_file_remove(int fd)
{
    pthread_mutex_lock(&lock);
    struct known *k = (struct known *)gmem_of(fd);
    if (k) {
        __atomic_store_n(&k->ino, 0, __ATOMIC_RELEASE);
        count--;
    }
    pthread_mutex_unlock(&lock);
}
