"""A step of a sequence: plain data, so that a sequence can be printed, shortened and kept."""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """What to do, and with which arguments: numbers, strings, and lists of them."""

    op: str
    """One of ``perform.OPS``."""
    args: dict[str, Any]

    def __str__(self) -> str:
        """Write it as the Python expression that makes it.

        >>> print(step("slot", slot=1, gpa=0x10000000))
        step("slot", slot=1, gpa=0x10000000)
        """
        return f"step({', '.join((_text(self.op), *(f'{name}={_text(value)}' for name, value in self.args.items())))})"


def step(op: str, **args: Any) -> Step:
    """Make a step."""
    return Step(op, args)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        return str(value) if -4096 < value < 4096 else hex(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        inside = ", ".join(_text(part) for part in value)
        return f"[{inside}]"
    raise TypeError(f"{value!r} in a step")
