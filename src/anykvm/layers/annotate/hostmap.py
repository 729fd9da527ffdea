"""The host's side of a page: which mapping it belongs to, whether the host would let KVM have it, and a guarded look.

Nothing here can crash: memory is read by system calls that answer EFAULT or EIO where a plain access would be a signal.
"""

from __future__ import annotations

import ctypes
import errno
import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, NamedTuple

from anykvm.abi.names import errno_name
from anykvm.layers.annotate.backing import refusal

_PAGE: Final = 4096
_POPULATE: Final = ((22, "MADV_POPULATE_READ"), (23, "MADV_POPULATE_WRITE"))
_EHWPOISON: Final = 133
_UFFD_FLAGS: Final = frozenset(("um", "uw", "ui"))
_madvise: Final = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Vma:
    """A line of /proc/self/maps."""

    start: int
    end: int
    perms: str
    """As the kernel writes it: ``rw-s``."""
    path: str
    """The file, or a name in brackets; empty for anonymous memory."""
    offset: int = 0
    """Where in the file it begins."""
    device: int = 0
    """The file's device number, as ``st_dev``."""
    inode: int = 0
    """The file's inode number; 0 if there is no file."""

    def __str__(self) -> str:
        """Name it as a sentence wants it.

        >>> str(Vma(0, 4096, "r--s", "/memfd:ram (deleted)")), str(Vma(0, 4096, "rw-p", ""))
        ('memfd:ram', 'anonymous memory')
        """
        name = self.path.removesuffix(" (deleted)")
        if name == "/dev/zero":
            return "shared anonymous memory"
        return name.removeprefix("/") if name.startswith("/memfd:") else name or "anonymous memory"


class Answer(NamedTuple):
    """What the host says of one page."""

    why: str | None
    """Why it refuses the page, as the end of a sentence that begins with the address; None if it does not."""
    touch: str
    """The guarded touch (madvise that populates the page) and its outcome, or why it was not made."""


class HostMap:
    """The host's mappings as they are during one explanation."""

    def __init__(self) -> None:
        """Read /proc/self/maps. Raises OSError where there is none."""
        with open("/proc/self/maps", "rb") as file:
            self._lines = file.read().splitlines()
        self._starts = [int(line[: line.index(b"-")], 16) for line in self._lines]  # the kernel sorts them
        self._asked: dict[tuple[int, bool], Answer] = {}
        self._memory: int | None = None
        self._userfaultfd = _userfaultfd_open()

    def close(self) -> None:
        """Let go of /proc/self/mem."""
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def vma(self, hva: int) -> Vma | None:
        """Find the mapping an address lies in."""
        at = bisect_right(self._starts, hva) - 1
        if at < 0:
            return None
        span, perms, *rest = self._lines[at].split(None, 5)
        end = int(span.partition(b"-")[2], 16)
        if hva >= end:
            return None
        offset, device, inode = rest[:3]
        major, _, minor = device.partition(b":")
        path = rest[3].decode(errors="replace") if len(rest) > 3 else ""
        number = os.makedev(int(major, 16), int(minor, 16))
        return Vma(self._starts[at], end, perms.decode(), path, int(offset, 16), number, int(inode))

    def ask(self, hva: int, write: bool) -> Answer:
        """Ask whether the host would let KVM have the page, as ``get_user_pages()`` decides.

        A page the mapping allows is populated, which is what the guest's access would have done too.
        """
        key = (hva & ~(_PAGE - 1), write)
        if key not in self._asked:
            self._asked[key] = self._judge(*key)
        return self._asked[key]

    def _judge(self, hva: int, write: bool) -> Answer:
        vma = self.vma(hva)
        if vma is not None and self._watched(vma):
            return Answer(_forbidden(vma, write), "not made, it could wait for a userfaultfd of this process")
        advice, name = _POPULATE[write]
        code = ctypes.get_errno() if _madvise(hva, _PAGE, advice) else 0
        touch = f"{name}: {errno_name(code) if code else 'done'}"
        if vma is None:
            return Answer("where nothing is mapped", touch)
        why = _forbidden(vma, write)
        if why is not None or not code:
            return Answer(why, touch)
        if code == _EHWPOISON:
            return Answer(f"which is a poisoned page ({vma})", touch)
        if code == errno.EFAULT:
            return Answer(refusal(vma, hva), touch)
        if code == errno.ENOMEM:
            return Answer(f"for which there is no memory ({vma})", touch)
        # Kernels before 5.14, and device memory: ask by reading.
        if self.peek(hva, 1) is not None:
            return Answer(None, f"{touch}; reading it: done")
        return Answer(f"which cannot be read ({vma})", f"{touch}; reading it: failed")

    def _watched(self, vma: Vma) -> bool:
        """Whether touching it might wait for a userfaultfd of this process, perhaps for this very thread."""
        return self._userfaultfd and _registered(vma)

    def peek(self, hva: int, size: int) -> bytes | None:
        """Read memory for the analysis, through any protection (/proc/self/mem); None where nothing can be read."""
        vma = self.vma(hva)
        if vma is None or hva + size > 1 << 63 or self._watched(vma):
            return None
        try:
            if self._memory is None:
                self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._memory, size, hva)
        except OSError:
            return None
        return data if len(data) == size else None


def _forbidden(vma: Vma, write: bool) -> str | None:
    """Tell what the mapping's permissions forbid, or None."""
    if vma.perms.startswith("---"):
        return f"which is mapped without any access, PROT_NONE ({vma})"
    if write and vma.perms[1] != "w":
        return f"which is mapped read-only ({vma})"
    if vma.perms[0] != "r":
        return f"which is mapped without read access ({vma})"
    return None


def _userfaultfd_open() -> bool:
    """Whether this process holds a userfaultfd, and so may be the one who serves it."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return True
    for name in names:
        try:
            if "userfaultfd" in os.readlink(f"/proc/self/fd/{name}"):
                return True
        except OSError:
            continue  # the listing's own descriptor, or one just closed
    return False


def _registered(vma: Vma) -> bool:
    """Whether the kernel lists a userfaultfd for the mapping."""
    wanted = f"{vma.start:x}-".encode()
    inside = False
    with open("/proc/self/smaps", "rb") as file:
        for line in file:
            if line.startswith(wanted):
                inside = True
            elif inside and line.startswith(b"VmFlags:"):
                return not _UFFD_FLAGS.isdisjoint(line.decode().split())
    return False
