/* Memory of our own that is not an engine's: NULL is -ENOMEM for whoever asked. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *ak_malloc(size_t size);
void *ak_calloc(size_t count, size_t size);
void *ak_realloc(void *block, size_t size);
bool ak_injected_failure(void);
void ak_fail_allocation(uint32_t nth);
