"""The exit this project is about: a guest access that KVM could not resolve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anykvm.abi import constants as c
from anykvm.abi.names import errno_name
from anykvm.api.exits.base import Exit


@dataclass(slots=True, repr=False)
class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT: KVM could not resolve a guest access to ``[gpa, gpa + size)``.

    Made only when the documented rule holds: KVM_RUN failed with EFAULT or EHWPOISON (``errno``) and exit_reason is
    KVM_EXIT_MEMORY_FAULT. ``flags`` is 0 or ``MemoryFault.PRIVATE``. The instruction has not executed:
    make the memory accessible and run again.

    >>> MemoryFault(0x1000, 0x1000, 0, 14)
    MemoryFault(gpa=0x1000, size=0x1000, flags=0, errno=EFAULT)
    """

    exit_reason = c.KVM_EXIT_MEMORY_FAULT
    PRIVATE: ClassVar[int] = c.KVM_MEMORY_EXIT_FLAG_PRIVATE
    """In ``flags``: the access was to private memory."""
    gpa: int
    size: int
    flags: int
    errno: int

    def __repr__(self) -> str:
        """Show the fields, errno by name."""
        start = f"MemoryFault(gpa={self.gpa:#x}, size={self.size:#x}"
        return f"{start}, flags={self.flags:#x}, errno={errno_name(self.errno)})".replace("flags=0x0", "flags=0")
