"""A trace as a picture: a sequence diagram of characters, with the shared page beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from anykvm.explorer import words
from anykvm.explorer.catalogue import ENTRIES, classify
from anykvm.explorer.kernel import GUEST
from anykvm.explorer.moves import Kind, Step
from anykvm.explorer.search import Trace

_VMM: Final = 4
_KVM: Final = 36
_GUEST: Final = 50
_TEXT: Final = 54
"""Columns of the three life lines, and of the text beside them."""


def diagram(trace: Trace) -> list[str]:
    """Give the lines of a trace's picture. A star marks who does what the text says."""
    policy, rule, arch = trace.game
    name = classify(trace.violation)
    return [
        f"{name}: {ENTRIES[name].title}",
        f"policy {policy.name}: {policy.title}",
        f"VMM {rule.name}: {rule.title}",
        f"architecture: {', '.join(arch.members)}",
        "",
        f"{'VMM':^{2 * _VMM}}".ljust(_KVM - 1) + "KVM".ljust(_GUEST - _KVM - 1) + "guest",
        *(line for number, step in enumerate(trace.steps, 1) for line in _move(number, step)),
        "",
        words.verdict(trace.violation),
    ]


def _lanes(text: str, number: int | None = None, *, star: int | None = None) -> str:
    """One line: the life lines, one with a star, and the text."""
    line = list(" " * _TEXT)
    for column in (_VMM, _KVM, _GUEST):
        line[column] = "*" if column == star else "|"
    if number is not None:
        line[0:2] = f"{number:2}"
    return ("".join(line) + text).rstrip()


def _arrow(text: str, start: int, end: int, after: str, number: int | None = None, *, back: bool = False) -> str:
    """One line with an arrow between two life lines."""
    line = _lanes(after, number)
    body = f" {text} ".center(end - start - 2, "-")
    return line[: start + 1] + (f"<{body}" if back else f"{body}>") + line[end:]


def _move(number: int, step: Step) -> Iterator[str]:
    move, after = step.move, f"exit_reason is {words.page_of(step.world.kernel)}"
    if move.ended is not None and move.call is not None:
        yield _arrow(words.call(move.call), _VMM, _KVM, "", number)
        yield from _inside(move.ended.steps)
        yield _arrow(words.result(move.ended.errno), _VMM, _KVM, after, back=True)
    elif move.decision is not None:
        yield _lanes(words.decided(move.decision), number, star=_VMM)
    elif move.kind is Kind.PRE_FAULT:
        yield _arrow(move.kind.value, _VMM, _KVM, "", number)
        yield _arrow("fails", _VMM, _KVM, after, back=True)
    else:
        yield _lanes(move.kind.value, number)
        yield _lanes(after)


def _inside(steps: tuple[str, ...]) -> Iterator[str]:
    outside = True
    for text in steps:
        if text.startswith(GUEST):
            if outside:
                yield _arrow("enter", _KVM, _GUEST, "")
            outside = False
            yield _lanes(text.removeprefix(GUEST), star=_GUEST)
        else:
            yield _lanes(text, star=_KVM)
