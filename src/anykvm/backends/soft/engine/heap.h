/* The memory of one vCPU's engine. It is taken when the vCPU is created, so KVM_RUN needs no memory of the host's. */
#pragma once
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ak_vcpu;

#define AK_HEAP_SIZE (32u << 20)
#define AK_CODE_SIZE (32u << 20)      /* translated code */
#define AK_HEAP_LEAST_ORDER 6         /* 64 bytes: the smallest block */
#define AK_HEAP_ORDERS 26             /* the largest block is the whole heap: 2^25 bytes */
#define AK_HEAP_BIG_ORDER 22          /* the heap is low when it has no free block of 4 MiB */

struct ak_heap_block {                /* a free block, while it is in a list */
    struct ak_heap_block *next, **link;
};

struct ak_heap {
    struct ak_vcpu *vcpu;             /* kicked when the heap is low; NULL: not yet */
    uint8_t *base;
    uint8_t *code;                    /* AK_CODE_SIZE bytes that can be executed */
    uint32_t code_taken;              /* the engine has asked for them */
    sigjmp_buf *landing;              /* where an engine that cannot go on ends; NULL: the process ends */
    uint32_t low;                     /* translations are to be forgotten */
    uint32_t filled;                  /* a bit for each order that has a free block */
    size_t high;                      /* no byte from here on was ever handed out */
    struct ak_heap_block *free[AK_HEAP_ORDERS];
    uint8_t orders[AK_HEAP_SIZE >> AK_HEAP_LEAST_ORDER]; /* of the block that begins there; AK_HEAP_FREE: it is free */
};

/* The heap of the vCPU that this thread works for: the engine allocates there. */
extern __thread struct ak_heap *ak_heap;

int ak_heap_create(struct ak_heap **result);
void ak_heap_destroy(struct ak_heap *h);
void *ak_heap_alloc(struct ak_heap *h, size_t size);
void *ak_heap_zalloc(struct ak_heap *h, size_t size);
void *ak_heap_resize(struct ak_heap *h, void *block, size_t size);
void ak_heap_free(struct ak_heap *h, void *block);
bool ak_heap_has(const struct ak_heap *h, const void *block);
void ak_heap_is_low(struct ak_heap *h);
void ak_engine_failed(void) __attribute__((noreturn));
