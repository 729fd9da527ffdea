/* An instruction's prefixes and opcode (decode.c). */
#pragma once
#include "engine_internal.h"

struct ak_decoded {
    bool opsize, f2, f3, lock, vex_undefined, string_io;
    u32 map, opcode; /* map 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A */
    u32 size;        /* bytes looked at */
    u32 prefixes;    /* of them, those in front of the opcode */
    u8 rex;          /* 0: none */
};

u8 ak_code_byte(struct CPUX86State *env, u64 va); /* translate.c */
struct ak_decoded ak_decode(struct CPUX86State *env, u64 pc);
bool ak_bad_lock(struct CPUX86State *env, u64 pc, struct ak_decoded *d);
bool ak_needs_align16(const struct ak_decoded *d);
bool ak_names_mmx(const struct ak_decoded *d);
u32 ak_operand_bytes(const struct ak_decoded *d);
