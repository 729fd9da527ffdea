"""Why a mapping that allows an access has no page for it: the end of the file, no space for it, or its fault handler.

All of them are SIGBUS to a program and EFAULT to KVM. Files are asked by name and never opened: to close one would
drop the POSIX locks that this process has on it. Sources: ``shmem_fault()``, ``hugetlb_no_page()``,
``block_page_mkwrite()``.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from anykvm.layers.annotate.hostmap import Vma

_PAGE: Final = 4096
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_POOL: Final = "/sys/kernel/mm/hugepages/hugepages-{}kB"


class Space(NamedTuple):
    """What a filesystem has; 0 bytes in all means that it has no limit of its own."""

    free: int
    total: int


def refusal(vma: Vma, hva: int) -> str:
    """Say why the page at ``hva`` cannot be had, as the end of a sentence that begins with the address."""
    page = _page_size(vma)
    path = _find(vma) if vma.inode else None
    inside = False
    if path is not None:
        file = os.stat(path)
        if not stat.S_ISREG(file.st_mode):
            return f"which cannot be had: its fault handler failed ({vma})"
        if vma.offset + (hva - vma.start) >= -(-file.st_size // page) * page:
            return f"which is beyond the end of the file, which has {file.st_size:,} bytes ({vma})"
        inside = True
    elif not vma.inode:
        return f"which cannot be had: its fault handler failed ({vma})"
    missing = _no_huge_page(page) if page > _PAGE else ""
    missing = missing or _no_space(path, vma, page)
    if missing:
        maybe = "" if inside or _anonymous(vma) else ", unless it is beyond the end of the file"
        return f"for which there is no space, ENOSPC: {missing}{maybe} ({vma})"
    if inside:
        return f"which the file could not give, though it is inside it: a quota, another limit, or an I/O error ({vma})"
    return f"which cannot be had: beyond the end of the file, no space for it, or its fault handler failed ({vma})"


def _anonymous(vma: Vma) -> bool:
    """Whether the file is the kernel's own, as large as the mapping: MAP_ANONYMOUS with MAP_HUGETLB or MAP_SHARED."""
    return vma.path.startswith(("/anon_hugepage", "/dev/zero"))


def _page_size(vma: Vma) -> int:
    """Give the size of the mapping's pages: more than 4096 for hugetlbfs."""
    wanted = f"{vma.start:x}-".encode()
    inside = False
    try:
        with open("/proc/self/smaps", "rb") as lines:
            for line in lines:
                if line.startswith(wanted):
                    inside = True
                elif inside and line.startswith(b"KernelPageSize:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _PAGE


def _find(vma: Vma) -> str | None:
    """Find a name by which the mapped file can be asked: the mapping's, a descriptor's, its own; None without any."""
    names = [f"/proc/self/map_files/{vma.start:x}-{vma.end:x}"]  # for privileged processes
    with contextlib.suppress(OSError):
        names += [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return next((name for name in (*names, vma.path) if _is(name, vma)), None)


def _is(name: str, vma: Vma) -> bool:
    """Whether this is the mapped file. Others are not asked: they may be of a filesystem that this process serves."""
    try:
        if name != vma.path and os.fsencode(os.readlink(name)).decode(errors="replace") != vma.path:
            return False
        found = os.stat(name)
    except (OSError, ValueError):
        return False
    # Some filesystems (btrfs, overlays) tell another device number there.
    return found.st_ino == vma.inode and (found.st_dev == vma.device or name != vma.path)


def _no_huge_page(size: int) -> str:
    """Say that the pool of huge pages is used up; empty if it is not, or cannot be asked."""
    pool = _POOL.format(size // 1024)
    try:
        free, reserved, total = (int(_read(f"{pool}/{name}_hugepages")) for name in ("free", "resv", "nr"))
    except (OSError, ValueError):
        return ""
    if free > reserved:
        return ""
    kind = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
    return f"the kernel has {total} huge pages of {kind}, {free} of them free, {reserved} reserved for others"


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _no_space(path: str | None, vma: Vma, page: int) -> str:
    """Say that the filesystem is full; empty if it is not, or cannot be asked."""
    space = _space(path if path is not None else _mount_point(vma.device))
    if space is None or not space.total or space.free >= page:
        return ""
    return f"its filesystem has {space.free:,} of {space.total:,} bytes free"


def _space(path: str | None) -> Space | None:
    if path is None:
        return None
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    # Blocks that only root may use are left out: a process with that right may be refused all the same, by a quota.
    return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def _mount_point(device: int) -> str | None:
    """Find where a filesystem is mounted, by its device number."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", "rb") as lines:
            for line in lines:
                fields = line.split()
                if fields[2].decode() == wanted:
                    point = os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), fields[4]))
                    if os.stat(point).st_dev == device:
                        return point
    except (OSError, ValueError):
        pass
    return None
