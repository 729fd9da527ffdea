"""Build of the compiled parts: the engine library (C, with Unicorn inside) and the contract (Cython, from run.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

UNICORN_VERSION = "2.1.4"
ENGINE = Path("src/anykvm/backends/soft/engine")

#: Engine functions we stand in front of and still call. The others we replace outright: ours come first in the link.
WRAPPED = (
    "cpu_ldub_code",
    "cpu_lduw_code",
    "cpu_ldl_code",
    "cpu_ldq_code",
    "gen_intermediate_code",
    "translator_loop",
    "tcg_gen_code",
    "helper_into",
    "helper_load_seg",
    "helper_lldt",
    "helper_ltr",
    "helper_ljmp_protected",
    "helper_lcall_protected",
    "helper_lret_protected",
    "helper_lookup_tb_ptr",
    "tcg_region_reset_all",
    "tcg_gen_qemu_ld_i32",
    "tcg_gen_qemu_st_i32",
    "tcg_gen_qemu_ld_i64",
    "tcg_gen_qemu_st_i64",
    "helper_le_lduw_mmu",
    "helper_le_ldul_mmu",
    "helper_le_ldq_mmu",
    "helper_ret_ldub_mmu",
    "helper_be_lduw_mmu",
    "helper_be_ldul_mmu",
    "helper_be_ldq_mmu",
    "helper_le_stw_mmu",
    "helper_le_stl_mmu",
    "helper_le_stq_mmu",
    "cpu_ldq_data_ra",
    "helper_be_stw_mmu",
    "helper_be_stl_mmu",
    "helper_be_stq_mmu",
)

#: What the engine calls of the C library, and alloc.c answers. Our own calls reach the C library.
ENGINE_CALLS = {
    "malloc": "ak_engine_malloc",
    "calloc": "ak_engine_calloc",
    "realloc": "ak_engine_realloc",
    "free": "ak_engine_free",
    "posix_memalign": "ak_engine_posix_memalign",
    "__strdup": "ak_engine_strdup",
    "vasprintf": "ak_engine_vasprintf",
    "mmap64": "ak_engine_mmap",
    "abort": "ak_engine_abort",
    "exit": "ak_engine_exit",
}


def unicorn_package() -> Path:
    """The installed Unicorn wheel, of exactly the version whose layout the adapter knows."""
    from importlib.metadata import version

    spec = importlib.util.find_spec("unicorn")
    if spec is None or spec.origin is None or version("unicorn") != UNICORN_VERSION:
        raise SystemExit(f"setup.py: the engine needs unicorn=={UNICORN_VERSION} at build time")
    return Path(spec.origin).parent


def reproducible() -> list[str]:
    """The compiler's options that keep this machine's directories out of what is built: same sources, same bytes."""
    places = {os.getcwd(): ".", str(unicorn_package()): "unicorn", sysconfig.get_path("include"): "python"}
    return [f"-ffile-prefix-map={path}={name}" for path, name in places.items()]


class BuildWithEngine(build_ext):
    """build_ext that links the engine library first, where the extension will look for it."""

    def run(self) -> None:
        where = Path("src") if self.inplace else Path(self.build_lib)
        target = where / "anykvm/backends/soft/engine"
        target.mkdir(parents=True, exist_ok=True)
        self.link_engine(target / "libanykvm_engine.so")
        for extension in self.extensions:
            extension.extra_compile_args += reproducible()
            if extension.name == RUN.name:
                extension.extra_objects = [str(target / "libanykvm_engine.so")]
        super().run()

    def build_extensions(self) -> None:
        # A Python with a shared library gives its extensions a -rpath of its own, before ours. The loader would look
        # for our engine there first, in a directory of the machine that built it.
        linker = self.compiler.linker_so
        self.compiler.set_executable("linker_so", [word for word in linker if not word.startswith("-Wl,-rpath")])
        super().build_extensions()

    def link_engine(self, library: Path) -> None:
        unicorn = unicorn_package()
        sources = sorted(str(source) for source in ENGINE.glob("*.c"))
        archive = self.redirected(unicorn / "lib/libunicorn.a")
        # a sanitizer's functions are in the library that is loaded first
        undefined = [] if "ANYKVM_ENGINE_CFLAGS" in os.environ else ["-Wl,-z,defs"]
        wraps = [f"-Wl,--wrap={name}_x86_64" for name in WRAPPED]
        command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-O2", "-g1", "-fPIC", "-fno-omit-frame-pointer"]
        command += ["-ftls-model=initial-exec"]  # a thread's first KVM_RUN must not need memory
        command += os.environ.get("ANYKVM_ENGINE_CFLAGS", "").split()  # tools/sanitize.sh
        command += ["-Wall", "-Wextra", "-Werror", *reproducible(), "-shared", "-o", str(library), *sources]
        command += [f"-I{unicorn / 'include'}"]
        command += [str(archive), "-Wl,-z,muldefs", *undefined, *wraps, "-Wl,-Bsymbolic"]
        command += ["-Wl,--exclude-libs,ALL", "-Wl,-soname,libanykvm_engine.so", "-lpthread", "-lm"]
        subprocess.run(command, check=True)

    def redirected(self, archive: Path) -> Path:
        """Copy the engine's archive with its calls of ENGINE_CALLS renamed."""
        copy = Path(self.build_temp) / "libunicorn.a"
        copy.parent.mkdir(parents=True, exist_ok=True)
        renames = [f"--redefine-sym={name}={ours}" for name, ours in ENGINE_CALLS.items()]
        subprocess.run([os.environ.get("OBJCOPY", "objcopy"), *renames, str(archive), str(copy)], check=True)
        return copy


RUN = Extension(
    "anykvm.backends.soft.run",
    ["src/anykvm/backends/soft/run.py"],
    include_dirs=[str(ENGINE)],
    extra_compile_args=["-O2"],
    extra_link_args=["-Wl,-rpath,$ORIGIN/engine"],
)

#: Calls that no signal handler interrupts, for every backend.
ATOMIC = Extension(
    "anykvm.host.atomic",
    ["src/anykvm/host/atomic.pyx", "src/anykvm/host/workers.c"],
    include_dirs=["src/anykvm/host"],
    depends=["src/anykvm/host/workers.h"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"],
)

#: Calls from the engine into Python.
UPCALL = Extension(
    "anykvm.backends.soft.upcall",
    ["src/anykvm/backends/soft/upcall.pyx", "src/anykvm/backends/soft/python_flag.c"],
    include_dirs=["src/anykvm/backends/soft"],
    depends=["src/anykvm/backends/soft/python_flag.h"],
    extra_compile_args=["-O2"],
)

setup(
    ext_modules=cythonize([RUN, ATOMIC, UPCALL], include_path=["src"], build_dir="build/cython", language_level=3),
    cmdclass={"build_ext": BuildWithEngine},
)
