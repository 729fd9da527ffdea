/* Threads of ours on which a call is done for a thread of the program (workers.c). */
#pragma once

struct workers_job {
    void (*run)(void *argument, void **keep); /* on the worker; *keep is the worker's own, NULL at first */
    void (*end)(void **keep);                 /* on the worker, before its thread ends */
    void *argument;
    unsigned long client;                     /* who asks: workers_client() on the worker */
};

/* Do a job on a worker and wait for it, whatever signals come. 0, or -EAGAIN or -ENOMEM: no thread, nothing was done. */
int workers_do(struct workers_job *job);
/* Whether this thread is a worker with a job. */
int workers_inside(void);
/* On a worker: the client of its job. Elsewhere 0. */
unsigned long workers_client(void);
