/* KVM files that are over and of which nobody said so: their descriptors were closed by close(2), by munmap(2), in another
 * process. A file is over if no descriptor of this process is it, and the lock that its open file description carries is
 * not among those of /proc/locks. The first is cheap to say of a file that is still open where it was last used; only if
 * there are others is anything read. A search costs as much as there are files, and comes after as many events. */
#define _GNU_SOURCE
#include "files.h"
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define FILES_PER_EVENT 32
#define CHUNK 4096 /* of /proc/locks: what the kernel writes at once */

struct suspect {
    u64 dev, ino, serial;
    int fd, own;
    bool unlocked, seen;
};

struct list {
    struct suspect *items;
    u32 count;
};

/* -- who is not where it was --------------------------------------------------------------------------------------- */

static struct list all_files(void)
{
    struct list list = {0};
    pthread_mutex_lock(&ak_files.lock);
    ak_files.events = 0;
    list.items = calloc(ak_files.count + 1, sizeof *list.items);
    for (u32 i = 0; list.items && i < ak_files.room; i++)
        for (struct ak_file *f = ak_files.buckets[i]; f; f = f->next)
            list.items[list.count++] = (struct suspect){f->dev, f->ino, f->serial, f->fd, f->own, f->unlocked, false};
    pthread_mutex_unlock(&ak_files.lock);
    return list;
}

static bool still_there(const struct suspect *s)
{
    u64 dev, ino;
    return !ak_file_identify(s->fd, &dev, &ino) && dev == s->dev && ino == s->ino;
}

static int by_inode(const void *a, const void *b)
{
    const struct suspect *one = a, *other = b;
    return (one->ino > other->ino) - (one->ino < other->ino);
}

/* The files that are not open where they were last used. */
static struct list suspects(void)
{
    struct list list = all_files();
    u32 left = 0;
    for (u32 i = 0; i < list.count; i++)
        if (!still_there(&list.items[i]))
            list.items[left++] = list.items[i];
    list.count = left;
    if (left)
        qsort(list.items, left, sizeof *list.items, by_inode);
    return list;
}

static void see(struct list *list, u64 dev, u64 ino, int fd)
{
    struct suspect key = {.ino = ino}, *found = bsearch(&key, list->items, list->count, sizeof key, by_inode);
    if (!found || found->dev != dev || (fd >= 0 && fd == found->own))
        return;
    found->seen = true;
    if (fd < 0)
        return;
    pthread_mutex_lock(&ak_files.lock);
    struct ak_file *f = ak_file_look_up(dev, ino);
    if (f)
        f->fd = fd; /* the next search finds it there */
    pthread_mutex_unlock(&ak_files.lock);
}

/* -- where else it may be ------------------------------------------------------------------------------------------- */

/* False: nothing can be said. */
static bool look_at_descriptors(struct list *list)
{
    DIR *folder = opendir("/proc/self/fd");
    if (!folder)
        return false;
    for (struct dirent *entry; (entry = readdir(folder));) {
        u64 dev, ino;
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] != '.' && !ak_file_identify(fd, &dev, &ino))
            see(list, dev, ino, fd);
    }
    closedir(folder);
    return true;
}

static void look_at_lock(struct list *list, const char *line)
{
    unsigned int major_number, minor_number;
    unsigned long ino;
    if (strstr(line, "OFDLCK") &&
        sscanf(line, "%*s %*s %*s %*s %*d %x:%x:%lu", &major_number, &minor_number, &ino) == 3)
        see(list, makedev(major_number, minor_number), ino, -1);
}

/* Locks of any process: of a file on its way through a socket, mapped, or open in a child. How many reads it took; 0:
 * nothing can be said. A lock of anybody's that goes between two reads can hide the line at the seam. */
static int look_at_locks(struct list *list)
{
    char text[2 * CHUNK + 1];
    int reads = 0, fd = open("/proc/locks", O_RDONLY | O_CLOEXEC);
    size_t kept = 0;
    ssize_t n;
    if (fd < 0)
        return 0;
    while ((n = read(fd, text + kept, CHUNK)) > 0) {
        char *line = text, *end;
        reads++;
        text[kept + (size_t)n] = 0;
        for (; (end = strchr(line, '\n')); line = end + 1) {
            *end = 0;
            look_at_lock(list, line);
        }
        kept = strlen(line);
        kept = kept < CHUNK ? kept : 0;
        memmove(text, line, kept);
    }
    close(fd);
    return n < 0 ? 0 : reads + 1;
}

static void end_unseen(const struct list *list, bool locks_known)
{
    pthread_mutex_lock(&ak_files.lock);
    for (u32 i = 0; i < list->count; i++) {
        const struct suspect *s = &list->items[i];
        struct ak_file *f = s->seen || !(locks_known || s->unlocked) ? NULL : ak_file_look_up(s->dev, s->ino);
        if (f && f->serial == s->serial)
            ak_file_over(f);
    }
    pthread_mutex_unlock(&ak_files.lock);
}

/* Search if it is time for it, or now. Both of what can be said of a file must say that it is over. */
void ak_file_search(bool now)
{
    pthread_mutex_lock(&ak_files.lock);
    bool due = now || ak_files.events * FILES_PER_EVENT >= ak_files.count;
    pthread_mutex_unlock(&ak_files.lock);
    if (!due)
        return;
    struct list list = suspects();
    if (list.count && look_at_descriptors(&list)) {
        int reads = look_at_locks(&list);
        for (int again = 0; reads > 2 && again < 2; again++)
            look_at_locks(&list);
        end_unseen(&list, reads > 0);
    }
    free(list.items);
}
