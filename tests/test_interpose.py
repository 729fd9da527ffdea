"""The engine stands in front of the C library however the program, its Python included, was linked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anykvm.backends.soft.engine.library import PATH as ENGINE

HERE = Path(__file__).parent
SOURCE = Path(ENGINE).parent / "gmem_file.c"

PLUGIN = b"#include <unistd.h>\nint reads(int fd) { char c; return (int)read(fd, &c, 1); }"

WRAPPER = b"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
int wrapped_calls;
#define NEXT(type, name, parameters) ((type(*) parameters)dlsym(RTLD_NEXT, name))
int fsync(int fd) { wrapped_calls++; return NEXT(int, "fsync", (int))(fd); }
ssize_t read(int fd, void *b, size_t n) { return NEXT(ssize_t, "read", (int, void *, size_t))(fd, b, n); }
ssize_t pread64(int fd, void *b, size_t n, off_t at)
{
    return NEXT(ssize_t, "pread64", (int, void *, size_t, off_t))(fd, b, n, at);
}
ssize_t pread(int fd, void *b, size_t n, off_t at) { return pread64(fd, b, n, at); }
"""

LINKED = {
    "position-independent": "-fPIE -pie -z lazy",
    "position-independent, bound at once": "-fPIE -pie -z now -z relro",
    "position-dependent": "-fno-pie -no-pie -z lazy",
    "position-dependent, bound at once": "-fno-pie -no-pie -z now -z relro",
    "position-independent, no PLT": "-fPIE -pie -fno-plt",
    "position-dependent, no PLT": "-fno-pie -no-pie -fno-plt",
    "position-dependent, old hash table": "-fno-pie -no-pie -Wl,--hash-style=sysv",
    "position-dependent, optimized and fortified": "-fno-pie -no-pie -O2 -D_FORTIFY_SOURCE=2",
    "position-dependent, its symbols exported": "-fno-pie -no-pie -rdynamic",
    "position-dependent, by gold": "-fno-pie -no-pie -fuse-ld=gold",
    "position-independent, by gold, bound at once": "-fPIE -pie -fuse-ld=gold -z now",
    "position-dependent, by lld": "-fno-pie -no-pie -fuse-ld=lld",
    "position-dependent, no RELRO": "-fno-pie -no-pie -z norelro -z lazy",
    "with a sanitizer": "-fsanitize=address",
}


def build(output: Path, source: bytes, *options: str) -> Path:
    """Compile C; skip where this machine's compiler has no such option."""
    command = ["gcc", "-Wno-deprecated-declarations", *options, "-xc", "-", "-o", str(output)]
    done = subprocess.run(command, input=source, capture_output=True, check=False)
    if done.returncode and any(option.startswith(("-fuse-ld", "-fsanitize")) for option in options):
        pytest.skip(f"gcc cannot {' '.join(options)}: {done.stderr.decode().splitlines()[-1]}")
    assert not done.returncode, done.stderr.decode()
    return output


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plugin") / "plugin.so", PLUGIN, "-shared", "-fPIC")


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wrapper") / "wrapper.so", WRAPPER, "-shared", "-fPIC")


def run(program: Path, plugin: Path, preload: str = "") -> None:
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [program, ENGINE, plugin], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("linked", LINKED)
def test_each_function_however_the_program_is_linked(linked: str, plugin: Path, wrapper: Path, tmp_path: Path) -> None:
    """An ordinary file is served, by the function that served it before; a guest_memfd refuses."""
    source = (HERE / "data" / "interpose_program.c").read_bytes()
    program = build(tmp_path / "program", source, *LINKED[linked].split())
    run(program, plugin)
    if "-fsanitize" not in LINKED[linked]:  # its runtime must come first
        run(program, plugin, str(wrapper))


def test_the_program_tries_every_function() -> None:
    source = SOURCE.read_text()
    replaced = set(re.findall(r"^ +LIST\((\w+),", source, re.M)) | set(re.findall(r"\bENTRY\((\w+)\)", source))
    tried = set(re.findall(r"^ +TRY\((\w+),", (HERE / "data" / "interpose_program.c").read_text(), re.M))
    assert len(replaced) > 30 and replaced - {"ENTRY"} == tried


def test_the_engine_takes_no_address_of_a_function_of_another_library() -> None:
    """The dynamic linker may give a program's entry for it, which is no more the function once that is replaced."""
    if not shutil.which("readelf"):
        pytest.skip("there is no readelf here")
    listed = subprocess.run(["readelf", "-rW", ENGINE], capture_output=True, text=True, check=True).stdout
    taken = re.findall(r"R_X86_64_(?:GLOB_DAT|64) +[0-9a-f]+ (\w+)@", listed)
    assert "R_X86_64_JUMP_SLO" in listed and set(taken) <= {"stderr", "stdout", "environ", "__cxa_finalize"}


OTHER = """
import ctypes, errno, mmap, os, sys
engine = ctypes.CDLL(sys.argv[1])
engine.ak_gmem_file_add.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
plain, gmem = os.memfd_create("plain"), os.memfd_create("gmem")
for fd in plain, gmem:
    os.posix_fallocate(fd, 0, 8192)
assert engine.ak_gmem_file_add(gmem, 8192, 0) == 0
sys.path.insert(0, sys.argv[2])
from gmem_calls import CALLS
assert os.fstat(plain).st_blocks == 16 and os.fstat(gmem).st_blocks == 0
for name, (code, call) in CALLS.items():
    call(plain)
    try:
        call(gmem)
        print(name, "is not refused")
    except OSError as error:
        if error.errno != code:
            print(name, error)
for name in "decimal", "ssl", "sqlite3":  # extension modules that are loaded afterwards, where they are installed
    try:
        __import__(name)
    except ImportError:
        pass
later = ctypes.CDLL(sys.argv[3], use_errno=True)
os.lseek(plain, 0, os.SEEK_SET)
assert later.reads(plain) == 1 and later.reads(gmem) == -1 and ctypes.get_errno() == errno.EINVAL
for library in None, "libc.so.6":
    fsync = ctypes.CDLL(library, use_errno=True).fsync
    assert fsync(plain) == 0 and fsync(gmem) == -1 and ctypes.get_errno() == errno.EINVAL
"""


def pythons() -> list[str]:
    """Every Python 3 that is installed here: this one, those beside it as pyenv and uv have them, and the system's."""
    folders: list[str | Path] = [
        *Path(sys.base_prefix).parent.glob("*/bin"),
        *os.get_exec_path(),
        "/usr/bin",
        "/usr/local/bin",
    ]
    found = {sys.executable}
    for folder in folders:
        try:
            names = os.listdir(folder)
        except OSError:  # another user's, or not there
            continue
        for name in names:
            real = Path(folder, name).resolve() if name.startswith("python3") else Path()
            if re.fullmatch(r"python3(\.\d+)?", real.name) and os.access(real, os.X_OK) and "shims" not in real.parts:
                found.add(str(real))
    return sorted(found)


@pytest.mark.parametrize("python", pythons())
def test_every_python_of_this_machine(python: str, plugin: Path) -> None:
    """Debian's is position-dependent and has its libpython inside; others are not, or have not."""
    asked = subprocess.run(
        [python, "-I", "-c", "import sys, ctypes, mmap; print(sys.version_info >= (3, 11))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.stdout.strip() != "True":
        pytest.skip(f"{python} does not start, is older than 3.11 or has no ctypes: {asked.stderr.strip()[-80:]}")
    done = subprocess.run(
        [python, "-I", "-c", OTHER, ENGINE, str(HERE), str(plugin)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
