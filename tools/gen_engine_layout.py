#!/usr/bin/env python3
"""Generate `unicorn_layout.h`: the places of the engine's fields that the adapter reads and writes.

Unicorn's wheel ships its code but not its internal headers. They are in its source package. Given an unpacked
source package and a build folder configured by CMake for x86, this compiles a program that prints `offsetof` of each
field, and writes them down as C structures: named fields at their true offsets, padding elsewhere.

    python3 -m pip download --no-binary unicorn --no-deps unicorn==2.1.4 && tar xf unicorn-2.1.4.tar.gz
    cmake -S unicorn-2.1.4/src -B build -DUNICORN_ARCH=x86 -DBUILD_SHARED_LIBS=OFF
    python3 tools/gen_engine_layout.py unicorn-2.1.4/src build > src/anykvm/backends/soft/engine/unicorn_layout.h
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.1.4"

# struct -> fields: (name, member expression, C declaration with %s for the name)
FIELDS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "uc_struct": (
        "struct uc_struct",
        [
            ("stop_interrupt", "stop_interrupt", "void *%s"),
            ("cpu", "cpu", "struct CPUState *%s"),
            ("tcg_ctx", "tcg_ctx", "struct TCGContext *%s"),
            ("size_recur_mem", "size_recur_mem", "int %s"),
            ("invalid_error", "invalid_error", "int %s"),
            ("stop_request", "stop_request", "_Bool %s"),
            ("quit_request", "quit_request", "_Bool %s"),
            ("emulation_done", "emulation_done", "_Bool %s"),
            ("nested_level", "nested_level", "int %s"),
        ],
    ),
    "CPUState": (
        "CPUState",
        [
            ("cflags_next_tb", "cflags_next_tb", "uint32_t %s"),
            ("exit_request", "exit_request", "_Bool %s"),
            ("interrupt_request", "interrupt_request", "uint32_t %s"),
            ("env_ptr", "env_ptr", "struct CPUX86State *%s"),
            ("icount_decr_ptr", "icount_decr_ptr", "union IcountDecr *%s"),
            ("can_do_io", "can_do_io", "uint32_t %s"),
            ("mem_io_pc", "mem_io_pc", "uintptr_t %s"),
            ("halted", "halted", "uint32_t %s"),
            ("exception_index", "exception_index", "int32_t %s"),
            ("uc", "uc", "struct uc_struct *%s"),
            ("tcg_exit_req", "tcg_exit_req", "int %s"),
            ("cc", "cc", "struct CPUClass *%s"),
            ("stopped", "stopped", "_Bool %s"),
        ],
    ),
    "CPUClass": (
        "CPUClass",
        [
            ("do_unaligned_access", "do_unaligned_access", "void *%s"),
            ("tlb_fill", "tlb_fill", "void *%s"),
            ("cpu_exec_interrupt", "cpu_exec_interrupt", "void *%s"),
            ("cpu_exec_enter", "cpu_exec_enter", "void *%s"),
        ],
    ),
    "TCGContext": (
        "TCGContext",
        [
            ("nb_temps", "nb_temps", "int %s"),
            ("tb_cflags", "tb_cflags", "uint32_t %s"),
            ("code_gen_buffer", "code_gen_buffer", "char *%s"),
            ("code_gen_buffer_size", "code_gen_buffer_size", "size_t %s"),
            ("code_gen_epilogue", "code_gen_epilogue", "void *%s"),
        ],
    ),
    "TranslationBlock": (
        "TranslationBlock",
        [
            ("pc", "pc", "uint64_t %s"),
            ("cs_base", "cs_base", "uint64_t %s"),
            ("flags", "flags", "uint32_t %s"),
            ("size", "size", "uint16_t %s"),
            ("cflags", "cflags", "uint32_t %s"),
        ],
    ),
    "DisasContextBase": (
        "DisasContextBase",
        [
            ("tb", "tb", "struct TranslationBlock *%s"),
            ("pc_first", "pc_first", "uint64_t %s"),
            ("pc_next", "pc_next", "uint64_t %s"),
            ("num_insns", "num_insns", "int %s"),
            ("max_insns", "max_insns", "int %s"),
        ],
    ),
    "TranslatorOps": (
        "TranslatorOps",
        [("translate_insn", "translate_insn", "void (*%s)(struct DisasContextBase *, struct CPUState *)")],
    ),
    "CPUX86State": (
        "CPUX86State",
        [
            ("regs", "regs", "uint64_t %s[16]"),
            ("eip", "eip", "uint64_t %s"),
            ("eflags", "eflags", "uint64_t %s"),
            ("cc_dst", "cc_dst", "uint64_t %s"),
            ("cc_src", "cc_src", "uint64_t %s"),
            ("cc_op", "cc_op", "uint32_t %s"),
            ("df", "df", "int32_t %s"),
            ("hflags", "hflags", "uint32_t %s"),
            ("hflags2", "hflags2", "uint32_t %s"),
            ("segs", "segs", "struct SegmentCache %s[6]"),
            ("ldt", "ldt", "struct SegmentCache %s"),
            ("tr", "tr", "struct SegmentCache %s"),
            ("gdt", "gdt", "struct SegmentCache %s"),
            ("idt", "idt", "struct SegmentCache %s"),
            ("cr", "cr", "uint64_t %s[5]"),
            ("a20_mask", "a20_mask", "int32_t %s"),
            ("efer", "efer", "uint64_t %s"),
            ("fpstt", "fpstt", "uint32_t %s"),
            ("fpus", "fpus", "uint16_t %s"),
            ("fpuc", "fpuc", "uint16_t %s"),
            ("fptags", "fptags", "uint8_t %s[8]"),
            ("fpregs", "fpregs", "struct FPRegister %s[8]"),
            ("fpop", "fpop", "uint16_t %s"),
            ("fpip", "fpip", "uint64_t %s"),
            ("fpdp", "fpdp", "uint64_t %s"),
            ("sse_status", "sse_status", "struct FloatStatus %s"),
            ("mxcsr", "mxcsr", "uint32_t %s"),
            ("xmm_regs", "xmm_regs", "struct ZMMRegister %s[32]"),
            ("sysenter_cs", "sysenter_cs", "uint32_t %s"),
            ("sysenter_esp", "sysenter_esp", "uint64_t %s"),
            ("sysenter_eip", "sysenter_eip", "uint64_t %s"),
            ("star", "star", "uint64_t %s"),
            ("lstar", "lstar", "uint64_t %s"),
            ("cstar", "cstar", "uint64_t %s"),
            ("fmask", "fmask", "uint64_t %s"),
            ("kernelgsbase", "kernelgsbase", "uint64_t %s"),
            ("tsc_aux", "tsc_aux", "uint64_t %s"),
            ("xcr0", "xcr0", "uint64_t %s"),
            ("pat", "pat", "uint64_t %s"),
            ("error_code", "error_code", "int %s"),
            ("exception_is_int", "exception_is_int", "int %s"),
            ("exception_next_eip", "exception_next_eip", "uint64_t %s"),
            ("dr", "dr", "uint64_t %s[8]"),
            ("old_exception", "old_exception", "int %s"),
            ("v_tpr", "v_tpr", "uint8_t %s"),
            ("features", "features", "uint32_t %s[8]"),
            ("uc", "uc", "struct uc_struct *%s"),
        ],
    ),
}

#: Types whose size or inner layout the structures above rely on: (our name, engine expression, size)
SIZES = [
    ("struct SegmentCache", "sizeof(SegmentCache)"),
    ("struct FPRegister", "sizeof(FPReg)"),
    ("struct ZMMRegister", "sizeof(ZMMReg)"),
    ("struct FloatStatus", "sizeof(float_status)"),
    ("TranslatorOps", "sizeof(TranslatorOps)"),
]
INNER = [
    ("FLOAT_STATUS_FLAGS", "offsetof(float_status, float_exception_flags)"),
    ("SEG_SELECTOR", "offsetof(SegmentCache, selector)"),
    ("SEG_BASE", "offsetof(SegmentCache, base)"),
    ("SEG_LIMIT", "offsetof(SegmentCache, limit)"),
    ("SEG_FLAGS", "offsetof(SegmentCache, flags)"),
]
#: Plain numbers the adapter needs as macros.
NUMBERS = [
    ("ENV_IN_CPU", "offsetof(X86CPU, env)"),
    ("TLB_FAST_IN_CPU", "offsetof(X86CPU, neg.tlb.f)"),
    ("TLB_FAST_SIZE", "sizeof(CPUTLBDescFast)"),
    ("TLB_FAST_MASK", "offsetof(CPUTLBDescFast, mask)"),
    ("TLB_FAST_TABLE", "offsetof(CPUTLBDescFast, table)"),
    ("TLB_DESC_IN_CPU", "offsetof(X86CPU, neg.tlb.d)"),
    ("TLB_DESC_SIZE", "sizeof(CPUTLBDesc)"),
    ("TLB_DESC_VICTIMS", "offsetof(CPUTLBDesc, vtable)"),
    ("TLB_VICTIMS", "CPU_VTLB_SIZE"),
    ("TLB_MODES", "NB_MMU_MODES"),
    ("TLB_ENTRY_SIZE", "sizeof(CPUTLBEntry)"),
    ("TLB_ENTRY_WRITE", "offsetof(CPUTLBEntry, addr_write)"),
    ("TLB_ENTRY_ADDEND", "offsetof(CPUTLBEntry, addend)"),
    ("FLOAT_STATUS_ROUNDING", "offsetof(float_status, float_rounding_mode)"),
    ("FLOAT_STATUS_FTZ", "offsetof(float_status, flush_to_zero)"),
    ("FLOAT_STATUS_DAZ", "offsetof(float_status, flush_inputs_to_zero)"),
    ("TLB_ENTRY_BITS", "CPU_TLB_ENTRY_BITS"),
    ("MAX_TEMPS", "TCG_MAX_TEMPS"),
]


def measure(source: Path, build: Path) -> dict[str, int]:
    """Compile and run a program against the engine's own headers; returns each offset and size by key."""
    lines = [
        '#include "qemu/osdep.h"\n#include "cpu.h"\n#include "exec/exec-all.h"\n#include "exec/translator.h"',
        '#include "tcg/tcg.h"\n#include "uc_priv.h"\n#undef printf\n#include <stdio.h>\nint main(void) {',
    ]
    for struct, (ctype, fields) in FIELDS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof({ctype}));')
        lines += [f'printf("{struct}.{n} %zu\\n", offsetof({ctype}, {member}));' for n, member, _ in fields]
    lines += [f'printf("{i} %zu\\n", (size_t)({expr}));' for i, (_, expr) in enumerate(SIZES)]
    lines += [f'printf("{name} %zu\\n", (size_t)({expr}));' for name, expr in INNER]
    lines += [f'printf("{name} %zu\\n", (size_t)({expr}));' for name, expr in NUMBERS]
    lines.append("return 0; }")
    with tempfile.TemporaryDirectory() as tmp:
        src = Path(tmp, "layout.c")
        src.write_text("\n".join(lines))
        include = [build / "x86_64-softmmu", build] + [
            source / d for d in ("glib_compat", "qemu", "qemu/include", "include", "qemu/tcg", "qemu/tcg/i386")
        ]
        flags = ["-w", "-fPIC", "-DNEED_CPU_H", "-include", str(source / "qemu/x86_64.h")]
        flags += [f"-I{d}" for d in [*include, source / "qemu/target/i386"]]
        obj = Path(tmp, "layout")
        subprocess.run(["gcc", *flags, str(src), "-o", str(obj)], check=True)
        out = subprocess.run([str(obj)], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.rsplit(" ", 1) for line in out.splitlines())}


