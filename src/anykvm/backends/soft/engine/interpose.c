/* Stands in front of C library functions for everything that is loaded in this process: the dynamic linker's table of
 * each object (its GOT) is made to point to ours. Needed because a memfd cannot refuse what a guest_memfd refuses
 * (gmem_file.c); nothing is replaced before the first guest_memfd exists. What is loaded later follows (dlopen()), and
 * what is looked up by name (dlsym(), as Python's ctypes does). Objects that were linked statically, raw system calls and
 * addresses looked up before are not reached. */
#define _GNU_SOURCE
#include "interpose.h"
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

static struct ak_interposed *table;
static size_t table_size;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *our_dlopen(const char *name, int flags);
static void *our_dlsym(void *handle, const char *name);
static struct ak_interposed our_loader[] = {{"dlopen", (void *)our_dlopen, NULL}, {"dlsym", (void *)our_dlsym, NULL}};

static struct ak_interposed *find(const char *name)
{
    for (size_t i = 0; i < table_size; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

/* What these two find depends on who calls them (RUNPATH, RTLD_NEXT), so only the callers are patched that do not use
 * that: the interpreter's loading of extension modules, and Python's foreign function libraries. */
static struct ak_interposed *find_loader(const char *object, const char *name)
{
    bool foreign = strstr(object, "/_ctypes.") || strstr(object, "/_cffi_backend.");
    if (!strcmp(name, "dlopen") && (foreign || !*object || strstr(object, "libpython")))
        return &our_loader[0];
    if (!strcmp(name, "dlsym") && foreign)
        return &our_loader[1];
    return NULL;
}

/* One loaded object, as its program headers describe it. */
struct object {
    const char *name;
    ElfW(Addr) base, relro, relro_end;
    const ElfW(Sym) *symbols;
    const char *strings;
};

static void store(const struct object *o, void **slot, void *value)
{
    const uintptr_t page = 4096, from = (uintptr_t)slot & ~(page - 1);
    bool read_only = (uintptr_t)slot >= o->relro && (uintptr_t)slot < o->relro_end;
    if (read_only && mprotect((void *)from, page, PROT_READ | PROT_WRITE))
        return;
    __atomic_store_n(slot, value, __ATOMIC_RELEASE);
    if (read_only)
        mprotect((void *)from, page, PROT_READ);
}

static void patch(const struct object *o, const ElfW(Rela) *relocations, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *relocations; i++) {
        const ElfW(Rela) *r = &relocations[i];
        u64 type = ELF64_R_TYPE(r->r_info);
        const ElfW(Sym) *symbol = &o->symbols[ELF64_R_SYM(r->r_info)];
        bool pointer = type == R_X86_64_64 && !r->r_addend; /* in data: a table of functions */
        if ((type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT && !pointer) || symbol->st_shndx != SHN_UNDEF)
            continue;
        const char *name = o->strings + symbol->st_name;
        struct ak_interposed *f = find(name) ?: find_loader(o->name, name);
        void **slot = (void **)(o->base + r->r_offset);
        if (f && f->real && *slot && *slot != f->ours)
            store(o, slot, f->ours);
    }
}

static const void *pointer(const struct object *o, ElfW(Addr) address)
{
    return (const void *)(address < o->base ? o->base + address : address); /* glibc has relocated it, others not */
}

static int patch_object(struct dl_phdr_info *info, size_t size, void *ours)
{
    struct object o = {.name = info->dlpi_name, .base = info->dlpi_addr};
    const ElfW(Dyn) *dynamic = NULL;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_LOAD && (uintptr_t)ours - (o.base + p->p_vaddr) < p->p_memsz)
            return 0; /* this library: it means the real ones */
        if (p->p_type == PT_DYNAMIC)
            dynamic = (const ElfW(Dyn) *)(o.base + p->p_vaddr);
        if (p->p_type == PT_GNU_RELRO)
            o.relro = o.base + p->p_vaddr, o.relro_end = o.relro + p->p_memsz;
    }
    if (!dynamic || strstr(info->dlpi_name, "libc.so") || strstr(info->dlpi_name, "ld-linux") ||
        strstr(info->dlpi_name, "vdso"))
        return 0;
    const ElfW(Rela) *rela = NULL, *jumps = NULL;
    size_t rela_bytes = 0, jump_bytes = 0;
    for (const ElfW(Dyn) *d = dynamic; d->d_tag != DT_NULL; d++)
        switch (d->d_tag) {
        case DT_SYMTAB: o.symbols = pointer(&o, d->d_un.d_ptr); break;
        case DT_STRTAB: o.strings = pointer(&o, d->d_un.d_ptr); break;
        case DT_RELA: rela = pointer(&o, d->d_un.d_ptr); break;
        case DT_RELASZ: rela_bytes = d->d_un.d_val; break;
        case DT_JMPREL: jumps = pointer(&o, d->d_un.d_ptr); break;
        case DT_PLTRELSZ: jump_bytes = d->d_un.d_val; break;
        }
    if (!o.symbols || !o.strings)
        return 0;
    patch(&o, rela, rela_bytes);
    patch(&o, jumps, jump_bytes);
    return 0;
}

static void patch_all(void)
{
    pthread_mutex_lock(&lock);
    dl_iterate_phdr(patch_object, (void *)patch_all);
    pthread_mutex_unlock(&lock);
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
    return f && f->real == found ? f->ours : found;
}

/* The definition of a function in one loaded object; NULL where that object has none of its own. */
static void *defined_in(const struct link_map *map, const char *name)
{
    void *object = dlopen(map->l_name, RTLD_LAZY | RTLD_NOLOAD), *found, *owner = NULL;
    Dl_info info;
    if (!object)
        return NULL;
    found = dlsym(object, name); /* also in what the object depends on */
    if (found && !(dladdr1(found, &info, &owner, RTLD_DL_LINKMAP) && owner == map))
        found = NULL;
    dlclose(object);
    return found;
}

/* The program's own entry for a function that it only imports. A program that is not position-independent has its PLT
 * entry stand for the address of such a function, also for dlsym(). To call that entry is to call through its GOT, so
 * through what we put there. */
static bool is_import_of_program(void *address)
{
    ElfW(Sym) *symbol = NULL;
    Dl_info info;
    return dladdr1(address, &info, (void **)&symbol, RTLD_DL_SYMENT) && symbol && symbol->st_shndx == SHN_UNDEF;
}

/* The function itself, of whoever comes first in the look-up order: the C library, or a library preloaded before it. */
static void *original(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name), *program = dlopen(NULL, RTLD_LAZY);
    struct link_map *map = NULL;
    if (found && is_import_of_program(found)) {
        found = NULL;
        if (program && !dlinfo(program, RTLD_DI_LINKMAP, &map))
            for (map = map->l_next; map && !found; map = map->l_next)
                found = defined_in(map, name);
    }
    if (program)
        dlclose(program);
    return found;
}

/* Put these in front of the functions of the same name, now and in what is loaded later. Once per process. */
void ak_interpose(struct ak_interposed *functions, size_t n)
{
    for (size_t i = 0; i < n; i++)
        functions[i].real = original(functions[i].name);
    our_loader[0].real = original("dlopen");
    our_loader[1].real = original("dlsym");
    table = functions;
    table_size = n;
    patch_all();
}
