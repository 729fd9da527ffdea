/* The wheel's static library is every architecture Unicorn has. Only x86 is wanted: with these in their place the linker
 * takes none of the others, and the library shrinks by four fifths. None of them can be reached from x86. */
#define OTHER(name)                                                                                                    \
    void uc_init_##name(void) { __builtin_trap(); }                                                                    \
    void reg_read_##name(void) { __builtin_trap(); }                                                                   \
    void reg_write_##name(void) { __builtin_trap(); }
OTHER(arm)
OTHER(aarch64)
OTHER(m68k)
OTHER(mips)
OTHER(mipsel)
OTHER(mips64)
OTHER(mips64el)
OTHER(ppc)
OTHER(ppc64)
OTHER(riscv32)
OTHER(riscv64)
OTHER(s390x)
OTHER(sparc)
OTHER(sparc64)
OTHER(tricore)
