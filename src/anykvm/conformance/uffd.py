"""userfaultfd(2): registering a range, answering its faults, and a thread that does so."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import threading
from collections.abc import Callable
from typing import Final

from anykvm.conformance.host import PAGE, Host

FEATURE_WP: Final = 1
FEATURE_SIGBUS: Final = 1 << 7
FEATURE_POISON: Final = 1 << 14
MODE_MISSING: Final = 1
MODE_WP: Final = 2
FLAG_WRITE: Final = 1
"""In a message's flags: the fault was a write."""

_SYS_USERFAULTFD: Final = 323
_USER_MODE_ONLY: Final = 1
"""The one kind of userfaultfd that vm.unprivileged_userfaultfd = 0 leaves to ordinary users, since Linux 5.11."""
_API: Final = 0xAA
# _IOWR and _IOR of <linux/userfaultfd.h>, whose type byte is 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_ZEROPAGE: Final = 0xC020AA04
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_POISON: Final = 0xC020AA08
_EVENT_PAGEFAULT: Final = 0x12
_MESSAGE: Final = struct.Struct("<B7xQQQ")  # event; pagefault: flags, address, and the thread id
_WRITE_PROTECT: Final = 1
ANSWER: Final = 0x600D
"""What a page that the handler copies in begins with."""


class Userfaultfd:
    """A range of host memory whose faults user space resolves. Raises OSError where the kernel cannot or may not."""

    def __init__(
        self, host: Host, mode: int = MODE_MISSING, features: int = 0, *, faults_of_the_kernel: bool = False
    ) -> None:
        """Register all of ``host``. ``faults_of_the_kernel``: a real KVM's, and those of other system calls, are to be
        resolved too. For that a user needs a privilege (EPERM); guests on the soft backend fault in user mode.
        """
        self.host = host
        self.messages = 0
        """How many faults the handler's thread has answered."""
        self.flags = 0
        """The flags of the last."""
        try:
            self.fd = _open(0)
        except PermissionError:
            if faults_of_the_kernel:
                raise
            self.fd = _open(_USER_MODE_ONLY)
        self._ioctl(_UFFDIO_API, struct.pack("<QQQ", _API, features, 0))
        self._ioctl(_UFFDIO_REGISTER, struct.pack("<QQQQ", host.address, host.size, mode, 0))

    def zero_page(self, offset: int, length: int = PAGE) -> None:
        """Put zeroed pages there."""
        self._ioctl(_UFFDIO_ZEROPAGE, struct.pack("<QQQq", self.host.address + offset, length, 0, 0))

    def copy(self, offset: int, data: bytes) -> None:
        """Put pages with these bytes there. Raises OSError: EEXIST where one is."""
        source = (ctypes.c_char * len(data)).from_buffer_copy(data)
        target = self.host.address + offset
        self._ioctl(_UFFDIO_COPY, struct.pack("<QQQQq", target, ctypes.addressof(source), len(data), 0, 0))

    def poison(self, offset: int, length: int = PAGE) -> int:
        """Mark pages as poisoned."""
        self._ioctl(_UFFDIO_POISON, struct.pack("<QQQq", self.host.address + offset, length, 0, 0))
        return 0

    def write_protect(self, offset: int, length: int, on: bool = True) -> int:
        """Protect pages against writes, or no longer; waiting writers go on."""
        mode = _WRITE_PROTECT if on else 0
        self._ioctl(_UFFDIO_WRITEPROTECT, struct.pack("<QQQ", self.host.address + offset, length, mode))
        return 0

    def pending(self) -> list[dict[str, int]]:
        """Read the messages that wait: event, flags, and the offset in the range."""
        found: list[dict[str, int]] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                event, flags, address, _ = _MESSAGE.unpack(os.read(self.fd, _MESSAGE.size))
                found.append({"ev": event, "flags": flags, "off": address - self.host.address})
        return found

    def handle(self, answer: Callable[[int], None] | None = None, seconds: float = 3.0) -> threading.Thread:
        """Start a thread that answers each fault, by default with a page that begins with ANSWER.

        ``answer`` is given the offset of the page. The thread ends when nothing comes for ``seconds``.
        """
        thread = threading.Thread(target=self._serve, args=(answer or self._copy, seconds), daemon=True)
        thread.start()
        return thread

    def _serve(self, answer: Callable[[int], None], seconds: float) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while poll.poll(seconds * 1000):
            for message in self.pending():
                if message["ev"] != _EVENT_PAGEFAULT:
                    continue
                self.messages += 1
                self.flags = message["flags"]
                # The page may have come by now, because its fault was repeated.
                with contextlib.suppress(FileExistsError):
                    answer(message["off"] & ~(PAGE - 1))

    def _copy(self, offset: int) -> None:
        self.copy(offset, ANSWER.to_bytes(8, "little").ljust(PAGE, b"\0"))

    def _ioctl(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self.fd, request, bytearray(argument))


def _open(flags: int) -> int:
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"userfaultfd: {os.strerror(error)}")
    return fd
