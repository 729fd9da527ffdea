/* INS and OUTS, which are KVM's emulator's: OUTS one item an exit with registers written back; INS as many items as fit into
 * the page of the destination. The decoder is shown UD2 in their place (translate.c). */
#include "engine_internal.h"
#include <string.h>

#define INS_BUFFER 1024
#define STRING_OUT 2 /* string_in: it is OUTS that is to be finished */

struct string_io {
    u32 size, addr_bytes, len;
    int seg;
    bool in, rep;
};

static bool decode_string(struct ak_vcpu *v, struct string_io *s)
{
    bool mode64 = v->env->hflags & HF_CS64_MASK, wide = v->env->hflags & HF_CS32_MASK;
    bool opsize = false, adsize = false;
    u8 code[15];
    u32 size = ak_peek_instruction(v, code); /* never a fault: this also looks at the #UD of a failed fetch */
    *s = (struct string_io){.seg = R_DS};
    for (u32 n = 0; n < size; n++) {
        u8 b = code[n];
        switch (b) {
        case 0x26: s->seg = R_ES; continue;
        case 0x2e: s->seg = R_CS; continue;
        case 0x36: s->seg = R_SS; continue;
        case 0x3e: s->seg = R_DS; continue;
        case 0x64: s->seg = R_FS; continue;
        case 0x65: s->seg = R_GS; continue;
        case 0x66: opsize = true; continue;
        case 0x67: adsize = true; continue;
        case 0xf2: case 0xf3: s->rep = true; continue;
        case 0x6c: case 0x6d: case 0x6e: case 0x6f:
            s->in = b < 0x6e;
            s->size = !(b & 1) ? 1 : (mode64 || wide) != opsize ? 4 : 2;
            s->addr_bytes = mode64 ? (adsize ? 4 : 8) : wide != adsize ? 4 : 2;
            s->len = n + 1;
            return true;
        default:
            if (mode64 && (b & 0xf0) == 0x40)
                continue;
            return false;
        }
    }
    return false;
}

bool ak_is_string_io(struct ak_vcpu *v)
{
    struct string_io s;
    return decode_string(v, &s);
}

static u64 address_mask(u32 bytes)
{
    return bytes == 8 ? ~0ull : (1ull << (8 * bytes)) - 1;
}

static void set_reg(struct ak_vcpu *v, int reg, u32 bytes, u64 value)
{
    u64 *r = &v->env->regs[reg];
    *r = bytes == 2 ? (*r & ~0xffffull) | (u16)value : bytes == 4 ? (u32)value : value;
}

static u64 string_address(struct ak_vcpu *v, const struct string_io *s)
{
    int seg = s->in ? R_ES : s->seg;
    u64 base = v->env->segs[seg].base, at = v->env->regs[s->in ? R_EDI : R_ESI] & address_mask(s->addr_bytes);
    if (v->env->hflags & HF_CS64_MASK)
        return (seg == R_FS || seg == R_GS ? base : 0) + at;
    return (u32)(base + at);
}

/* toggle_interruptibility(): the emulator has done something, which ends STI's shadow. */
static void end_shadow(struct ak_vcpu *v)
{
    if (v->env->hflags & HF_INHIBIT_IRQ_MASK)
        ak_request_event(v);
    v->env->hflags &= ~HF_INHIBIT_IRQ_MASK;
}

static void retire(struct ak_vcpu *v, const struct string_io *s)
{
    v->env->eip += s->len;
    v->env->eflags &= ~(u64)RFLAGS_RF;
}

static void advance(struct ak_vcpu *v, const struct string_io *s, u32 items)
{
    int64_t step = (v->env->df < 0 ? -1 : 1) * (int64_t)s->size * items;
    int reg = s->in ? R_EDI : R_ESI;
    set_reg(v, reg, s->addr_bytes, v->env->regs[reg] + (u64)step);
    end_shadow(v);
    if (s->rep) { /* RIP stays: the instruction retires when it runs again and finds RCX 0 */
        set_reg(v, R_ECX, s->addr_bytes, (v->env->regs[R_ECX] - items) & address_mask(s->addr_bytes));
        v->env->eflags |= RFLAGS_RF;
    } else
        retire(v, s);
}

/* The engine's index of data accesses at the current privilege. */
int ak_data_mmu_index(const struct ak_vcpu *v)
{
    if ((v->env->hflags & HF_CPL_MASK) == 3)
        return MMU_USER_IDX;
    return !(v->env->hflags & HF_SMAP_MASK) || (v->env->eflags & RFLAGS_AC) ? 2 : MMU_KSMAP_IDX;
}

/* The first stage of such an access, or its fault. */
static void walk(struct ak_vcpu *v, u64 va, bool write, struct ak_translation *t)
{
    int r = ak_walk(v, va, write ? AK_WRITE : AK_READ, ak_data_mmu_index(v), true, t);
    if (r == AK_WALK_GP)
        ak_raise(v, EXCP_GP, 0, 0);
    if (r == AK_WALK_OK)
        return;
    v->env->cr[2] = va;
    ak_raise(v, EXCP_PF, (int)t->error_code, 0);
}

