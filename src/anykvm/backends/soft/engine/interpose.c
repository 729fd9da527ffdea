/* Stands in front of C library functions for everything that is loaded in this process: the dynamic linker's table of
 * each object (its GOT) is made to point to ours. Needed because a memfd cannot refuse what a guest_memfd refuses
 * (gmem_file.c); nothing is replaced before the first guest_memfd exists. What is loaded later follows (dlopen()), and
 * what is looked up by name (dlsym(), as Python's ctypes does). Objects that were linked statically, those of another
 * namespace (dlmopen()) or with a sealed GOT, raw system calls and addresses looked up before are not reached.
 *
 * Nothing here depends on how the program or its Python was linked (originals.c says what that is about). */
#define _GNU_SOURCE
#include "interpose.h"
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>

static struct ak_interposed *table;
static size_t table_size;
static void *our_dlopen(const char *name, int flags);
static void *our_dlsym(void *handle, const char *name);
static struct ak_interposed our_loader[] = {{.name = "dlopen", .ours = (void *)our_dlopen},
                                            {.name = "dlsym", .ours = (void *)our_dlsym}};

static struct ak_interposed *find(const char *name)
{
    for (size_t i = 0; i < table_size; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

/* One loaded object, as its program headers describe it. */
struct object {
    const char *name;
    ElfW(Addr) base, relro, relro_end;
    const ElfW(Sym) *symbols;
    const char *strings;
    bool loads, looks_up; /* its dlopen(), its dlsym() is replaced as well */
};

/* What these two find depends on who calls them (RUNPATH, RTLD_NEXT), so only the callers are patched that do not use
 * that: the interpreter's loading of extension modules, whether it is in the program, in libpython or in another library;
 * Python's foreign function libraries, which may be part of it; and dlopen() in a program without a RUNPATH. */
static struct ak_interposed *find_loader(const struct object *o, const char *name)
{
    if (o->loads && !strcmp(name, our_loader[0].name))
        return &our_loader[0];
    return o->looks_up && !strcmp(name, our_loader[1].name) ? &our_loader[1] : NULL;
}

/* 0 or a negative errno. */
static int store(const struct object *o, void **slot, void *value)
{
    uintptr_t from = (uintptr_t)slot & ~(uintptr_t)(AK_PAGE_SIZE - 1);
    bool read_only = from >= o->relro && from < o->relro_end;
    if (read_only && mprotect((void *)from, AK_PAGE_SIZE, PROT_READ | PROT_WRITE))
        return errno == ENOMEM ? -ENOMEM : 0; /* else it is sealed, or a security module forbids it: for good */
    __atomic_store_n(slot, value, __ATOMIC_RELEASE);
    if (read_only)
        mprotect((void *)from, AK_PAGE_SIZE, PROT_READ);
    return 0;
}

/* 0 or a negative errno. */
static int patch(const struct object *o, const ElfW(Rela) *relocations, size_t bytes)
{
    int failed = 0;
    for (size_t i = 0; i < bytes / sizeof *relocations; i++) {
        const ElfW(Rela) *r = &relocations[i];
        u64 type = ELF64_R_TYPE(r->r_info);
        const ElfW(Sym) *symbol = &o->symbols[ELF64_R_SYM(r->r_info)];
        bool call = type == R_X86_64_JUMP_SLOT || type == R_X86_64_GLOB_DAT;
        bool data = type == R_X86_64_64 && !r->r_addend; /* a variable that the program may have changed since */
        if ((!call && !data) || symbol->st_shndx != SHN_UNDEF)
            continue;
        const char *name = o->strings + symbol->st_name;
        struct ak_interposed *f = find(name) ?: find_loader(o, name);
        void **slot = (void **)(o->base + r->r_offset);
        if (!f || !f->real || !*slot || *slot == f->ours || (data && !ak_is_original(f, *slot)))
            continue;
        int code = store(o, slot, f->ours);
        failed = failed ?: code;
    }
    return failed;
}

static const void *pointer(const struct object *o, ElfW(Addr) address)
{
    return (const void *)(address < o->base ? o->base + address : address); /* glibc has relocated it, others not */
}

struct patching {
    uintptr_t interpreter; /* an address in it, 0 if there is none */
    int failed;            /* a negative errno, or 0 */
};

static bool holds(const struct dl_phdr_info *info, uintptr_t address)
{
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_LOAD && address - (info->dlpi_addr + p->p_vaddr) < p->p_memsz)
            return true;
    }
    return false;
}

