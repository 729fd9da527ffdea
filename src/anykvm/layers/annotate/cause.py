"""What an explanation is: the access that could not be resolved, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anykvm.layers.annotate.access import Access
from anykvm.layers.annotate.cpu import Cpu
from anykvm.layers.annotate.hostmap import Vma
from anykvm.layers.annotate.memory import Slot
from anykvm.layers.annotate.walk import Entry

_WORDS = {Access.READ: "read from", Access.WRITE: "write to", Access.EXEC: "instruction fetch from"}
_PAGE_MASK = ~0xFFF


@dataclass(frozen=True, slots=True)
class Look:
    """One page of one access the vCPU has to make, as the search saw it."""

    role: str
    """As ``Suspect.role``; a page table's own pages are not listed, they are in ``walk``."""
    access: Access
    linear: int
    size: int
    """Bytes of the access on this page."""
    walk: tuple[Entry, ...]
    """The page table entries of ``linear``, top down; none without paging."""
    gpa: int | None
    """Where that leads; None if the walk ends before."""
    outcome: str
    """In words: ``granted``, ``refused``; or why the page is not asked for, and the instruction ends there."""
    touch: str
    """What the host was asked and said; empty if it was not asked."""

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return {
            "role": self.role,
            "access": self.access.value,
            "linear": self.linear,
            "size": self.size,
            "walk": [entry._asdict() for entry in self.walk],
            "gpa": self.gpa,
            "outcome": self.outcome,
            "touch": self.touch,
        }


@dataclass(frozen=True, slots=True)
class Suspect:
    """One guest access whose host page the host refuses."""

    gpa: int
    """Guest-physical address of the first byte on the refused page."""
    size: int
    """Bytes of the access on that page."""
    access: Access
    """What was needed. Walking a page table writes to it (accessed bits), except in a read-only slot."""
    linear: int
    """The linear address whose access led here."""
    role: str
    """What touched it: ``operand``, ``stack``, ``instruction``, ``page table``, ``descriptor``, ``idt``, ``tss``."""
    slot: int
    """The memslot."""
    hva: int
    """Where that memslot maps ``gpa``."""
    vma: Vma | None
    """The host's mapping there; None where nothing is mapped."""
    why: str
    """What the host says of it, as the end of a sentence that begins with the address."""
    memslot: Slot
    """That memslot, as KVM_SET_USER_MEMORY_REGION had it."""
    walk: tuple[Entry, ...]
    """The page table entries of ``linear``, top down; for a page table, down to the one to blame."""
    touch: str
    """The guarded touch of the host's page: what was asked, and the outcome."""

    @property
    def page(self) -> int:
        """The guest page's address."""
        return self.gpa & _PAGE_MASK

    @property
    def reason(self) -> str:
        """The whole sentence."""
        extra = f" (page table of {self.linear:#x})" if self.role == "page table" else ""
        return (
            f"{_WORDS[self.access]} gpa {self.gpa:#x}{extra}: memslot {self.slot} maps it to {self.hva:#x}, {self.why}"
        )

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        vma = self.vma and {
            "start": self.vma.start,
            "end": self.vma.end,
            "perms": self.vma.perms,
            "path": self.vma.path,
        }
        return {
            "gpa": self.gpa,
            "size": self.size,
            "access": self.access.value,
            "linear": self.linear,
            "role": self.role,
            "slot": self.slot,
            "hva": self.hva,
            "vma": vma,
            "memslot": self.memslot._asdict(),
            "walk": [entry._asdict() for entry in self.walk],
            "touch": self.touch,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Cause:
    """Why KVM_RUN failed with EFAULT: the access to blame, and whether others could be to blame as well.

    The fields of the first candidate are at hand as attributes of the cause.
    """

    rip: int
    """Where the vCPU stands."""
    instruction: str
    """The instruction there; or the event that was being delivered; empty if it could not be read."""
    candidates: tuple[Suspect, ...]
    """Every access that may be the cause, the likeliest first; never empty."""
    ambiguous: bool
    """The candidates lie on different guest pages, and nothing architectural says which was met first; or there is
    something ``unknown``."""
    unknown: str
    """What of the vCPU's accesses could not be known, and why; empty if they are all known."""
    code: bytes
    """The bytes of ``instruction``, or what could be read at ``rip``; empty if nothing could."""
    vcpu: Cpu = field(repr=False, compare=False)
    """The registers as they were."""
    looks: tuple[Look, ...] = field(repr=False)
    """Every page the vCPU needs for this, in order, up to the one where it ends."""

    @property
    def gpa(self) -> int:
        """See ``Suspect.gpa``."""
        return self.candidates[0].gpa

    @property
    def page(self) -> int:
        """The guest page's address: what ``memory_fault.gpa`` says."""
        return self.candidates[0].page

    @property
    def size(self) -> int:
        """See ``Suspect.size``."""
        return self.candidates[0].size

    @property
    def access(self) -> Access:
        """See ``Suspect.access``."""
        return self.candidates[0].access

    @property
    def linear(self) -> int:
        """See ``Suspect.linear``."""
        return self.candidates[0].linear

    @property
    def role(self) -> str:
        """See ``Suspect.role``."""
        return self.candidates[0].role

    @property
    def slot(self) -> int:
        """See ``Suspect.slot``."""
        return self.candidates[0].slot

    @property
    def hva(self) -> int:
        """See ``Suspect.hva``."""
        return self.candidates[0].hva

    @property
    def vma(self) -> Vma | None:
        """See ``Suspect.vma``."""
        return self.candidates[0].vma

    @property
    def reason(self) -> str:
        """One sentence; all candidates if it is ambiguous."""
        if not self.ambiguous:
            return self.candidates[0].reason
        listed = "; or ".join(suspect.reason for suspect in self.candidates)
        other = f"; or another: {self.unknown}" if self.unknown else ""
        return f"ambiguous, one of {len(self.candidates)}: {listed}{other}"

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return {
            "rip": self.rip,
            "instruction": self.instruction,
            "code": self.code.hex(),
            "ambiguous": self.ambiguous,
            "unknown": self.unknown,
            "reason": self.reason,
            "candidates": [suspect.plain() for suspect in self.candidates],
            "accesses": [look.plain() for look in self.looks],
            "vcpu": self.vcpu.plain(),
        }
