"""Finding the cause: every page the vCPU needs for what it is doing, in order, until one that the host refuses."""

from __future__ import annotations

from anykvm.layers.annotate import decode, delivery, implicit
from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cause import Cause, Look, Suspect
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.memory import PAGE, GuestPhysical
from anykvm.layers.annotate.operand import Operand, Unknown
from anykvm.layers.annotate.walk import Entry, walk

_CODE = "instruction"
_GRANTED, _REFUSED = "granted", "refused"


class Finder:
    """One search. An access counts as refused by what the host says now, not by what it said when KVM failed.

    A page table's page that is refused does not end the search: the processor may have had the translation cached, and
    met something later. Both are then candidates.
    """

    def __init__(self, cpu: Cpu, memory: GuestPhysical, *, hardware: bool) -> None:
        """``hardware``: an instruction that reads and writes an operand asks for both at once, and what is not certain
        counts; an emulated CPU reads first, and makes no access that it need not make.
        """
        self._cpu = cpu
        self._memory = memory
        self._hardware = hardware
        self._found: dict[int, Suspect] = {}  # by guest page: what was refused there first
        self._looks: list[Look] = []
        self._text = ""
        self._bytes = b""
        self.unknown = ""
        """What of the accesses could not be known, and why; empty if they are all known."""

    def find(self) -> Cause | None:
        """Search; None if the host refuses nothing that is known to be needed."""
        event = delivery.pending(self._cpu)
        if event is not None:
            vector, self._text = event
            exception = bool(self._cpu.events.exception.injected)
            self._all(delivery.accesses(self._cpu, self._memory, vector, exception=exception))
        else:
            self._instruction()
        if not self._found:
            return None
        suspects = tuple(self._found.values())
        ambiguous = len(suspects) > 1 or bool(self.unknown)
        what = (self._cpu.regs.rip, self._text, suspects, ambiguous, self.unknown, self._bytes)
        return Cause(*what, self._cpu, tuple(self._looks))

    def _instruction(self) -> None:
        rip = self._cpu.linear("cs", self._cpu.regs.rip)
        first = min(decode.MAX_LENGTH, PAGE - rip % PAGE)
        code = self._code(rip, first)
        if code is None:
            self._all([Operand(rip, 1, Access.EXEC, _CODE)])
            return
        self._bytes = code
        insn = decode.decode(self._cpu, code)
        size = insn.size if insn is not None else len(code)
        if insn is None and first < decode.MAX_LENGTH:
            size = first + 1  # it goes on behind the page
            rest = self._code(rip + first, decode.MAX_LENGTH - first)
            if rest is not None:
                self._bytes = code + rest
                insn = decode.decode(self._cpu, code + rest)
                size = insn.size if insn is not None else decode.MAX_LENGTH
        fetch = Operand(rip, size, Access.EXEC, _CODE)
        if insn is None:
            if self._all([fetch]):
                self.unknown = f"the instruction {self._bytes.hex(' ')} could not be decoded"
            return
        self._text, self._bytes = insn.text, self._bytes[: insn.size]
        try:
            self._all([fetch, *self._data(insn)])
        except Unknown as gap:
            if self._all([fetch]):
                self.unknown = str(gap)

    def _code(self, linear: int, size: int) -> bytes | None:
        gpa = walk(self._cpu, self._memory, linear, Access.EXEC).gpa
        return None if gpa is None else self._memory.peek(gpa, size)

    def _data(self, insn: decode.Instruction) -> list[Operand]:
        """The data accesses, with steps behind the fetch's."""
        vector = implicit.software_interrupt(self._cpu, insn)
        if vector is not None:
            found = delivery.accesses(self._cpu, self._memory, vector, exception=False)
        else:
            found = implicit.accesses(self._cpu, self._memory, insn)
            written = {operand.linear for operand in found if operand.access is Access.WRITE}
            if not self._hardware:
                found = [op for op in found if op.certain]
            if self._hardware or self._indivisible(insn, found):
                found = [op for op in found if op.access is not Access.READ or op.linear not in written]
        return [operand._replace(step=operand.step + 1) for operand in found]

    @staticmethod
    def _indivisible(insn: decode.Instruction, found: list[Operand]) -> bool:
        """A locked instruction on an aligned operand asks for writing at once; one that is not aligned reads first."""
        aligned = all(operand.linear % operand.size == 0 for operand in found if operand.role == "operand")
        return insn.locked and aligned and insn.name != "neg"

    def _all(self, operands: list[Operand]) -> bool:
        """Touch all in order; stop behind the step in which something other than a page table was refused.

        Returns whether it got to the end. What is not certain stops nothing.
        """
        step, over = 0, False
        for operand in operands:
            if over and operand.step != step:
                return False
            step = operand.step
            over = (not self._touch(operand) and operand.certain) or over
        return not over

    def _touch(self, operand: Operand) -> bool:
        """Look at each page of an access. False: the instruction gets no further."""
        linear, left = operand.linear, operand.size
        going = True
        while left:
            here = min(left, PAGE - linear % PAGE)
            if not self._page(operand, linear, here):
                going = False
                if operand.ordered:
                    return False
            linear, left = linear + here, left - here
        return going

    def _page(self, operand: Operand, linear: int, size: int) -> bool:
        found = walk(self._cpu, self._memory, linear, operand.access, operand.system)
        refused = False
        for number, entry in enumerate(found.entries, 1):
            slot = self._memory.slot(entry.gpa)
            access = Access.READ if slot is not None and slot.read_only else Access.WRITE
            table = Operand(linear, entry.size, access, "page table")
            how, _ = self._check(table, entry.gpa, linear, entry.size, found.entries[:number])
            refused = refused or how == _REFUSED
        if found.gpa is None:
            outcome, touch = "a guest exception" if found.fault else "its page table cannot be read", ""
        else:
            outcome, touch = self._check(operand, found.gpa, linear, size, found.entries)
        cached = refused and found.gpa is not None
        shown = f"{outcome}, if its page table, which is refused, was cached" if cached else outcome
        if not operand.certain:
            shown += ", if the access is made"
        entries = tuple(found.entries)
        self._looks.append(Look(operand.role, operand.access, linear, size, entries, found.gpa, shown, touch))
        return outcome == _GRANTED

    def _check(self, operand: Operand, gpa: int, linear: int, size: int, entries: list[Entry]) -> tuple[str, str]:
        """Ask the host for one page: the outcome, and the touch. A device access never fails so."""
        slot = self._memory.slot(gpa)
        if slot is None:
            return "no memslot, a device access", ""
        write = operand.access is Access.WRITE
        if write and slot.read_only:
            return f"memslot {slot.slot} is read-only, a device access", ""
        hva = slot.hva + gpa - slot.gpa
        host = self._memory.host
        answer = host.ask(hva, write)
        if answer.why is None:
            return _GRANTED, answer.touch
        page = gpa & ~(PAGE - 1)
        if page not in self._found:
            where = (slot.slot & 0xFFFF, hva, host.vma(hva))
            evidence = (slot, tuple(entries), answer.touch)
            self._found[page] = Suspect(gpa, size, operand.access, linear, operand.role, *where, answer.why, *evidence)
        return _REFUSED, answer.touch
