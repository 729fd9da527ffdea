"""How the ioctl handlers say no."""

from __future__ import annotations

from typing import Final

IN_DEVICE_FAULT: Final = "called from inside a device's fault handler, and a vCPU of this VM waits for such a handler"
"""EDEADLK."""
DEVICE_FAILED: Final = "a device's fault handler has raised an exception"


class Refused(Exception):
    """An ioctl fails with this errno; ``SoftBackend`` makes the OSError that names the ioctl."""

    def __init__(self, errno: int, detail: str = "") -> None:
        """``detail`` names the field or argument at fault; empty: the errno's own text."""
        super().__init__(errno, detail)
        self.errno = errno
        self.detail = detail
