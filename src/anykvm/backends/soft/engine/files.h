/* The table of KVM's files (files.c), for the search of those that are over (search.c). */
#pragma once
#include "engine.h"

#define AK_FILE_OVER (1u << 31) /* out of the table; it waits for its users, or to be fetched */

struct ak_file {
    struct ak_file *next;  /* in its bucket, or among the dead */
    u64 dev, ino;
    u64 serial;            /* names it; never used twice */
    struct ak_vcpu *vcpu;  /* NULL: another kind of file */
    u32 users;             /* threads in KVM_RUN, and AK_FILE_OVER */
    int fd;                /* where it was open when it was last used: a hint */
    int own;               /* a descriptor of its inode that is the engine's and keeps nothing (gmem.c); -1: none */
    bool unlocked;         /* the kernel has no such locks */
    int64_t position;      /* of its open file description: a number that nothing else has (ak_vcpu_get) */
};

#define AK_RECENT 256 /* a power of two */

struct ak_files {
    pthread_mutex_t lock;  /* around all of this, and never for long: KVM_RUN takes it */
    struct ak_file **buckets; /* by inode */
    u32 room, count;
    struct ak_file *dead;
    u32 events;            /* files made and descriptors closed since the last search */
    struct ak_file *recent[AK_RECENT]; /* by descriptor, the last bits of it: a guess, to be checked */
};
extern struct ak_files ak_files;

struct ak_file *ak_file_look_up(u64 dev, u64 ino);
void ak_file_over(struct ak_file *f);
int ak_file_identify(int64_t fd, u64 *dev, u64 *ino);
void ak_file_search(bool now);
