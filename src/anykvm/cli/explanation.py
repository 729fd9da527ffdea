"""How an explanation is printed: the sentence first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from anykvm.abi.constants import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from anykvm.abi.names import errno_name, exit_name
from anykvm.api import MemoryFault
from anykvm.backends import Backend
from anykvm.layers.annotate import Cause, Entry, Suspect
from anykvm.vmm.loop import describe

_SLOT_FLAGS = {
    KVM_MEM_LOG_DIRTY_PAGES: "KVM_MEM_LOG_DIRTY_PAGES",
    KVM_MEM_READONLY: "KVM_MEM_READONLY",
    KVM_MEM_GUEST_MEMFD: "KVM_MEM_GUEST_MEMFD",
}
_ENTRY_FLAGS = {2: "writable", 4: "user", 0x20: "accessed", 0x40: "dirty", 0x80: "large page", 1 << 63: "no execute"}
_LABEL = 13


class Report(NamedTuple):
    """A KVM_RUN that failed, and what was found of it."""

    backend: Backend
    errno: int
    exit_reason: int
    annotation: MemoryFault | None
    """What KVM itself said, where it did."""
    cause: Cause | None
    unexplained: str
    """Why nothing was found; empty if it was."""

    @property
    def agrees(self) -> bool | None:
        """Whether KVM's annotation names the page that was found; None where there are not both."""
        if self.annotation is None or self.cause is None:
            return None
        return self.annotation.gpa in (suspect.page for suspect in self.cause.candidates)

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        fault = self.annotation
        return {
            "backend": self.backend.name,
            "profile": self.backend.profile,
            "errno": errno_name(self.errno),
            "exit_reason": exit_name(self.exit_reason),
            "memory_fault": fault and {"gpa": fault.gpa, "size": fault.size, "flags": fault.flags},
            "agrees": self.agrees,
            "cause": self.cause and self.cause.plain(),
            "unexplained": self.unexplained,
        }


def text(report: Report) -> str:
    """Write it for a reader."""
    cause = report.cause
    if cause is None:
        lines = [*_block("KVM", _kvm(report))]
        return "\n".join(lines + _block("no cause", [report.unexplained] if report.unexplained else []))
    lines = [*_reason(cause), "", *_block("KVM", _kvm(report)), *_block("vCPU", [cause.vcpu.mode()])]
    lines += _block("registers", _registers(cause))
    lines += _block("instruction", [f"{cause.code.hex(' ')}  {cause.instruction}".strip() or "cannot be read"])
    lines += _block("accesses", _accesses(cause))
    for number, suspect in enumerate(cause.candidates, 1):
        if cause.ambiguous:
            lines += ["", f"candidate {number}"]
        lines += _suspect(suspect, cause)
    return "\n".join(lines)


def _block(label: str, lines: Iterable[str]) -> list[str]:
    """Put a label in front of the first line, and as much space in front of the others."""
    return [f"{'' if number else label:{_LABEL}}{line}" for number, line in enumerate(lines)]


def _reason(cause: Cause) -> list[str]:
    if not cause.ambiguous:
        return [cause.reason]
    head = f"ambiguous: one of {len(cause.candidates)}, and nothing architectural says which was met first"
    listed = [f"  {number}. {suspect.reason}" for number, suspect in enumerate(cause.candidates, 1)]
    return [head, *listed, *([f"  or another: {cause.unknown}"] if cause.unknown else [])]


def _kvm(report: Report) -> list[str]:
    lines = [f"backend {report.backend.name}, profile {report.backend.profile}"]
    failed = f"KVM_RUN failed with {errno_name(report.errno)}, exit_reason {exit_name(report.exit_reason)}"
    if report.annotation is None:
        return [*lines, f"{failed}: memory_fault is not valid"]
    verdict = {True: "the same page", False: "ANOTHER PAGE", None: "nothing was found to compare"}[report.agrees]
    return [*lines, failed, f"KVM annotated it: {describe(report.annotation)}: {verdict}"]


def _registers(cause: Cause) -> list[str]:
    cpu = cause.vcpu.plain()
    width = 16 if cause.vcpu.long else 8

    def row(names: str) -> str:
        return " ".join(f"{name:>3}={cpu[name]:0{width}x}" for name in names.split())

    lines = [row("rax rbx rcx rdx"), row("rsi rdi rbp rsp")]
    if cause.vcpu.long:
        lines += [row("r8 r9 r10 r11"), row("r12 r13 r14 r15")]
    lines += [row("rip") + f" rflags={cpu['rflags']:x}"]
    lines += [" ".join(f"{name}={cpu[name]:x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer"))]
    segments = [_segment(name, cpu[name]) for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")]
    lines += ["  ".join(segments[at : at + 2]) for at in range(0, len(segments), 2)]
    tables = [f"{name:>3} base {cpu[name]['base']:x} limit {cpu[name]['limit']:x}" for name in ("gdt", "idt")]
    return [*lines, "  ".join(tables)]


def _segment(name: str, segment: dict[str, int]) -> str:
    return f"{name:>3} {segment['selector']:04x} base {segment['base']:x} limit {segment['limit']:x}"


def _accesses(cause: Cause) -> list[str]:
    rows = [
        (
            look.role,
            look.access.value,
            f"{look.size} byte{'s' if look.size != 1 else ''}",
            f"at {look.linear:#x}",
            "" if look.gpa is None else f"gpa {look.gpa:#x}",
            look.outcome,
        )
        for look in cause.looks
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _suspect(suspect: Suspect, cause: Cause) -> list[str]:
    slot = suspect.memslot
    flags = " | ".join(name for bit, name in _SLOT_FLAGS.items() if slot.flags & bit) or "0"
    place = f"{slot.slot}: gpa {slot.gpa:#x}, size {slot.size:#x}, userspace_addr {slot.hva:#x}, flags {flags}"
    vma = suspect.vma
    host = "nothing mapped" if vma is None else f"{vma.start:x}-{vma.end:x} {vma.perms} {vma.path}".rstrip()
    return [
        *_block("page walk", _walk(suspect, cause)),
        *_block("memslot", [place]),
        *_block("vma", [f"hva {suspect.hva:#x}: {host}"]),
        *_block("touch", [suspect.touch]),
    ]


def _walk(suspect: Suspect, cause: Cause) -> list[str]:
    if not suspect.walk:
        return [f"no paging: linear {suspect.linear:#x} is gpa {suspect.gpa:#x}"]
    lines = [f"of linear {suspect.linear:#x}, cr3 {cause.vcpu.sregs.cr3:#x}"]
    lines += [_entry(entry) for entry in suspect.walk]
    if suspect.role == "page table":
        lines[-1] += "  <- the access that was refused"
    return lines


def _entry(entry: Entry) -> str:
    where = f"{entry.level:5}  at gpa {entry.gpa:#x}"
    if entry.value is None:
        return f"{where}  cannot be read"
    if not entry.value & 1:
        return f"{where}  {entry.value:#x} not present"
    return f"{where}  {entry.value:#x} {', '.join(['present', *_bits(entry.level, entry.value)])}"


def _bits(level: str, value: int) -> list[str]:
    # The bit for a large page is another one in a PTE.
    return [name for bit, name in _ENTRY_FLAGS.items() if value & bit and (level, bit) != ("PTE", 0x80)]
