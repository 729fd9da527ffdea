/* Whom a function of ours stands in front of: what a call by name reaches in this program without us.
 *
 * That is not what dlsym(RTLD_DEFAULT) finds. A program that is not position-independent (Debian's python3.11) and takes
 * a function's address has an entry of its own, in its PLT, stand for that address everywhere. The entry jumps through
 * the program's GOT, which is what interpose.c writes to: a function of ours that took the entry for the original would
 * call itself for ever. For the same reason no address of such a function may be taken in this library (&read): the
 * dynamic linker gives the entry for it, whereas a call (read()) reaches the function.
 *
 * It is not always the C library's function either: a library that was preloaded, or a sanitizer's, comes first. */
#define _GNU_SOURCE
#include "interpose.h"
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#define MOST 1024 /* objects; those that define such functions come first */

/* The loaded objects behind the program itself, in the order in which names are looked up. */
struct objects {
    size_t n;
    int failed; /* a negative errno */
    char *names[MOST];
    void *handles[MOST];
};

static int note(struct dl_phdr_info *info, size_t size, void *context)
{
    struct objects *objects = context;
    (void)size;
    if (!strchr(info->dlpi_name, '/')) /* the program, the vDSO */
        return 0;
    if (!(objects->names[objects->n] = strdup(info->dlpi_name))) {
        objects->failed = -ENOMEM;
        return 1;
    }
    return ++objects->n == MOST;
}

static void let_go(struct objects *objects)
{
    for (size_t i = 0; i < objects->n; i++) {
        if (objects->handles[i])
            dlclose(objects->handles[i]);
        free(objects->names[i]);
    }
    free(objects);
}

/* NULL without memory. They are held until let_go(): another thread may close them meanwhile. */
static struct objects *hold_objects(void)
{
    struct objects *objects = calloc(1, sizeof *objects);
    if (!objects)
        return NULL;
    dl_iterate_phdr(note, objects);
    if (objects->failed) {
        let_go(objects);
        return NULL;
    }
    for (size_t i = 0; i < objects->n; i++)
        objects->handles[i] = dlopen(objects->names[i], RTLD_LAZY | RTLD_NOLOAD);
    return objects;
}

static const void *object_of(const void *address)
{
    Dl_info info;
    return address && dladdr(address, &info) ? info.dli_fbase : NULL;
}

/* The object's own function; NULL if it has none. */
static void *defined_in(void *handle, const char *name)
{
    struct link_map *map = NULL;
    void *found = handle ? dlsym(handle, name) : NULL; /* also in what it depends on */
    if (!found || dlinfo(handle, RTLD_DI_LINKMAP, &map))
        return NULL;
    return object_of(found) == object_of(map->l_ld) ? found : NULL;
}

/* The symbol that an address of the program stands for is one that the program imports: it is an entry as above. A program
 * that has the function itself (a sanitizer that is linked in) defines the symbol. */
static bool is_import(void *address)
{
    const ElfW(Sym) *symbol = NULL;
    Dl_info info;
    return dladdr1(address, &info, (void **)&symbol, RTLD_DL_SYMENT) && symbol && symbol->st_shndx == SHN_UNDEF;
}

/* The C library, whatever its file is called: it has a function that no other library has. */
static void *hold_libc(const struct objects *objects)
{
    for (size_t i = 0; i < objects->n; i++)
        if (defined_in(objects->handles[i], "gnu_get_libc_version"))
            return objects->handles[i];
    return NULL;
}

static void find_original(struct ak_interposed *f, const struct objects *objects, void *libc)
{
    f->address = dlsym(RTLD_DEFAULT, f->name);
    f->libc = defined_in(libc, f->name);
    void *found = f->address && !is_import(f->address) ? f->address : NULL;
    for (size_t i = 0; i < objects->n && f->address && !found; i++)
        found = defined_in(objects->handles[i], f->name);
    f->real = found;
}

int ak_find_originals(struct ak_interposed *functions, size_t n)
{
    struct objects *objects = hold_objects();
    if (!objects)
        return -ENOMEM;
    void *libc = hold_libc(objects);
    for (size_t i = 0; i < n; i++)
        find_original(&functions[i], objects, libc);
    let_go(objects);
    return 0;
}

bool ak_is_original(const struct ak_interposed *f, const void *address)
{
    return address && (address == f->real || address == f->address || address == f->libc);
}
