"""The functions of the C library behind which a guest_memfd hides, in programs linked in every way there is."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anykvm.backends.soft.engine.library import PATH

DATA = Path(__file__).parent / "data"
LINKED = {
    "position-independent": ("-fPIE", "-pie"),
    "fixed address": ("-fno-pie", "-no-pie"),
    "fixed address, bound at start": ("-fno-pie", "-no-pie", "-Wl,-z,now"),
    "fixed address, no RELRO": ("-fno-pie", "-no-pie", "-Wl,-z,norelro", "-Wl,-z,lazy"),
    "position-independent, bound at start": ("-fPIE", "-pie", "-Wl,-z,now", "-Wl,-z,relro"),
    "no PLT": ("-fPIE", "-pie", "-fno-plt"),
    "fixed address, exports its symbols": ("-fno-pie", "-no-pie", "-rdynamic"),
    "checked buffers": ("-O2", "-D_FORTIFY_SOURCE=2", "-fno-pie", "-no-pie"),
}
REFUSED = {
    **dict.fromkeys(("write", "read", "readv", "writev", "ftruncate", "fchmod", "fchown", "futimens"), errno.EINVAL),
    **dict.fromkeys(("fsync", "fdatasync", "pointer to read", "pointer to fsync"), errno.EINVAL),
    **dict.fromkeys(("pread", "pwrite", "preadv", "pwritev", "preadv2", "pwritev2", "lseek"), errno.ESPIPE),
    "posix_fallocate": errno.ESPIPE,
    "fallocate": errno.EOPNOTSUPP,
    "mmap": errno.ENODEV,
    "fstat": 0,
}


def build(source: Path, target: Path, *options: str) -> None:
    done = subprocess.run(
        ["gcc", "-w", *options, "-o", target, source, "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def outcome(program: Path, folder: Path, **environment: str) -> list[str]:
    """What the program prints. Ended by SIGALRM: one of its calls did not return."""
    command = [str(program), PATH, str(folder / "ordinary")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment or None)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr)
    return done.stdout.splitlines()


@pytest.mark.parametrize("linked", LINKED)
def test_each_function_reaches_the_library_and_no_function_reaches_a_guest_memfd(linked: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    build(DATA / "interposed.c", program, *LINKED[linked])
    lines = outcome(program, tmp_path)
    for name, refused in REFUSED.items():
        assert f"file {name} 0" in lines
        assert f"gmem {name} {refused}" in lines
    assert "file dlsym of fdatasync 0" in lines  # a C program's dlsym() is left alone, and so reaches the memfd
    assert len(lines) == 2 * len(REFUSED) + 2


@pytest.mark.parametrize("linked", ("position-independent", "fixed address"))
def test_a_library_preloaded_before_ours_stays_in_front_of_the_c_librarys(linked: str, tmp_path: Path) -> None:
    program, preloaded = tmp_path / "program", tmp_path / "preloaded.so"
    build(DATA / "interposed.c", program, *LINKED[linked])
    build(DATA / "preloaded.c", preloaded, "-shared", "-fPIC")
    lines = outcome(program, tmp_path, LD_PRELOAD=str(preloaded))
    assert lines.count("preloaded fsync") == 2  # by name and by pointer; never for the guest_memfd
    assert "file fsync 0" in lines and f"gmem fsync {errno.EINVAL}" in lines


SCRIPT = """
import ctypes, os, sys, tempfile
engine = ctypes.CDLL(sys.argv[1])
engine.ak_vm_create.restype = ctypes.c_uint64
memfd, made = os.memfd_create("gmem"), ctypes.c_uint64()
os.ftruncate(memfd, 8192)
engine.ak_gmem_create.argtypes = ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
assert engine.ak_gmem_create(engine.ak_vm_create(), memfd, 8192, 0, ctypes.addressof(made)) == 0
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 10000); file.flush(); os.fsync(file.fileno()); os.fdatasync(file.fileno())
    os.pwrite(file.fileno(), b"y", 3); assert os.pread(file.fileno(), 2, 3) == b"yx"
import decimal, ssl, sqlite3  # extension modules that are loaded afterwards
calls = (os.fsync, memfd), (os.read, memfd, 1), (os.write, memfd, b"x"), (os.ftruncate, memfd, 1)
for call, *arguments in calls:
    try: call(*arguments)
    except OSError as error: print(error.errno)
"""


def pythons() -> list[str]:
    """Every interpreter of this machine that could run anykvm: they are linked differently."""
    found = {sys.executable, "/usr/bin/python3", *(shutil.which(f"python3.{minor}") or "" for minor in range(11, 16))}
    return sorted(python for python in found if python and Path(python).exists())


@pytest.mark.parametrize("python", pythons())
def test_each_interpreter_of_this_machine(python: str) -> None:
    """Debian's is a program at a fixed address with the interpreter inside; others have a libpython."""
    command = [python, "-I", "-c", SCRIPT, PATH]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 127 or "No module named" in done.stderr:
        pytest.skip(f"{python} is no complete Python: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stdout.split()) == (0, ["22"] * 4), done.stderr
