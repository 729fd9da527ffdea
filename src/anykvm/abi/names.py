"""Numbers to names: ioctls, exit reasons, capabilities, errnos; and errors that begin with the ioctl's name."""

from __future__ import annotations

import errno as _errno
import os
from typing import Final, NamedTuple

from anykvm.abi import constants, ioctls

_FOREIGN: Final = ("KVM_ARM_", "KVM_PPC_", "KVM_S390_")
# KVM_EXIT_* names that are not exit reasons but values inside one exit's payload.
_NOT_REASONS: Final = frozenset(
    (
        "KVM_EXIT_IO_IN",
        "KVM_EXIT_IO_OUT",
        "KVM_EXIT_HYPERCALL_LONG_MODE",
        "KVM_EXIT_HYPERV_HCALL",
        "KVM_EXIT_HYPERV_SYNDBG",
        "KVM_EXIT_HYPERV_SYNIC",
        "KVM_EXIT_XEN_HCALL",
        "KVM_EXIT_ARM_SEA_FLAG_GPA_VALID",
    )
)


# Of numbers with two names in C the one that the kernel's sources use; and one that Python does not know.
_KERNEL_ERRNOS: Final = {0: "0", 11: "EAGAIN", 35: "EDEADLK", 95: "EOPNOTSUPP", 133: "EHWPOISON"}


def _values(module: object, prefix: str) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.startswith(prefix)}


# Other architectures reuse numbers (KVM_ARM_SET_DEVICE_ADDR is KVM_GET_ONE_REG): theirs go first and are overwritten.
IOCTL_NAMES: Final[dict[int, str]] = {
    value: name
    for name, value in sorted(_values(ioctls, "KVM_").items(), key=lambda item: not item[0].startswith(_FOREIGN))
}
"""Name of every ioctl request number, x86's where architectures share one."""

EXIT_NAMES: Final[dict[int, str]] = {
    value: name for name, value in _values(constants, "KVM_EXIT_").items() if name not in _NOT_REASONS
}
"""Name of every ``kvm_run.exit_reason``."""

CAP_NAMES: Final[dict[int, str]] = {
    value: name for name, value in _values(constants, "KVM_CAP_").items() if not name.startswith("KVM_CAP_LAST")
}
"""Name of every capability number."""


class Request(NamedTuple):
    """An ioctl request number taken apart as ``<asm-generic/ioctl.h>`` packs it.

    >>> decode_request(0x8090AE81)
    Request(name='KVM_GET_REGS', read=True, write=False, size=144, type=174, nr=129)
    """

    name: str
    read: bool
    """The kernel copies the structure to the caller."""
    write: bool
    """The kernel copies the structure from the caller."""
    size: int
    """Bytes of the argument structure, flexible array excluded; 0 when the argument is an integer."""
    type: int
    nr: int


def decode_request(request: int) -> Request:
    """Take a request number apart; any 32-bit number is accepted."""
    direction = request >> 30
    return Request(
        ioctl_name(request),
        bool(direction & 2),
        bool(direction & 1),
        request >> 16 & 0x3FFF,
        request >> 8 & 0xFF,
        request & 0xFF,
    )


def ioctl_name(request: int) -> str:
    """Name a request number; an unknown one gives its number.

    >>> ioctl_name(0xAE80), ioctl_name(0x1234)
    ('KVM_RUN', 'ioctl 0x1234')
    """
    return IOCTL_NAMES.get(request) or f"ioctl {request:#x}"


def exit_name(reason: int) -> str:
    """Name an exit reason; an unknown one gives its number.

    >>> exit_name(39), exit_name(1000)
    ('KVM_EXIT_MEMORY_FAULT', 'exit reason 1000')
    """
    return EXIT_NAMES.get(reason) or f"exit reason {reason}"


def cap_name(capability: int) -> str:
    """Name a capability; an unknown one gives its number.

    >>> cap_name(232)
    'KVM_CAP_MEMORY_FAULT_INFO'
    """
    return CAP_NAMES.get(capability) or f"capability {capability}"


def errno_name(errno: int) -> str:
    """Name an errno as the kernel does, ``0`` for none; an unknown one gives its number.

    >>> errno_name(0), errno_name(14), errno_name(95), errno_name(133), errno_name(999)
    ('0', 'EFAULT', 'EOPNOTSUPP', 'EHWPOISON', 'errno 999')
    """
    return _KERNEL_ERRNOS.get(errno) or _errno.errorcode.get(errno) or f"errno {errno}"


def ioctl_error(errno: int, request: int, detail: str = "") -> OSError:
    """Make the OSError of a failed ioctl: its text begins with the ioctl's name, then says what is wrong.

    Python picks the subclass by errno, so EAGAIN gives BlockingIOError and EINTR InterruptedError.

    >>> ioctl_error(22, 0xAE80, "arg is not 0")
    OSError(22, 'KVM_RUN: arg is not 0')
    >>> str(ioctl_error(14, 0xAE80))
    '[Errno 14] KVM_RUN: Bad address'
    """
    return OSError(errno, f"{ioctl_name(request)}: {detail or os.strerror(errno)}")