/* Copy guest memory through both stages as KVM's emulator does: what the host refuses becomes device accesses. */
static u32 guest_copy(struct ak_vcpu *v, u64 va, u8 *data, u32 size, bool write)
{
    u32 done = 0;
    while (done < size) {
        struct ak_translation t = {0};
        u64 at = va + done;
        u32 part = size - done, room = (u32)(AK_PAGE_SIZE - (at & ~AK_PAGE_MASK));
        part = part < room ? part : room;
        walk(v, at, write, &t);
        ak_emulator_pfn(v, t.gpa, write ? AK_WRITE : AK_READ, &t);
        u64 hva = t.hva | (at & ~AK_PAGE_MASK), gpa = t.gpa | (at & ~AK_PAGE_MASK);
        bool ram = t.pfn == KVM_PFN_OK;
        if (ram && (write ? ak_copy_out(hva, data + done, part) : ak_copy_in(data + done, hva, part)))
            ram = false;
        if (ram && write)
            tb_invalidate_phys_range_x86_64(v->uc, hva - AK_HOST_WINDOW_BASE, hva - AK_HOST_WINDOW_BASE + part);
        if (!ram && write)
            for (u32 i = 0; i < part && v->nfragments < AK_LOG; i += 8) {
                struct ak_access_log *f = &v->fragments[v->nfragments++];
                *f = (struct ak_access_log){.gpa = gpa + i, .size = (u8)(part - i < 8 ? part - i : 8), .is_write = 2};
                memcpy(&f->data, data + done + i, f->size);
            }
        if (!ram && !write) {
            if (v->nreplay < v->nlog)
                memcpy(data + done, &v->log[v->nreplay++].data, part);
            else {
                struct ak_translation rest = {0};
                if (done + part < size)
                    walk(v, at + part, false, &rest); /* the other page's fault comes before the device */
                v->log[v->nlog] = (struct ak_access_log){.gpa = gpa, .size = (u8)part};
                v->exit.gpa = gpa;
                v->exit.size = part;
                v->exit.is_write = 0;
                v->pio_rip = ak_linear_rip(v);
                v->string_out = 1;
                v->completion = AK_COMPLETE_MMIO_READ;
                ak_leave(v, AK_EXIT_MMIO, 0);
            }
        }
        done += part;
    }
    return done;
}

/* How many items emulate.c:pio_in_emulated() asks for: as many as the page has bytes, whatever the size of an item. */
static u32 ins_items(struct ak_vcpu *v, const struct string_io *s)
{
    u64 count = s->rep ? v->env->regs[R_ECX] & address_mask(s->addr_bytes) : 1, at = v->env->regs[R_EDI] & ~AK_PAGE_MASK;
    u64 in_page = v->env->df < 0 ? at : AK_PAGE_SIZE - at;
    u64 n = count < INS_BUFFER / s->size ? count : INS_BUFFER / s->size;
    n = in_page < n ? in_page : n;
    return n ? (u32)n : 1;
}

/* The device's answer for OUTS is there: the completion goes on to the port. Dropped if the caller moved RIP. */
bool ak_answer_string_out(struct ak_vcpu *v)
{
    if (!v->string_out)
        return false;
    v->string_out = 0;
    if (ak_linear_rip(v) != v->pio_rip) {
        v->nlog = v->nreplay = 0;
        return true;
    }
    memcpy(&v->log[v->nlog++].data, v->run->mmio.data, 8);
    v->string_in = STRING_OUT;
    return true;
}

/* INS or OUTS at RIP (the decoder was shown UD2 in its place). Privilege first, then the exit. */
void ak_string_io(struct ak_vcpu *v)
{
    struct string_io s;
    u32 port = v->env->regs[R_EDX] & 0xffff;
    decode_string(v, &s);
    ak_check_io(v, port, s.size, 0);
    if (s.rep && !(v->env->regs[R_ECX] & address_mask(s.addr_bytes))) {
        retire(v, &s);
        return;
    }
    v->exit.port = port;
    v->exit.size = s.size;
    v->exit.count = 1;
    v->exit.is_write = !s.in;
    v->nreplay = 0;
    if (s.in) {
        v->exit.count = v->pio_count = ins_items(v, &s);
        v->pio_rip = ak_linear_rip(v);
        v->completion = AK_COMPLETE_STRING_IN;
        memset(ak_pio_data(v), 0, v->pio_count * s.size);
    } else {
        u8 item[4] = {0};
        guest_copy(v, string_address(v, &s), item, s.size, false);
        memcpy(ak_pio_data(v), item, s.size);
        v->nlog = v->nreplay = 0;
        advance(v, &s, 1);
    }
    ak_leave(v, AK_EXIT_IO, 0);
}

/* The rest of INS, in guest context: the items are in the PIO page. */
void ak_finish_string_in(struct ak_vcpu *v)
{
    struct string_io s;
    if (v->string_in == STRING_OUT) {
        v->string_in = 0;
        if (decode_string(v, &s) && !s.in)
            ak_string_io(v);
        return;
    }
    v->string_in = 0;
    if (ak_linear_rip(v) != v->pio_rip || !decode_string(v, &s) || !s.in)
        return;
    u32 items = v->pio_count;
    u64 left = s.rep ? v->env->regs[R_ECX] & address_mask(s.addr_bytes) : 1;
    if (left < items) /* the caller changed RCX between the exits */
        items = (u32)left;
    v->nfragments = v->fragment = 0;
    if (v->env->df >= 0 && items) {
        guest_copy(v, string_address(v, &s), ak_pio_data(v), items * s.size, true);
        advance(v, &s, items);
    }
    /* Backwards it is one item at a time; those behind one that went to a device are asked for again. */
    for (u32 i = 0; v->env->df < 0 && i < items && !v->nfragments; i++) {
        guest_copy(v, string_address(v, &s), ak_pio_data(v) + i * s.size, s.size, true);
        advance(v, &s, 1);
    }
    if (v->nfragments)
        v->exit.kind = AK_EXIT_MMIO;
}
