"""Recognising ELF files that are not for a bare machine, and saying what would run them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from anykvm.vmm.formats import Foreign, multiboot

DAMAGED: Final = (
    ELFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    OverflowError,
    AssertionError,
    RecursionError,
    MemoryError,
)
"""pyelftools takes a damaged file at its word, and fails at it in all these ways."""

_CLASSES: Final = {"EM_386": 32, "EM_X86_64": 64}
_QEMU: Final = {
    "EM_AARCH64": "aarch64",
    "EM_ARM": "arm",
    "EM_RISCV": "riscv64",
    "EM_PPC64": "ppc64",
    "EM_PPC": "ppc",
    "EM_S390": "s390x",
    "EM_MIPS": "mips",
    "EM_LOONGARCH": "loongarch64",
    "EM_SPARCV9": "sparc64",
    "EM_68K": "m68k",
}
_NOTES: Final = 1 << 16
"""So many bytes of each segment of notes or dynamic tags are looked at."""
_PVH: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_ABI_TAG: Final = 1  # NT_GNU_ABI_TAG
_SOLO5_ABI: Final = 0x31494241
_SOLO5: Final = {
    2: "its tender runs it: solo5-spt",
    3: "QEMU's -kernel boots it",
    4: "Muen runs it",
    5: "Genode runs it",
    6: "Xen runs it",
}
_SOLO5_HVT: Final = "its tender runs it: solo5-hvt"
_SYSTEMS: Final = {
    b"FreeBSD": "FreeBSD",
    b"NetBSD": "NetBSD",
    b"OpenBSD": "OpenBSD",
    b"Go": "Linux",
    b"Android": "Android",
}
_OSABI: Final = {"ELFOSABI_LINUX": "Linux", "ELFOSABI_FREEBSD": "FreeBSD", "ELFOSABI_NETBSD": "NetBSD"}
_DF_1_PIE: Final = 0x8000000
_DT_SONAME: Final = 14
_DT_FLAGS_1: Final = 0x6FFFFFFB


def recognise_elf(data: bytes) -> Foreign | None:
    """Tell what an ELF file is if it is not a static executable for a bare x86 machine; None if it is, or is damaged.

    What is damaged is for ``loaders.elf`` to say.
    """
    try:
        return _recognise(ELFFile(io.BytesIO(data)), data)
    except DAMAGED:
        return None


def _recognise(file: Any, data: bytes) -> Foreign | None:
    segments = list(file.iter_segments())
    return (
        _by_machine(file)
        or _by_type(file, segments)
        or _by_notes(data, segments)
        or _dynamic(file, segments)
        or _of_system(file)
        or multiboot(data[:32768])
        or _linked_high(file, segments, data)
    )


def unloadable(file: Any, segments: list[Any]) -> Foreign | None:
    """Tell what an open ELF file is if nothing could load it at fixed addresses of an x86 machine."""
    return _by_machine(file) or _by_type(file, segments) or _dynamic(file, segments)


def _by_machine(file: Any) -> Foreign | None:
    machine = file["e_machine"]
    if machine not in _CLASSES:
        emulator = _QEMU.get(machine)
        runs = f"QEMU may run it: qemu-system-{emulator}" if emulator else "a machine of that kind runs it"
        return Foreign(f"an ELF file for {machine}, not for x86", runs)
    if not file.little_endian:
        return Foreign("a big-endian ELF file", "no x86 machine runs it")
    if file.elfclass != _CLASSES[machine]:
        if machine == "EM_X86_64":
            return Foreign("a 32-bit ELF file for x86-64 (x32)", "Linux runs it, if it has x32")
        return Foreign(f"a {file.elfclass}-bit ELF file for {machine}", "no machine runs it")
    return None


def _by_type(file: Any, segments: list[Any]) -> Foreign | None:
    kind = file["e_type"]
    if kind == "ET_EXEC":
        return None
    if kind == "ET_DYN":
        if not _is_library(file, segments):
            what = "a position-independent ELF file (PIE)"
            return Foreign(
                what, "the system it was built for loads it; for here link it with -no-pie at a fixed address"
            )
        return Foreign("a shared library, an ELF file of type ET_DYN", "a dynamic linker loads it into a program")
    if kind == "ET_REL":
        if _has_section(file, ".gnu.linkonce.this_module") or _has_section(file, ".modinfo"):
            return Foreign("a Linux kernel module, not an executable", "insmod loads it into its kernel")
        return Foreign("an ELF file of type ET_REL (an object file), not an executable", "link it")
    if kind == "ET_CORE":
        return Foreign("a core dump, an ELF file of type ET_CORE, not an executable", "a debugger reads it")
    return Foreign(f"an ELF file of type {kind}, not an executable", "nothing known does")


def _is_library(file: Any, segments: list[Any]) -> bool:
    if _interpreted(segments):
        return False
    word = 8 if file.elfclass == 64 else 4
    tags: dict[int, int] = {}
    for part in segments:
        if part["p_type"] == "PT_DYNAMIC":
            # By hand: pyelftools wants the string table, and a stripped or damaged file may have none.
            words = part.data()[:_NOTES]
            numbers = [int.from_bytes(words[at : at + word], "little") for at in range(0, len(words), word)]
            tags.update(zip(numbers[::2], numbers[1::2], strict=False))
    if tags.get(_DT_FLAGS_1, 0) & _DF_1_PIE:
        return False
    return _DT_SONAME in tags or not file["e_entry"]


def _has_section(file: Any, name: str) -> bool:
    try:
        return file.get_section_by_name(name) is not None
    except DAMAGED:
        return False


def _dynamic(file: Any, segments: list[Any]) -> Foreign | None:
    for part in segments:
        if part["p_type"] == "PT_INTERP":
            name = part.data()[:256].split(b"\0")[0].decode("ascii", "backslashreplace")
            named = f" (its interpreter is {name})" if name else ""
            what = f"a dynamically linked ELF file{named}"
            return Foreign(what, "the system it was built for runs it; for here link it with -static")
    return None


def _by_notes(data: bytes, segments: list[Any]) -> Foreign | None:
    notes = list(_notes(data, segments))
    for name, kind, content in notes:
        if name == b"Solo5":
            targets = [c for n, k, c in notes if n == name and k == _SOLO5_ABI]
            number = int.from_bytes(targets[0][:4], "little") if targets else 0
            return Foreign("a Solo5 unikernel", _SOLO5.get(number, _SOLO5_HVT))
        if name == b"Xen" and kind == _PVH:
            linux = b"Linux version " in data
            what = "a Linux kernel (vmlinux)" if linux else "a kernel with a PVH entry, for a boot loader"
            return Foreign(what, "QEMU's -kernel boots it")
        if name == b"GNU" and kind == _ABI_TAG and content[:4] == bytes(4) and not _interpreted(segments):
            return Foreign("a static Linux program", "Linux runs it, not a bare machine")
        if name in _SYSTEMS and not _interpreted(segments):
            return Foreign(f"a static {_SYSTEMS[name]} program", f"{_SYSTEMS[name]} runs it, not a bare machine")
    return None


def _interpreted(segments: list[Any]) -> bool:
    return any(part["p_type"] == "PT_INTERP" for part in segments)


def _notes(data: bytes, segments: list[Any]) -> Iterator[tuple[bytes, int, bytes]]:
    """Give name, type and content of each note. By hand: it must end soon, however damaged they are."""
    for part in [part for part in segments if part["p_type"] == "PT_NOTE"][:64]:
        at = part["p_offset"]
        end = min(at + part["p_filesz"], at + _NOTES, len(data))
        align = 8 if part["p_align"] == 8 else 4
        while at + 12 <= end:
            name, size, kind = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (0, 4, 8))
            start = at + 12 + -(-name // align) * align if align == 4 else -(-(at + 12 + name) // 8) * 8
            yield data[at + 12 : min(at + 12 + name, end)].rstrip(b"\0"), kind, data[start : min(start + size, end)]
            at = start + -(-size // align) * align


def _of_system(file: Any) -> Foreign | None:
    system = _OSABI.get(file["e_ident"]["EI_OSABI"])
    if system is None:
        return None
    return Foreign(f"a static {system} program", f"{system} runs it, not a bare machine")


def _linked_high(file: Any, segments: list[Any], data: bytes) -> Foreign | None:
    """Recognise a kernel: it is entered at an address that its boot loader, or itself, maps to another one."""
    entry = file["e_entry"]
    for part in segments:
        if part["p_type"] != "PT_LOAD" or not 0 <= entry - part["p_vaddr"] < part["p_memsz"]:
            continue
        if part["p_vaddr"] == part["p_paddr"]:
            return None
        return _kernel(part, data)
    # A Linux kernel is linked high, but its entry is a physical address already.
    loaded = [part for part in segments if part["p_type"] == "PT_LOAD"]
    return _kernel(loaded[0], data) if loaded and loaded[0]["p_vaddr"] != loaded[0]["p_paddr"] else None


def _kernel(part: Any, data: bytes) -> Foreign:
    if b"Linux version " in data:
        boots = "boot the bzImage made from it, by `anykvm oracle --kernel` or QEMU's -kernel"
        return Foreign("a Linux kernel (vmlinux)", boots)
    what = f"a kernel, as vmlinux linked for {part['p_vaddr']:#x} and loaded at {part['p_paddr']:#x}"
    return Foreign(what, "its boot loader runs it: here the page tables map each address to itself")
