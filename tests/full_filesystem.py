"""A program for test_annotate_space.py: maps files of a filesystem that is full, and asks the annotate layer's HostMap.

It mounts in a mount namespace of its own, so that nobody else sees it. It prints a line for each question. Exit code
77: it cannot be done here, and the line says why. Arguments: tmpfs, tmpfs-user (without root's rights), ext4.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import tempfile
from contextlib import closing, suppress

import anykvm
from anykvm import GuestMemory
from anykvm.host import libc
from anykvm.layers.annotate import Annotate, UnresolvedAccess
from anykvm.layers.annotate.hostmap import HostMap

PAGE, MIB = 4096, 1 << 20
NEWNS, NEWUSER, REC, PRIVATE, SET_DUMPABLE = 0x20000, 0x10000000, 0x4000, 0x40000, 4
system = ctypes.CDLL(None, use_errno=True)
point = "/mnt" if os.path.isdir("/mnt") else "/tmp"


def skip(why: str) -> None:
    print(why)
    sys.exit(77)


def attempt(what: str, result: int) -> None:
    if result:
        skip(f"{what}: {os.strerror(ctypes.get_errno())}")


def own_mounts(user: bool) -> None:
    if user and not os.geteuid():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        system.prctl(SET_DUMPABLE, 1, 0, 0, 0)
    ids = os.geteuid(), os.getegid()
    attempt("unshare", system.unshare(NEWNS | (NEWUSER if ids[0] else 0)))
    if ids[0]:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    attempt("mount --make-rprivate", system.mount(None, b"/", None, REC | PRIVATE, None))


def mount(kind: str) -> None:
    if kind == "ext4":
        with tempfile.NamedTemporaryFile(suffix=".img") as image:
            image.truncate(4 * MIB)
            for command in (["mkfs.ext4", "-q", image.name], ["mount", "-o", "loop", image.name, point]):
                try:
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                except OSError as error:
                    skip(f"{command[0]}: {error.strerror}")
                if done.returncode:
                    skip(f"{command[0]}: {done.stderr.strip()}")
    else:
        attempt("mount tmpfs", system.mount(b"none", point.encode(), b"tmpfs", 0, b"size=256k"))


def make(name: str, size: int) -> int:
    fd = os.open(f"{point}/{name}", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, size)
    return fd


def fill() -> None:
    fd = os.open(f"{point}/fill", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (PAGE, 1):
            with suppress(OSError):
                while os.write(fd, b"x" * size):
                    pass
            os.sync() if size == PAGE else None
    finally:
        os.close(fd)


def main() -> None:
    kind = sys.argv[1]
    layer = Annotate(anykvm.backend("soft", "linux-7.3"))  # now: its files may be root's alone
    own_mounts(kind == "tmpfs-user")
    mount(kind)
    asked: dict[str, tuple[int, bool]] = {}
    for shared in ("shared", "private"):
        for held in ("open", "closed", "unlinked"):
            fd = make(f"{shared}-{held}", MIB + 1)
            flags = libc.MAP_SHARED if shared == "shared" else libc.MAP_PRIVATE
            at = libc.mmap(0, 2 * MIB, libc.PROT_READ | libc.PROT_WRITE, flags, fd)
            asked[f"{shared} {held} read"] = (at + PAGE, False)
            asked[f"{shared} {held} write"] = (at + 2 * PAGE, True)
            asked[f"{shared} {held} last"] = (at + MIB, True)
            asked[f"{shared} {held} beyond"] = (at + MIB + PAGE, True)
            if held == "unlinked":
                os.unlink(f"{point}/{shared}-{held}")
            if held != "open":
                os.close(fd)
    guest = make("guest", 16 * PAGE)
    with GuestMemory(16 * PAGE, fd=guest) as memory:
        memory[0:6] = bytes.fromhex("c606002001f4")  # movb $1, 0x2000; hlt
        fill()
        with closing(HostMap()) as host:
            for name, (address, write) in asked.items():
                print(f"{name}: {host.ask(address, write).why}")
        with anykvm.open(layer) as kvm, kvm.create_vm() as vm:
            vm.map(memory, 0)
            vcpu = vm.create_vcpu()
            vcpu.set_real_mode(0)
            try:
                print(f"guest: {vcpu.run()}")
            except UnresolvedAccess as error:
                assert error.errno == errno.EFAULT
                print(f"guest: {error.cause.reason}")
            os.unlink(f"{point}/fill")
            print(f"guest again: {vcpu.run()}")
    with closing(HostMap()) as host:
        print(f"again: {host.ask(*asked['shared open write']).why}")


if __name__ == "__main__":
    main()
