"""A guest_memfd's file operations, by plain system calls: what kvm_gmem_fops lacks is refused (ABI.md 4.4)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anykvm import Hlt, abi
from anykvm.backends.soft import SoftBackend
from anykvm.host import libc
from anykvm.testing.private import PAGE, SIZE, PrivateGuest, private_guest
from gmem_calls import CALLS
from soft_helpers import refused

MMAP, INIT_SHARED = abi.GUEST_MEMFD_FLAG_MMAP, abi.GUEST_MEMFD_FLAG_INIT_SHARED
KEEP, PUNCH, ZERO = 1, 2, 16


@pytest.fixture
def guest() -> Iterator[PrivateGuest]:
    with private_guest(SoftBackend()) as made:
        yield made


@pytest.mark.parametrize("call", CALLS)
def test_refused(guest: PrivateGuest, call: str) -> None:
    """By the descriptor and by a duplicate; another file is left alone."""
    code, function = CALLS[call]
    copy = os.dup(guest.gmem)
    for fd in (guest.gmem, copy):
        with refused(code):
            function(fd)
    os.close(copy)
    other = os.memfd_create("other")
    os.ftruncate(other, SIZE)
    result = function(other)
    if isinstance(result, mmap.mmap):
        result.close()
    os.close(other)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, PAGE, errno.EOPNOTSUPP),
        (PUNCH, 0, PAGE, errno.EOPNOTSUPP),
        (KEEP | ZERO, 0, PAGE, errno.EOPNOTSUPP),
        (KEEP, -PAGE, PAGE, errno.EINVAL),
        (KEEP, 0, 0, errno.EINVAL),
        (KEEP, 1, PAGE, errno.EINVAL),
        (KEEP, 0, PAGE + 1, errno.EINVAL),
        (KEEP | PUNCH, 1, PAGE, errno.EINVAL),
        (KEEP | PUNCH, 0, PAGE - 1, errno.EINVAL),
        (KEEP, SIZE, PAGE, errno.EINVAL),
        (KEEP, SIZE - PAGE, 2 * PAGE, errno.EINVAL),
        (KEEP, PAGE, 2**63 - PAGE, errno.EFBIG),
        (KEEP, 0, SIZE, 0),
        (KEEP | PUNCH, 0, SIZE, 0),
        (KEEP | PUNCH, SIZE - PAGE, 2 * PAGE, 0),
        (KEEP | PUNCH, SIZE, PAGE, 0),
    ],
)
def test_fallocate(guest: PrivateGuest, mode: int, offset: int, length: int, code: int) -> None:
    if not code:
        libc.fallocate(guest.gmem, mode, offset, length)
        return
    with refused(code):
        libc.fallocate(guest.gmem, mode, offset, length)
    # Looked up by whoever likes, after the file was made.
    call = ctypes.CDLL(None, use_errno=True).fallocate
    assert call(guest.gmem, mode, ctypes.c_long(offset), ctypes.c_long(length)) == -1 and ctypes.get_errno() == code


def test_what_fstat_says(guest: PrivateGuest) -> None:
    libc.fallocate(guest.gmem, KEEP, 0, SIZE)
    status = os.fstat(guest.gmem)
    assert (status.st_size, status.st_mode, status.st_blocks, status.st_blksize) == (SIZE, 0o100600, 0, PAGE)
    assert os.get_inheritable(guest.gmem)


def test_mapping() -> None:
    with private_guest(SoftBackend(), abi.KVM_X86_DEFAULT_VM, MMAP | INIT_SHARED) as guest:
        with refused(errno.EINVAL):
            mmap.mmap(guest.gmem, PAGE, mmap.MAP_PRIVATE)
        with mmap.mmap(guest.gmem, SIZE) as mapping:
            mapping[PAGE : PAGE + 8] = bytes(range(8))
            guest.load("mov 4096(%rbx), %rax; hlt")
            assert guest.vcpu.run() == Hlt() and guest.rax() == 0x0706050403020100


def test_private_memory_is_sigbus_however_it_is_mapped() -> None:
    with private_guest(SoftBackend(), flags=MMAP) as guest, mmap.mmap(guest.gmem, PAGE) as mapping:
        child = os.fork()
        if not child:
            import signal

            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            mapping[0] = 1
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -7


LATER = """
import sys, os, errno, ctypes
import anykvm
with anykvm.open("soft") as kvm, kvm.create_vm() as vm:
    fd = vm.create_guest_memfd(4096)
    later = ctypes.CDLL(sys.argv[1], use_errno=True)
    print(later.reads(fd), errno.errorcode[ctypes.get_errno()])
    r, w = os.pipe()
    os.write(w, b"through a pipe")
    print(later.reads(r))
    kvm.backend.close(fd)
plain = os.memfd_create("plain")
os.write(plain, b"plain")
print(os.pread(plain, 5, 0))
"""


def test_what_is_loaded_later_is_reached(tmp_path: Path) -> None:
    """And the last file's end ends it all."""
    library = tmp_path / "later.so"
    source = b"#include <unistd.h>\nint reads(int fd) { char c[5]; return (int)read(fd, c, sizeof c); }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(library)], input=source, check=True)
    done = subprocess.run([sys.executable, "-c", LATER, str(library)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-1 EINVAL", "5", "b'plain'"]
