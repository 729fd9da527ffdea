"""How the ioctl handlers say no."""

from __future__ import annotations


class Refused(Exception):
    """An ioctl fails with this errno; ``SoftBackend`` makes the OSError that names the ioctl."""

    def __init__(self, errno: int, detail: str = "") -> None:
        """``detail`` names the field or argument at fault; empty: the errno's own text."""
        super().__init__(errno, detail)
        self.errno = errno
        self.detail = detail
