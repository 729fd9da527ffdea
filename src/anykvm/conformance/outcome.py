"""What a system call gave, as data: most steps of a scenario are about an errno, so none is raised."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from anykvm.abi.validity import EHWPOISON

# Python has no name for EHWPOISON before 3.14, and takes the second of EOPNOTSUPP's two.
_NAMES: Final = {0: "0", _errno.EOPNOTSUPP: "EOPNOTSUPP", EHWPOISON: "EHWPOISON"}


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


def errno_name(errno: int) -> str:
    """Name an errno, ``0`` for none, the number where Python has no name.

    >>> errno_name(0), errno_name(22), errno_name(95), errno_name(133)
    ('0', 'EINVAL', 'EOPNOTSUPP', 'EHWPOISON')
    """
    return _NAMES.get(errno) or _errno.errorcode.get(errno, str(errno))
