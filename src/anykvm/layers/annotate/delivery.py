"""What delivering an exception or interrupt touches: the gate, descriptors, the TSS, the new stack."""

from __future__ import annotations

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.implicit import descriptor
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand
from anykvm.layers.annotate.walk import walk

READ, WRITE = Access.READ, Access.WRITE
_WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))


def pending(cpu: Cpu) -> tuple[int, str] | None:
    """The vector that KVM is delivering, with a name for it; None if none is."""
    events = cpu.events
    if events.exception.injected:
        return events.exception.nr, f"delivery of exception {events.exception.nr}"
    if events.interrupt.injected:
        return events.interrupt.nr, f"delivery of interrupt {events.interrupt.nr}"
    if events.nmi.injected:
        return 2, "delivery of an NMI"
    return None


def accesses(cpu: Cpu, memory: GuestPhysical, vector: int, *, exception: bool) -> list[Operand]:
    """List the accesses in the order they are made, as far as the tables can be read."""
    if not cpu.protected:
        at = cpu.system(cpu.sregs.idt.base, 4 * vector)
        pushes = [Operand(cpu.stack(-2 * (n + 1)), 2, WRITE, "stack", 2 + n) for n in range(3)]
        return [Operand(at, 4, READ, "idt", 1), *pushes]
    size = 16 if cpu.long else 8
    gate_at = cpu.system(cpu.sregs.idt.base, size * vector)
    found = [Operand(gate_at, size, READ, "idt", 1, system=True)]
    gate = _read(cpu, memory, gate_at, size)
    if gate is None:
        return found
    low = int.from_bytes(gate[:8], "little")
    kind, selector = low >> 40 & 0xF, low >> 16 & 0xFFFF
    if not low >> 47 & 1 or kind & 7 not in (6, 7):
        return found  # not present, or a task gate
    found += descriptor(cpu, selector, step=2)
    target = _read(cpu, memory, found[-1].linear, 8) if len(found) > 1 else None
    if target is None:
        return found
    code = int.from_bytes(target, "little")
    conforming = bool(code >> 42 & 1)
    level = cpu.cpl if conforming else code >> 45 & 3
    error = exception and vector in _WITH_ERROR
    if cpu.long:
        return found + _long(cpu, memory, low >> 32 & 7, level, error)
    return found + _legacy(cpu, memory, 4 if kind & 8 else 2, level, error)


def _long(cpu: Cpu, memory: GuestPhysical, ist: int, level: int, error: bool) -> list[Operand]:
    found = []
    top = cpu.regs.rsp
    if ist or level != cpu.cpl:
        at = cpu.system(cpu.sregs.tr.base, 0x1C + 8 * ist if ist else 4 + 8 * level)
        found.append(Operand(at, 8, READ, "tss", 3, system=True))
        data = _read(cpu, memory, at, 8)
        if data is None:
            return found
        top = int.from_bytes(data, "little")
    top &= ~0xF
    return found + [
        Operand(top - 8 * (n + 1), 8, WRITE, "stack", 4 + n, system=level < 3) for n in range(6 if error else 5)
    ]


def _legacy(cpu: Cpu, memory: GuestPhysical, size: int, level: int, error: bool) -> list[Operand]:
    count = 3 + error
    if level == cpu.cpl and not cpu.v86:
        return [Operand(cpu.stack(-size * (n + 1)), size, WRITE, "stack", 4 + n) for n in range(count)]
    at = cpu.system(cpu.sregs.tr.base, 4 + 8 * level)
    found = [Operand(at, 6, READ, "tss", 3, system=True)]
    data = _read(cpu, memory, at, 6)
    if data is None:
        return found
    top, selector = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")
    found += descriptor(cpu, selector, step=4)
    entry = _read(cpu, memory, found[-1].linear, 8) if len(found) > 1 else None
    if entry is None:
        return found
    value = int.from_bytes(entry, "little")
    base = value >> 16 & 0xFFFFFF | value >> 56 << 24
    count += 2 + (4 if cpu.v86 else 0)
    return found + [
        Operand(base + top - size * (n + 1) & 0xFFFFFFFF, size, WRITE, "stack", 5 + n, system=True)
        for n in range(count)
    ]


def _read(cpu: Cpu, memory: GuestPhysical, linear: int, size: int) -> bytes | None:
    """Read a system table, page by page."""
    data = b""
    while size:
        here = min(size, 4096 - linear % 4096)
        gpa = walk(cpu, memory, linear, READ, system=True).gpa
        piece = None if gpa is None else memory.peek(gpa, here)
        if piece is None:
            return None
        data += piece
        linear, size = linear + here, size - here
    return data
