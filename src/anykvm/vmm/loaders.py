"""Loading images into guest memory: flat binaries, and ELF executables of 32 and 64 bits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from anykvm.api import GuestMemory

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

Mode = Literal["real", "protected", "long"]
_MACHINES: Final[dict[str, tuple[str, Mode]]] = {"EM_386": ("ELF32", "protected"), "EM_X86_64": ("ELF64", "long")}


class ImageError(ValueError):
    """The image cannot be loaded: its text is one line that says why."""


class Segment(NamedTuple):
    """Bytes of an image, and where they go."""

    gpa: int
    data: bytes
    size: int
    """Bytes in memory; those behind ``data`` are zero."""


class Image(NamedTuple):
    """An image ready to be loaded."""

    kind: str
    """``flat``, ``ELF32`` or ``ELF64``."""
    mode: Mode
    """The mode its code is for; for a flat binary the one that was asked for."""
    entry: int
    """gpa of the first instruction."""
    segments: tuple[Segment, ...]

    def load(self, memory: GuestMemory, reserved: int = 0) -> None:
        """Write it into ``memory``, which the VM has at gpa 0; nothing may be below gpa ``reserved``.

        Raises ImageError when it does not fit.
        """
        for segment in self.segments:
            where = f"[{segment.gpa:#x}, {segment.gpa + segment.size:#x})"
            if segment.gpa + segment.size > memory.size:
                raise ImageError(f"the image needs {where}, and memory ends at {memory.size:#x}")
            if segment.gpa < reserved:
                raise ImageError(f"the image needs {where}, and the tables of {self.mode} mode end at {reserved:#x}")
        if not any(segment.gpa <= self.entry < segment.gpa + segment.size for segment in self.segments):
            raise ImageError(f"the entry {self.entry:#x} is not in the image")
        for segment in self.segments:
            memory.write(segment.gpa, segment.data.ljust(segment.size, b"\0"))


def flat(data: bytes, gpa: int, mode: Mode, entry: int | None = None) -> Image:
    """Make an image of bytes that go to ``gpa`` as they are, entered at their first byte or at gpa ``entry``.

    Raises ImageError when there are none.

    >>> flat(b"\\xf4", 0x7C00, "real").entry
    31744
    """
    if not data:
        raise ImageError("the image is empty")
    return Image("flat", mode, gpa if entry is None else entry, (Segment(gpa, data, len(data)),))


def elf(data: bytes, entry: int | None = None) -> Image:
    """Make an image of a static ELF executable for x86: its PT_LOAD segments go to their physical addresses.

    ``entry`` overrides the file's own; that one is a virtual address, taken to the segment's physical one.
    Raises ImageError for what is not such a file, or is damaged.
    """
    # Only here: it takes as long to import as everything else together, and a flat binary needs none of it.
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        return _elf(ELFFile(io.BytesIO(data)), len(data), entry)
    except ImageError:
        raise
    except (ELFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, OverflowError) as error:
        # pyelftools takes a damaged file at its word, and fails at it in all these ways.
        raise ImageError(f"damaged ELF file: {error or type(error).__name__}") from None


def _elf(file: ELFFile, length: int, entry: int | None) -> Image:
    kind, machine = file["e_type"], file["e_machine"]
    if machine not in _MACHINES:
        raise ImageError(f"an ELF file for {machine}, not for x86")
    if kind == "ET_DYN":
        raise ImageError("a position-independent ELF file; link it with -no-pie at a fixed address")
    if kind != "ET_EXEC":
        raise ImageError(f"an ELF file of type {kind}, not an executable; link it")
    name, mode = _MACHINES[machine]
    segments, start = [], None
    for part in file.iter_segments():
        if part["p_type"] == "PT_INTERP":
            raise ImageError("a dynamically linked ELF file; link it with -static")
        if part["p_type"] != "PT_LOAD" or not part["p_memsz"]:
            continue
        if part["p_offset"] + part["p_filesz"] > length:
            raise ImageError("damaged ELF file: a segment reaches over its end")
        if part["p_filesz"] > part["p_memsz"]:
            raise ImageError("damaged ELF file: a segment is larger in the file than in memory")
        segments.append(Segment(part["p_paddr"], part.data(), part["p_memsz"]))
        if 0 <= file["e_entry"] - part["p_vaddr"] < part["p_memsz"]:
            start = file["e_entry"] - part["p_vaddr"] + part["p_paddr"]
    if not segments:
        raise ImageError("an ELF file with nothing to load")
    chosen = entry if entry is not None else start
    return Image(name, mode, file["e_entry"] if chosen is None else chosen, tuple(segments))


def detect(data: bytes) -> bool:
    """Tell whether this is an ELF file.

    >>> detect(b"\\x7fELF..."), detect(b"\\xf4")
    (True, False)
    """
    return data[:4] == b"\x7fELF"
