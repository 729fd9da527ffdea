"""What delivering an exception or interrupt touches: the gate, descriptors, the TSS, the new stack."""

from __future__ import annotations

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import GuestPhysical
from anykvm.layers.annotate.operand import Operand
from anykvm.layers.annotate.reading import read
from anykvm.layers.annotate.segments import descriptor

READ, WRITE = Access.READ, Access.WRITE


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
    low = read(cpu, memory, gate_at, 8)
    if low is None or read(cpu, memory, gate_at, size) is None:
        return found
    kind, selector = low >> 40 & 0xF, low >> 16 & 0xFFFF
    if not low >> 47 & 1 or kind & 7 not in (6, 7):
        return found  # not present, or a task gate
    found += descriptor(cpu, selector, step=2)
    code = read(cpu, memory, found[-1].linear, 8) if len(found) > 1 else None
    if code is None or not code >> 47 & 1 or code >> 43 & 3 != 3:
        return found  # not a code segment that is present
    conforming = bool(code >> 42 & 1)
    level = cpu.cpl if conforming else code >> 45 & 3
    error = exception and bool(cpu.events.exception.has_error_code)
    if cpu.long:
        return found + _long(cpu, memory, low >> 32 & 7, level, error)
    return found + _legacy(cpu, memory, 4 if kind & 8 else 2, level, error)


def _long(cpu: Cpu, memory: GuestPhysical, ist: int, level: int, error: bool) -> list[Operand]:
    found = []
    top = cpu.regs.rsp
    if ist or level != cpu.cpl:
        at = cpu.system(cpu.sregs.tr.base, 0x1C + 8 * ist if ist else 4 + 8 * level)
        found.append(Operand(at, 8, READ, "tss", 3, system=True))
        entry = read(cpu, memory, at, 8)
        if entry is None:
            return found
        top = entry
    top &= ~0xF
    return found + [
        Operand(top - 8 * (n + 1), 8, WRITE, "stack", 4 + n, system=level < 3) for n in range(6 if error else 5)
    ]


def _legacy(cpu: Cpu, memory: GuestPhysical, size: int, level: int, error: bool) -> list[Operand]:
    count = 3 + error
    if level == cpu.cpl and not cpu.v86:
        return [Operand(cpu.stack(-size * (n + 1)), size, WRITE, "stack", 4 + n) for n in range(count)]
    wide = 4 if cpu.sregs.tr.type & 8 else 2  # a 32-bit or a 16-bit TSS
    at = cpu.system(cpu.sregs.tr.base, (1 + 2 * level) * wide)
    found = [Operand(at, wide + 2, READ, "tss", 3, system=True)]
    pointer = read(cpu, memory, at, wide + 2)
    if pointer is None:
        return found
    top, selector = pointer & (1 << 8 * wide) - 1, pointer >> 8 * wide
    found += descriptor(cpu, selector, step=4)
    value = read(cpu, memory, found[-1].linear, 8) if len(found) > 1 else None
    if value is None:
        return found
    base = value >> 16 & 0xFFFFFF | value >> 56 << 24
    mask = 0xFFFFFFFF if value >> 54 & 1 else 0xFFFF  # of the new stack pointer
    count += 2 + (4 if cpu.v86 else 0)
    return found + [
        Operand(base + (top - size * (n + 1) & mask) & 0xFFFFFFFF, size, WRITE, "stack", 5 + n, system=True)
        for n in range(count)
    ]
