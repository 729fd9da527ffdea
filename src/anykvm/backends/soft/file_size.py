"""The size of a memory file, whatever RLIMIT_FSIZE says: the kernel's KVM files have no such limit."""

from __future__ import annotations

import errno
import os
import resource

from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused


def set_file_size(fd: int, size: int) -> None:
    """Make a memfd ``size`` bytes long; SIGXFSZ is never sent.

    Refused: ENOMEM (the hard limit is smaller and this user cannot raise it), EAGAIN (the soft limit is smaller, and no
    process could be made to do it). Raises OSError: as ftruncate(2).
    """
    result: int = library().ak_set_file_size(fd, size)
    if not result:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and size > soft and -result in (errno.ENOMEM, errno.EAGAIN):
        raise Refused(-result, f"RLIMIT_FSIZE allows files of {soft} bytes, and {size} are needed")
    raise OSError(-result, os.strerror(-result))
