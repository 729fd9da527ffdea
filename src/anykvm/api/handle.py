"""What Kvm, Vm and Vcpu share: a descriptor, its ioctls with errors that explain themselves, and closing."""

from __future__ import annotations

import contextlib
import ctypes
import errno as _errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from anykvm.abi.names import ioctl_name
from anykvm.host.atomic import Dropped, atomically_or_here
from anykvm.host.closing import Closing

if TYPE_CHECKING:
    from anykvm.backends.base import Backend

    Argument: TypeAlias = int | ctypes.Structure | ctypes.Union | ctypes.Array[ctypes.c_uint8]

_S = TypeVar("_S", bound=ctypes.Structure)

_DETAILS = {
    _errno.EIO: "the VM belongs to another process (KVM objects do not survive fork), or is dead",
    _errno.ENOTTY: "not supported by this KVM",
}


def explain(
    error: OSError, request: int, shown: dict[str, int] | None, why: Callable[[int], str | None] | None
) -> OSError:
    """Make the error a caller sees: errno kept, the text naming the ioctl, its arguments, and what is wrong.

    A backend that knows what is wrong has said so behind the ioctl's name; else ``why(errno)`` works it out.
    """
    errno = error.errno or _errno.EIO
    name = ioctl_name(request)
    generic = os.strerror(errno)
    detail = (error.strerror or generic).removeprefix(f"{name}: ")
    if detail == generic:
        detail = (why(errno) if why else None) or _DETAILS.get(errno) or generic
    call = f"{name}({', '.join(f'{key}={_number(value)}' for key, value in shown.items())})" if shown else name
    # A layer's own kind of OSError stays what it is; the others are what Python makes of the errno.
    kind = OSError if type(error).__module__ == "builtins" else type(error)
    made = kind(errno, f"{call}: {detail}")
    made.__dict__.update(error.__dict__)  # what the backend or a layer attached stays: notes, a cause
    return made


def _number(value: int) -> str:
    return str(value) if -4096 < value < 4096 else hex(value)


class Handle(Dropped, Closing):
    """A descriptor of a backend. Base of ``Kvm``, ``Vm`` and ``Vcpu``; not made directly.

    Each method that is named as an ioctl does that one ioctl; Documentation/virt/kvm/api.rst describes it under the
    ioctl's name. What a method adds to it (a list for a flexible array, E2BIG tried again) is said there. Errors of
    every ioctl are not repeated at each: EBADF when closed, EIO from another process than the one that made the VM,
    ENOTTY or EINVAL where this KVM does not have the ioctl.

    Closing is idempotent, and closes what was made from this object first; so closing the ``Kvm`` closes everything.
    A signal handler runs before it or after it, so what a handler raises leaves nothing half closed. A method called
    after ``close`` raises OSError with EBADF, as the kernel has it. A ``Kvm`` that is dropped without ``close`` closes
    itself with a ResourceWarning.

    >>> import anykvm
    >>> kvm = anykvm.open()
    >>> kvm.close(); kvm.close(); kvm.closed
    True
    >>> kvm.get_api_version()
    Traceback (most recent call last):
    ...
    OSError: [Errno 9] KVM_GET_API_VERSION: this Kvm is closed
    """

    def __init__(self, backend: Backend, fd: int, parent: Handle | None = None) -> None:
        """Own descriptor ``fd`` of ``backend``."""
        self._parent = parent
        self._backend = backend
        self._fd = fd
        self._children: dict[Handle, None] = {}  # in the order they were made
        if parent is not None:
            parent._children[self] = None

    @property
    def backend(self) -> Backend:
        """The backend behind this object."""
        return self._backend

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def fileno(self) -> int:
        """Give the descriptor, for select, poll or dup; -1 once closed. It still belongs to this object."""
        return self._fd

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        """Do any ioctl: ``arg`` is an integer, an address, or a ctypes object whose address is passed.

        Returns the kernel's result; raises OSError with its errno.
        """
        return self._call(request, arg)

    def _call(
        self,
        request: int,
        arg: Argument = 0,
        shown: dict[str, int] | None = None,
        why: Callable[[int], str | None] | None = None,
    ) -> int:
        try:
            return self._backend.ioctl(self._fd, request, arg if isinstance(arg, int) else ctypes.addressof(arg))
        except OSError as error:
            if self._fd < 0:
                shown, why = None, lambda _: f"this {type(self).__name__} is closed"
            raise explain(error, request, shown, why) from error.__cause__

    def _get(self, request: int, kind: type[_S]) -> _S:
        """Do an ioctl that fills a structure."""
        structure = kind()
        self._call(request, structure)
        return structure

    def close(self) -> None:
        """Close this object and all that was made from it, children first. Calling it again does nothing.

        Raises the first OSError of a descriptor that cannot be closed; all others are closed nevertheless.
        """
        atomically_or_here(self._close)

    def _close(self) -> None:
        if self._fd < 0:
            return
        failed: OSError | None = None
        for child in reversed(list(self._children)):
            try:
                child._close()
            except OSError as error:
                failed = failed or error
        if self._parent is not None:
            self._parent._children.pop(self, None)
        fd, self._fd = self._fd, -1
        self._release()
        try:
            self._backend.close(fd)
        except OSError as error:
            failed = failed or error
        if failed is not None:
            raise failed

    def _release(self) -> None:
        """Let go of what belongs to the descriptor, before it is closed."""

    def __repr__(self) -> str:
        """Show the backend and descriptor."""
        state = f"fd={self._fd}" if self._fd >= 0 else "closed"
        return f"<{type(self).__name__} {state} on {self._backend.name}>"

    def _dropped(self) -> str | None:
        """Close what was forgotten, and say so: a Kvm with all that was made from it."""
        if getattr(self, "_fd", -1) < 0 or self._parent is not None:
            return None
        forgotten = f"unclosed {self!r}"
        with contextlib.suppress(OSError):  # nobody could be told, and what could be closed is closed
            self._close()
        return forgotten
