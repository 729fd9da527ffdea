/* PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM, as SDM vol. 2, 4.1 has them. The engine's own take the absolute value of
 * EAX and EDX, which does not exist for the most negative number: they then count down from there through memory that is
 * not the guest's. They also take the last elements of a full string for no beginning of the string that is sought. */
#include "engine_internal.h"
#include <string.h>

/* imm8, and bit 8 as the engine's decoder sets it: REX.W, so that the lengths are 64 bits wide. */
#define WORDS 1u
#define SIGNED 2u
#define AGGREGATION 0x0cu
#define NEGATIVE 0x10u
#define MASKED 0x20u
#define MOST_SIGNIFICANT 0x40u /* of PCMPxSTRI: which index */
#define WHOLE_ELEMENTS 0x40u   /* of PCMPxSTRM: what a bit of the mask becomes */
#define LONG_LENGTHS 0x100u

enum aggregation { EQUAL_ANY = 0x00, RANGES = 0x04, EQUAL_EACH = 0x08, EQUAL_ORDERED = 0x0c };

#define CC_C 1u
#define CC_Z 0x40u
#define CC_S 0x80u
#define CC_O 0x800u

struct string {
    int32_t element[16];
    u32 length; /* elements that are valid: at most all of them */
};

static u32 elements(u32 control)
{
    return control & WORDS ? 8 : 16;
}

static struct string read_elements(const struct ZMMRegister *r, u32 control)
{
    struct string s = {.length = 0};
    for (u32 i = 0; i < elements(control); i++)
        if (control & WORDS) {
            u16 word = (u16)(r->q[i / 4] >> (16 * (i % 4)));
            s.element[i] = control & SIGNED ? (int16_t)word : word;
        } else {
            u8 byte = (u8)(r->q[i / 8] >> (8 * (i % 8)));
            s.element[i] = control & SIGNED ? (int8_t)byte : byte;
        }
    return s;
}

/* A length in EAX or EDX: its absolute value, saturated. Unsigned, so the most negative number has one. */
static struct string explicit_length(const struct ZMMRegister *r, u64 length, u32 control)
{
    struct string s = read_elements(r, control);
    u64 size = control & LONG_LENGTHS ? length : (u64)(int64_t)(int32_t)length;
    if (size >> 63)
        size = -size;
    s.length = size < elements(control) ? (u32)size : elements(control);
    return s;
}

/* Valid elements end before the first that is 0. */
static struct string implicit_length(const struct ZMMRegister *r, u32 control)
{
    struct string s = read_elements(r, control);
    while (s.length < elements(control) && s.element[s.length])
        s.length++;
    return s;
}

static bool equal_any(const struct string *set, int32_t element)
{
    for (u32 i = 0; i < set->length; i++)
        if (set->element[i] == element)
            return true;
    return false;
}

/* A pair of which only the first is valid is no range. */
static bool in_ranges(const struct string *ranges, int32_t element)
{
    for (u32 i = 0; i + 1 < ranges->length; i += 2)
        if (element >= ranges->element[i] && element <= ranges->element[i + 1])
            return true;
    return false;
}

/* Whether `sought` begins at this place. What would be compared behind the register is not compared. */
static bool begins_at(const struct string *sought, const struct string *in, u32 at, u32 count)
{
    for (u32 i = 0; i < sought->length && at + i < count; i++)
        if (at + i >= in->length || sought->element[i] != in->element[at + i])
            return false;
    return true;
}

static bool equal_each(const struct string *a, const struct string *b, u32 at)
{
    bool a_valid = at < a->length, b_valid = at < b->length;
    return a_valid && b_valid ? a->element[at] == b->element[at] : a_valid == b_valid;
}

/* IntRes1: a bit for each element of `in`, the second operand. */
static u32 aggregate(const struct string *sought, const struct string *in, u32 control)
{
    u32 result = 0, count = elements(control);
    for (u32 at = 0; at < count; at++) {
        bool bit = false;
        switch (control & AGGREGATION) {
        case EQUAL_ANY: bit = at < in->length && equal_any(sought, in->element[at]); break;
        case RANGES: bit = at < in->length && in_ranges(sought, in->element[at]); break;
        case EQUAL_EACH: bit = equal_each(sought, in, at); break;
        case EQUAL_ORDERED: bit = begins_at(sought, in, at, count); break;
        }
        result |= (u32)bit << at;
    }
    return result;
}

/* IntRes2, and the flags: no others are set. */
static u32 compare(struct CPUX86State *env, const struct string *sought, const struct string *in, u32 control)
{
    u32 count = elements(control), all = (1u << count) - 1;
    u32 result = aggregate(sought, in, control);
    if (control & NEGATIVE)
        result ^= control & MASKED ? (1u << in->length) - 1 : all;
    env->cc_src = (result ? CC_C : 0) | (in->length < count ? CC_Z : 0) | (sought->length < count ? CC_S : 0) |
                  (result & 1 ? CC_O : 0);
    return result;
}

static void index_of(struct CPUX86State *env, u32 result, u32 control)
{
    env->regs[R_ECX] = !result                       ? elements(control)
                       : control & MOST_SIGNIFICANT ? 31 - (u32)__builtin_clz(result)
                                                    : (u32)__builtin_ctz(result);
}

static void mask_of(struct CPUX86State *env, u32 result, u32 control)
{
    u64 mask[2] = {result, 0};
    if (control & WHOLE_ELEMENTS) {
        u32 count = elements(control), bits = 128 / count;
        mask[0] = 0;
        for (u32 i = 0; i < count; i++)
            if (result >> i & 1)
                mask[i * bits / 64] |= ((1ull << bits) - 1) << (i * bits % 64);
    }
    memcpy(env->xmm_regs[0].q, mask, sizeof mask);
}

#define COMPARE(name, finish, sought_string, in_string)                                                                \
    void helper_##name##_xmm_x86_64(struct CPUX86State *env, struct ZMMRegister *first, struct ZMMRegister *second,    \
                                    u32 control)                                                                       \
    {                                                                                                                  \
        struct string sought = sought_string, in = in_string;                                                          \
        finish(env, compare(env, &sought, &in, control), control);                                                     \
    }
COMPARE(pcmpestri, index_of, explicit_length(first, env->regs[R_EAX], control),
        explicit_length(second, env->regs[R_EDX], control))
COMPARE(pcmpestrm, mask_of, explicit_length(first, env->regs[R_EAX], control),
        explicit_length(second, env->regs[R_EDX], control))
COMPARE(pcmpistri, index_of, implicit_length(first, control), implicit_length(second, control))
COMPARE(pcmpistrm, mask_of, implicit_length(first, control), implicit_length(second, control))
