/* KVM's files: which object an open descriptor stands for. Every KVM file is a memfd, and its inode names it. Nothing is
 * known by a descriptor's number alone: each use asks the kernel what is open there (fstat), so a number that was closed,
 * or given to another file by dup2(), never reaches the old object.
 *
 * A file is over when its last descriptor and mapping are gone, in this process or any other, or on the way to one in a
 * socket. The open file description that a file was made with carries a lock (F_OFD_SETLK) for that: the kernel drops the
 * lock at that moment. ak_file_close() looks for the lock of the file that it closes, from a description of its own. Who
 * closes with close(2) tells nobody: such files are found by a search (search.c), now and then.
 *
 * A thread in KVM_RUN is a user of the file (ak_vcpu_get). A file that is over while it has users is found by nobody any
 * more, and is dead when the last has put it. Python, which owns the objects, fetches the dead (ak_file_dead). */
#define _GNU_SOURCE
#include "files.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ak_files ak_files = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void lock_files(void)
{
    pthread_mutex_lock(&ak_files.lock);
}

static void unlock_files(void)
{
    pthread_mutex_unlock(&ak_files.lock);
}

static void __attribute__((constructor)) watch_forks(void)
{
    pthread_atfork(lock_files, unlock_files, unlock_files); /* a child gets a whole table, and may take its lock */
}

/* -- the table: the caller holds the lock --------------------------------------------------------------------------- */

static struct ak_file **bucket(u64 ino)
{
    return &ak_files.buckets[ino * 0x9e3779b97f4a7c15ull >> 32 & (ak_files.room - 1)];
}

struct ak_file *ak_file_look_up(u64 dev, u64 ino)
{
    if (!ak_files.room)
        return NULL;
    for (struct ak_file *f = *bucket(ino); f; f = f->next)
        if (f->ino == ino && f->dev == dev)
            return f;
    return NULL;
}

static int make_room(void)
{
    u32 before = ak_files.room, room = before ? before * 2 : 64;
    if (ak_files.count < before)
        return 0;
    struct ak_file **old = ak_files.buckets, **grown = calloc(room, sizeof *grown);
    if (!grown)
        return -ENOMEM;
    ak_files.buckets = grown;
    ak_files.room = room;
    for (u32 i = 0; i < before; i++)
        for (struct ak_file *f = old[i], *next; f; f = next) {
            next = f->next;
            f->next = *bucket(f->ino);
            *bucket(f->ino) = f;
        }
    free(old);
    return 0;
}

static void bury(struct ak_file *f)
{
    f->next = ak_files.dead;
    ak_files.dead = f;
}

/* The file is over: nobody finds it any more. */
void ak_file_over(struct ak_file *f)
{
    for (u32 i = 0; i < AK_RECENT; i++)
        if (ak_files.recent[i] == f)
            ak_files.recent[i] = NULL;
    struct ak_file **p = bucket(f->ino);
    while (*p != f)
        p = &(*p)->next;
    *p = f->next;
    ak_files.count--;
    if (!__atomic_fetch_or(&f->users, AK_FILE_OVER, __ATOMIC_ACQ_REL))
        bury(f);
}

/* -- descriptors ---------------------------------------------------------------------------------------------------- */

/* What is open at a descriptor: 0 or -EBADF. The system call itself, for glibc's fstat() is slower by a fifth. */
int ak_file_identify(int64_t fd, u64 *dev, u64 *ino)
{
    struct stat st;
    if (fd < 0 || fd > INT_MAX)
        return -EBADF;
    if (syscall(SYS_fstat, (int)fd, &st))
        return -errno;
    *dev = st.st_dev;
    *ino = st.st_ino;
    return 0;
}

/* A description of its own for the file behind a descriptor, or a negative errno. */
static int reopen(int fd, int flags)
{
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    int own = open(name, flags | O_CLOEXEC);
    return own < 0 ? -errno : own;
}

/* fstat() costs twice what lseek() does, and KVM_RUN asks each time. So each file's description has a position that no
 * other file has, by chance in 2^62: whoever finds it there has the file. A description made otherwise (by /proc), or one
 * that somebody moved, is asked by fstat(). */
static void set_position(struct ak_file *f, int fd)
{
    u64 random = 0;
    if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
        return; /* 0 is no position that is looked for */
    int64_t position = (int64_t)(random >> 2 | 1ull << 61);
    if (lseek(fd, position, SEEK_SET) == position)
        f->position = position;
}

/* Of which the caller holds the lock; `at` is where the descriptor's description stands. */
static struct ak_file *guess(int64_t fd, int64_t at)
{
    struct ak_file *f = ak_files.recent[fd & (AK_RECENT - 1)];
    return f && at > 0 && f->position == at ? f : NULL;
}

static struct flock whole_file(short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET};
}

/* Let a descriptor, and every duplicate of it, stand for a new file, that of a vCPU or (NULL) of something else; own is a
 * descriptor of the inode that does not count, or -1. Returns the file's number, which is never used twice; -EBADF,
 * -ENOMEM, -ENOLCK. Where the kernel has no such locks a file lives while this process has a descriptor of it. */