static int patch_object(struct dl_phdr_info *info, size_t size, void *context)
{
    struct patching *patching = context;
    struct object o = {.name = info->dlpi_name, .base = info->dlpi_addr};
    const ElfW(Dyn) *dynamic = NULL;
    (void)size;
    if (holds(info, (uintptr_t)our_dlopen))
        return 0; /* this library: it means the real ones */
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_DYNAMIC)
            dynamic = (const ElfW(Dyn) *)(o.base + p->p_vaddr);
        if (p->p_type == PT_GNU_RELRO) { /* whole pages only, as the dynamic linker protects them */
            o.relro = (o.base + p->p_vaddr) & ~(uintptr_t)(AK_PAGE_SIZE - 1);
            o.relro_end = (o.base + p->p_vaddr + p->p_memsz) & ~(uintptr_t)(AK_PAGE_SIZE - 1);
        }
    }
    if (!dynamic)
        return 0;
    const ElfW(Rela) *rela = NULL, *jumps = NULL;
    size_t rela_bytes = 0, jump_bytes = 0;
    bool runpath = false;
    for (const ElfW(Dyn) *d = dynamic; d->d_tag != DT_NULL; d++)
        switch (d->d_tag) {
        case DT_SYMTAB: o.symbols = pointer(&o, d->d_un.d_ptr); break;
        case DT_STRTAB: o.strings = pointer(&o, d->d_un.d_ptr); break;
        case DT_RELA: rela = pointer(&o, d->d_un.d_ptr); break;
        case DT_RELASZ: rela_bytes = d->d_un.d_val; break;
        case DT_JMPREL: jumps = pointer(&o, d->d_un.d_ptr); break;
        case DT_PLTRELSZ: jump_bytes = d->d_un.d_val; break;
        case DT_RUNPATH: runpath = true; break;
        }
    if (!o.symbols || !o.strings)
        return 0;
    o.looks_up =
        holds(info, patching->interpreter) || strstr(o.name, "/_ctypes.") || strstr(o.name, "/_cffi_backend.") ||
        strstr(o.name, "/libpython"); /* loaded RTLD_LOCAL, its names are not found */
    o.loads = o.looks_up || (!*o.name && !runpath);
    int first = patch(&o, rela, rela_bytes), second = patch(&o, jumps, jump_bytes);
    patching->failed = patching->failed ?: first ?: second;
    return 0;
}

/* 0 or a negative errno: an object could not be patched. No lock of ours is held meanwhile: dl_iterate_phdr() keeps other
 * threads out, and a lock that a constructor may want in another thread's dlopen() would be waited for for ever. */
static int patch_all(void)
{
    static struct ak_interposed python = {.name = "PyGILState_Ensure"};
    int code = python.real || !dlsym(RTLD_DEFAULT, python.name) ? 0 : ak_find_originals(&python, 1);
    struct patching patching = {.interpreter = (uintptr_t)python.real, .failed = code};
    dl_iterate_phdr(patch_object, &patching);
    return patching.failed;
}

static void *our_dlopen(const char *name, int flags)
{
    void *handle = ((void *(*)(const char *, int))our_loader[0].real)(name, flags);
    if (handle)
        patch_all();
    return handle;
}

static void *our_dlsym(void *handle, const char *name)
{
    void *found = ((void *(*)(void *, const char *))our_loader[1].real)(handle, name);
    const struct ak_interposed *f = found ? find(name) : NULL;
    return f && ak_is_original(f, found) ? f->ours : found;
}

int ak_interpose(struct ak_interposed *functions, size_t n)
{
    int code = ak_find_originals(our_loader, 2) ?: ak_find_originals(functions, n);
    if (code)
        return code;
    table = functions;
    table_size = n;
    return patch_all();
}
