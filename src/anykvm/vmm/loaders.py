"""Loading images into guest memory: flat binaries, and ELF executables of 32 and 64 bits."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

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
    from elftools.elf.elffile import ELFFile

    from anykvm.vmm.elf_formats import DAMAGED

    try:
        return _elf(ELFFile(io.BytesIO(data)), len(data), entry)
    except ImageError:
        raise
    except DAMAGED as error:
        raise ImageError(f"damaged ELF file: {error or type(error).__name__}") from None


def _elf(file: ELFFile, length: int, entry: int | None) -> Image:
    from anykvm.vmm.elf_formats import unloadable

    parts = list(file.iter_segments())
    if foreign := unloadable(file, parts):
        raise ImageError(f"{foreign.what}; {foreign.runs}")
    name, mode = _MACHINES[file["e_machine"]]
    loaded = [part for part in parts if part["p_type"] == "PT_LOAD" and part["p_memsz"]]
    if not loaded:
        raise ImageError("an ELF file with nothing to load")
    _check_segments(loaded, length)
    start = next(
        (_physical(file["e_entry"], part) for part in loaded if _within(file["e_entry"], part)), file["e_entry"]
    )
    segments = tuple(Segment(part["p_paddr"], part.data(), part["p_memsz"]) for part in loaded)
    return Image(name, mode, start if entry is None else entry, segments)


def _within(address: int, part: Any) -> bool:
    return bool(0 <= address - part["p_vaddr"] < part["p_memsz"])


def _physical(address: int, part: Any) -> int:
    return int(address - part["p_vaddr"] + part["p_paddr"])


def _check_segments(loaded: list[Any], length: int) -> None:
    """Raise ImageError for segments that a damaged file claims. Their bytes are not read before."""
    for part in loaded:
        if part["p_offset"] + part["p_filesz"] > length:
            raise ImageError("damaged ELF file: a segment reaches over its end")
        if part["p_filesz"] > part["p_memsz"]:
            raise ImageError("damaged ELF file: a segment is larger in the file than in memory")
        if part["p_paddr"] + part["p_memsz"] > 1 << 64:
            raise ImageError("damaged ELF file: a segment reaches over the end of the address space")
    places = sorted((part["p_paddr"], part["p_memsz"]) for part in loaded)
    for (gpa, size), (following, _) in itertools.pairwise(places):
        if gpa + size > following:
            raise ImageError(f"damaged ELF file: two segments overlap in memory at {following:#x}")
    if sum(part["p_filesz"] for part in loaded) > 2 * length:
        raise ImageError("damaged ELF file: its segments are larger than the file")


def detect(data: bytes) -> bool:
    """Tell whether this is an ELF file.

    >>> detect(b"\\x7fELF..."), detect(b"\\xf4")
    (True, False)
    """
    return data[:4] == b"\x7fELF"