def render(at: dict[str, int]) -> str:
    """The header's text."""
    out = [
        f"/* Generated by tools/gen_engine_layout.py from the source package of Unicorn {VERSION}; do not edit.",
        " * Named fields stand at their true offsets in the engine's structures; the rest is padding. */",
        "#pragma once\n#include <stddef.h>\n#include <stdint.h>\n",
        f'#define ANYKVM_UNICORN_VERSION "{VERSION}"',
        *[f"#define {name} {at[name]}" for name, _ in NUMBERS],
        "",
        "struct SegmentCache { uint32_t selector; uint64_t base; uint32_t limit; uint32_t flags; };",
        f"struct FPRegister {{ union {{ uint8_t bytes[{at['1']}]; "
        "struct { uint64_t low; uint16_t high; } ext; }; } __attribute__((aligned(16)));",
        f"struct ZMMRegister {{ uint64_t q[{at['2'] // 8}]; }};",
        f"struct FloatStatus {{ union {{ uint8_t bytes[{at['3']}]; struct {{ "
        f"char pad[{at['FLOAT_STATUS_FLAGS']}]; uint8_t exception_flags; }}; }}; }};",
        "union IcountDecr { uint32_t u32; struct { uint16_t low, high; } u16; };",
    ]
    checks = [f'_Static_assert(sizeof({n}) == {at[str(i)]}, "{n}");' for i, (n, _) in enumerate(SIZES[:4])]
    checks += [
        f'_Static_assert(offsetof(struct SegmentCache, {f}) == {at["SEG_" + f.upper()]}, "segment {f}");'
        for f in ("selector", "base", "limit", "flags")
    ]
    out += checks
    for struct, (_, fields) in FIELDS.items():
        out.append(f"\nstruct {struct} {{\n    union {{\n        char size_[{at[struct]}];")
        for name, _, decl in fields:
            offset = at[f"{struct}.{name}"]
            pad = f"char pad_{name}[{offset}]; " if offset else ""
            out.append(f"        struct {{ {pad}{decl % name}; }};")
        out.append("    };\n};")
        for name, _, _ in fields:
            out.append(
                f'_Static_assert(offsetof(struct {struct}, {name}) == {at[f"{struct}.{name}"]}, "{struct}.{name}");'
            )
    return "\n".join(out) + "\n"


def main() -> int:
    """Command line entry."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    sys.stdout.write(render(measure(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