int64_t ak_file_add(int fd, struct ak_vcpu *vcpu, int own)
{
    static u64 last;
    struct flock lock = whole_file(F_WRLCK);
    struct ak_file *f = calloc(1, sizeof *f);
    if (!f)
        return -ENOMEM;
    f->vcpu = vcpu;
    f->fd = fd;
    f->own = own;
    int r = ak_file_identify(fd, &f->dev, &f->ino);
    if (!r && vcpu)
        set_position(f, fd);
    if (!r && fcntl(fd, F_OFD_SETLK, &lock)) {
        r = errno == EINVAL ? 0 : -errno;
        f->unlocked = true;
    }
    lock_files();
    r = r ? r : make_room();
    if (!r) {
        f->serial = ++last;
        f->next = *bucket(f->ino);
        *bucket(f->ino) = f;
        ak_files.count++;
        ak_files.events++;
        if (vcpu)
            vcpu->file = f;
    }
    unlock_files();
    if (r) {
        free(f);
        return r;
    }
    ak_file_search(false);
    return (int64_t)f->serial;
}

/* The number of the file that a descriptor stands for; 0: it is no KVM file; -EBADF. */
int64_t ak_file_find(int64_t fd)
{
    u64 dev, ino, serial = 0;
    int r = ak_file_identify(fd, &dev, &ino);
    if (r)
        return r;
    lock_files();
    struct ak_file *f = ak_file_look_up(dev, ino);
    if (f) {
        f->fd = (int)fd;
        serial = f->serial;
    }
    unlock_files();
    return (int64_t)serial;
}

/* The vCPU that a descriptor stands for, of which the caller is a user until ak_vcpu_put(); NULL: it is none. */
struct ak_vcpu *ak_vcpu_get(int64_t fd)
{
    u64 dev, ino;
    if (fd < 0 || fd > INT_MAX)
        return NULL;
    int64_t at = syscall(SYS_lseek, (int)fd, 0l, SEEK_CUR);
    lock_files();
    struct ak_file *f = guess(fd, at);
    if (__builtin_expect(!f, 0)) {
        unlock_files();
        if (ak_file_identify(fd, &dev, &ino))
            return NULL;
        lock_files();
        f = ak_file_look_up(dev, ino);
    }
    struct ak_vcpu *v = f ? f->vcpu : NULL;
    if (v) {
        __atomic_add_fetch(&f->users, 1, __ATOMIC_RELAXED);
        f->fd = (int)fd;
        ak_files.recent[fd & (AK_RECENT - 1)] = f;
    }
    unlock_files();
    return v;
}

/* True: it was over, and this was its last user. Then somebody is to fetch the dead; here nothing of it may be used. */
bool ak_vcpu_put(struct ak_vcpu *v)
{
    struct ak_file *f = v->file;
    if (__builtin_expect(__atomic_sub_fetch(&f->users, 1, __ATOMIC_ACQ_REL) != AK_FILE_OVER, 1))
        return false;
    lock_files();
    bury(f);
    unlock_files();
    return true;
}

/* Whether the lock of a file is still held, asked by a description of its own. */
static bool held(int own)
{
    struct flock lock = whole_file(F_WRLCK);
    return fcntl(own, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

/* close(2). The file is over if this was the last that held it; the cost does not grow with the files there are. 0 or a
 * negative errno. */
int ak_file_close(int64_t number)
{
    int fd = (int)number;
    u64 dev, ino, own_dev, own_ino;
    int r = ak_file_identify(number, &dev, &ino), own = -1;
    if (r)
        return r;
    lock_files();
    struct ak_file *f = ak_file_look_up(dev, ino);
    u64 serial = f ? f->serial : 0;
    bool locked = f && !f->unlocked;
    unlock_files();
    if (locked)
        own = reopen(fd, O_RDWR);
    r = close(fd) ? -errno : 0;
    if (!serial)
        return r;
    bool mine = own >= 0 && !ak_file_identify(own, &own_dev, &own_ino) && own_dev == dev && own_ino == ino;
    bool over = mine && !held(own);
    if (own >= 0)
        close(own);
    lock_files();
    f = ak_file_look_up(dev, ino);
    if (over && f && f->serial == serial)
        ak_file_over(f);
    ak_files.events++;
    unlock_files();
    ak_file_search(!mine); /* no descriptor for the question, or no lock: now it must be found otherwise */
    return r;
}

/* Map pages of a file for ourselves, by a description that does not keep the file. The address, or a negative errno. */
int64_t ak_file_map(int fd, u64 length, u64 offset)
{
    int own = reopen(fd, O_RDWR);
    if (own < 0 && own != -ENOENT)
        return own;
    /* without /proc nobody can tell when a file is over: it is kept, by this mapping too */
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, own < 0 ? fd : own, (off_t)offset);
    int64_t r = at == MAP_FAILED ? -errno : (int64_t)at;
    if (own >= 0)
        close(own);
    return r;
}

/* -- the dead ------------------------------------------------------------------------------------------------------- */

/* The number of a file that is over and has no user; 0: there is none. It is named until it is freed. */
u64 ak_file_dead(void)
{
    lock_files();
    u64 serial = ak_files.dead ? ak_files.dead->serial : 0;
    unlock_files();
    return serial;
}

void ak_file_free(u64 serial)
{
    lock_files();
    for (struct ak_file **p = &ak_files.dead; *p; p = &(*p)->next)
        if ((*p)->serial == serial) {
            struct ak_file *f = *p;
            *p = f->next;
            free(f);
            break;
        }
    unlock_files();
}
