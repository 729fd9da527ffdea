"""A trace as a picture: a sequence diagram of characters, with the shared page beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from anykvm.explorer import words
from anykvm.explorer.catalogue import ENTRIES, classify
from anykvm.explorer.moves import Kind, Step
from anykvm.explorer.search import Trace
from anykvm.explorer.state import Return

_VMM: Final = 4
_KVM: Final = 38
_GUEST: Final = 58
_PAGE: Final = 64
"""Columns of the three life lines, and where the page's text begins."""


def diagram(trace: Trace) -> list[str]:
    """Give the lines of a trace's picture."""
    policy, rule, arch = trace.game
    name = classify(trace.violation)
    lines = [
        f"{name}: {ENTRIES[name].title}",
        f"policy {policy.name}: {policy.title}",
        f"VMM {rule.name}: {rule.title}",
        f"architecture: {', '.join(arch.members)}",
        "",
        _line({_VMM - 1: "VMM", _KVM - 1: "KVM", _GUEST - 2: "guest", _PAGE: "kvm_run.exit_reason"}),
    ]
    for number, step in enumerate(trace.steps, 1):
        lines += _move(number, step)
    return [line.rstrip() for line in [*lines, "", words.verdict(trace.violation)]]


def _line(parts: dict[int, str]) -> str:
    """Place texts at columns; a text may run over what follows it."""
    line = ""
    for column, text in sorted(parts.items()):
        line = line.ljust(column) + text if len(line) <= column else f"{line} {text}"
    return line


def _lanes(number: int | None = None, page: str = "", **texts: str) -> str:
    """One line with the three life lines. ``vmm``, ``kvm``, ``guest``: text to the right of a life line."""
    parts = {_PAGE: page} if page else {}
    for column, name in ((_VMM, "vmm"), (_KVM, "kvm"), (_GUEST, "guest")):
        parts[column] = "|" + texts.get(name, "")
    if number is not None:
        parts[0] = str(number)
    return _line(parts)


def _arrow(text: str, start: int, end: int, *, back: bool = False) -> str:
    room = end - start - 2
    line = f" {text} ".center(room, "-")
    return f"<{line[1:]}-" if back else f"-{line[:-1]}>"


def _move(number: int, step: Step) -> Iterator[str]:
    move, after = step.move, step.world.kernel
    if move.ended is not None and move.call is not None:
        yield _lanes(number, vmm=_arrow(words.call(move.call), _VMM, _KVM))
        yield from _inside(move.ended)
        end = _arrow(words.result(move.ended.errno), _VMM, _KVM, back=True)
        yield _lanes(vmm=end, page=words.page_of(after))
    elif move.decision is not None:
        yield _lanes(number, vmm=f" {words.decided(move.decision)}")
    elif move.kind is Kind.PRE_FAULT:
        yield _lanes(number, vmm=_arrow("KVM_PRE_FAULT_MEMORY", _VMM, _KVM))
        yield _lanes(vmm=_arrow("fails", _VMM, _KVM, back=True), page=words.page_of(after))
    else:
        yield _lanes(number, vmm=f" ({move.kind.value})", page=words.page_of(after))


def _inside(ended: Return) -> Iterator[str]:
    if not ended.did:
        for text in ended.steps:
            yield _lanes(kvm=f" {text}")
        return
    entered = [text for text in ended.steps if text[:2] in ("S8", "S9")]
    for text in ended.steps:
        if text not in entered:
            yield _lanes(kvm=f" {text}")
    yield _lanes(kvm=_arrow("enter", _KVM, _GUEST))
    for insn in ended.did:
        yield _lanes(guest=f" {insn.value}")
    for text in entered:
        yield _lanes(kvm=f" {text}")
