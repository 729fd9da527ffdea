/* Which pages KVM's page tables would map, for profiles in which that shows: a page that is read is mapped for writing if
 * user space has it writable, and what is mapped for writing is dirty; a page that is mapped is not asked for again, so a
 * log that was read does not have it. Sources: km:kvm_page_fault.map_writable, km:hva_to_pfn_fast(), spte.c:make_spte().
 *
 * The host tells KVM when it unmaps a page (mmu_notifier), and nobody here: a page that was mapped counts as mapped until
 * its slot goes or an access is refused. */
#define _GNU_SOURCE
#include "engine.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* -- is the host's page table entry writable? -------------------------------------------------------------------------- */

#define PAGEMAP_EXCLUSIVE (1ull << 56) /* Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_FILE      (1ull << 61)
#define PAGEMAP_PRESENT   (1ull << 63)

struct procmap_query { /* linux/fs.h of Linux 6.11; older headers lack it */
    u64 size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    u32 dev_major, dev_minor, vma_name_size, build_id_size;
    u64 vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY              _IOWR('f', 17, struct procmap_query)
#define PROCMAP_QUERY_VMA_WRITABLE 2u
#define PROCMAP_QUERY_VMA_SHARED   8u

/* The same from the text, before Linux 6.11. */
static u64 vma_flags_of_text(u64 hva)
{
    char line[512], mode[5];
    unsigned long start, end;
    u64 flags = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %4s", &start, &end, mode) == 3 && hva >= start && hva < end) {
            flags = (mode[1] == 'w' ? PROCMAP_QUERY_VMA_WRITABLE : 0) | (mode[3] == 's' ? PROCMAP_QUERY_VMA_SHARED : 0);
            break;
        }
    if (maps)
        fclose(maps);
    return flags;
}

static u64 vma_flags(u64 hva)
{
    struct procmap_query query = {.size = sizeof query, .query_addr = hva};
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    int r = fd < 0 ? -1 : ioctl(fd, PROCMAP_QUERY, &query);
    if (fd >= 0)
        close(fd);
    return r ? vma_flags_of_text(hva) : query.vma_flags;
}

/* What get_user_page_fast_only(FOLL_WRITE) would find, for a page that was just read. No descriptor is kept: who closes
 * those he does not know, or forks, would make it another file. A page of a file that is shared is taken for writable, as
 * it is in memory files; one that is private was not written, or it would be none of the file any more. */
static bool host_writable(u64 hva)
{
    u64 entry = 0, wanted = PROCMAP_QUERY_VMA_WRITABLE;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    if (pread(fd, &entry, sizeof entry, (off_t)(hva / AK_PAGE_SIZE * sizeof entry)) != sizeof entry)
        entry = 0;
    close(fd);
    if (entry & PAGEMAP_FILE)
        wanted |= PROCMAP_QUERY_VMA_SHARED;
    else if (!(entry & PAGEMAP_EXCLUSIVE)) /* the page of zeros, or one that a fork shares */
        return false;
    return (entry & PAGEMAP_PRESENT) && (vma_flags(hva) & wanted) == wanted;
}

/* -- what is mapped ---------------------------------------------------------------------------------------------------- */

/* Room for a slot's bits. 0 or -1; without a profile that asks for it there is none. */
int ak_mapped_alloc(const struct ak_vm *vm, struct ak_slot *slot)
{
    slot->mapped = vm->map_writable ? ak_calloc((slot->npages + 63) / 64, sizeof *slot->mapped) : NULL;
    slot->any_mapped = 0;
    return vm->map_writable && !slot->mapped ? -1 : 0;
}

/* kvm_tdp_mmu_map(): the processor has asked for a page, and the host has it. KVM's emulator maps nothing. */
void ak_map_page(struct ak_vcpu *v, struct ak_slot *slot, u64 gfn, enum ak_access access)
{
    u64 at = gfn - slot->base_gfn, bit = 1ull << (at % 64);
    bool dirty = access == AK_WRITE;
    if (slot->mapped && v->emulation == AK_NATIVE &&
        !(__atomic_load_n(&slot->mapped[at / 64], __ATOMIC_RELAXED) & bit)) {
        __atomic_store_n(&slot->any_mapped, 1, __ATOMIC_RELAXED);
        __atomic_fetch_or(&slot->mapped[at / 64], bit, __ATOMIC_RELAXED);
        dirty = dirty || (slot->dirty_bitmap && !(slot->flags & KVM_MEM_READONLY) &&
                          host_writable(slot->hva + at * AK_PAGE_SIZE));
    }
    if (dirty)
        ak_mark_page_dirty(v, slot, gfn);
}

/* kvm_unmap_gfn_range(), as far as it is seen: the host has refused the page. */
void ak_unmap_page(struct ak_slot *slot, u64 gfn)
{
    u64 at = gfn - slot->base_gfn;
    if (slot->mapped)
        __atomic_fetch_and(&slot->mapped[at / 64], ~(1ull << (at % 64)), __ATOMIC_RELAXED);
}

/* kvm_mmu_zap_all_fast(): what a slot that goes or moves does to every other (KVM_X86_QUIRK_SLOT_ZAP_ALL). While no vCPU
 * is in guest mode. */
void ak_zap_all(struct ak_vm *vm)
{
    vm->zaps++;
    for (u32 i = 0; vm->map_writable && i < vm->nslots; i++)
        if (vm->slots[i]->any_mapped) {
            memset(vm->slots[i]->mapped, 0, (vm->slots[i]->npages + 63) / 64 * sizeof(u64));
            vm->slots[i]->any_mapped = 0;
        }
}
