"""What a system call gave, as data: most steps of a scenario are about an errno, so none is raised."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from anykvm.abi.names import errno_name as errno_name


class Outcome(NamedTuple):
    """A result, or -1 and an errno.

    >>> Outcome(-1, 14).fields()
    {'ret': -1, 'errno': 14, 'errname': 'EFAULT'}
    """

    ret: int
    errno: int

    @property
    def failed(self) -> bool:
        """Whether there is an errno."""
        return self.ret < 0

    def check(self, what: str) -> int:
        """Give the result; raises OSError with the errno if there is one."""
        if self.failed:
            raise OSError(self.errno, f"{what}: {os.strerror(self.errno)}")
        return self.ret

    def fields(self) -> dict[str, int | str]:
        """Give it as fields of a record."""
        return {"ret": self.ret, "errno": self.errno, "errname": errno_name(self.errno)}


def attempt(call: Callable[..., int | None], *arguments: Any, **named: Any) -> Outcome:
    """Call with these arguments, and turn OSError into an outcome; None, what a method without a result returns, is 0.

    >>> import os
    >>> attempt(os.close, -1)
    Outcome(ret=-1, errno=9)
    """
    try:
        return Outcome(call(*arguments, **named) or 0, 0)
    except OSError as error:
        return Outcome(-1, error.errno or _errno.EIO)
