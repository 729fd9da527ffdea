"""Recognising what an image is when it is not for a bare machine, and saying what would run it.

A flat binary has no mark: any bytes can be one. So only what is recognised is refused. ELF files are looked at in
``elf_formats``.
"""

from __future__ import annotations

import re
import stat
from typing import Final, NamedTuple

ENOUGH: Final = 1 << 16
"""So many bytes of a file's start are looked at, in bytes."""
_SECTOR: Final = 512
_TEXT_CONTROLS: Final = frozenset(b"\t\n\r\f\v\b\x1b")
_UNICODE_TEXT: Final = 32
"""The shortest UTF-8 text with characters beyond ASCII, in bytes: shorter ones may well be code."""
_ZEROS: Final = _SECTOR

_UNPACK: Final = "unpack it, and run what is in it"
_DISK: Final = "QEMU runs it as a disk, with a BIOS: qemu-system-x86_64 -drive"
_LINUX: Final = "`anykvm oracle --kernel` or QEMU's -kernel boots it"


class Foreign(NamedTuple):
    """What an image is, and what would run it: two parts of a sentence."""

    what: str
    runs: str


_MAGIC: Final[tuple[tuple[int, bytes, Foreign], ...]] = (
    (0x38, b"ARM\x64", Foreign("a Linux kernel for AArch64", "QEMU runs it: qemu-system-aarch64 -kernel")),
    (0x38, b"RSC\x05", Foreign("a Linux kernel for RISC-V", "QEMU runs it: qemu-system-riscv64 -kernel")),
    (0x24, b"\x18\x28\x6f\x01", Foreign("a Linux kernel for ARM (zImage)", "QEMU runs it: qemu-system-arm -kernel")),
    (0, b"\xcf\xfa\xed\xfe", Foreign("a 64-bit Mach-O file", "macOS runs it")),
    (0, b"\xce\xfa\xed\xfe", Foreign("a 32-bit Mach-O file", "macOS runs it")),
    (0, b"\xfe\xed\xfa\xcf", Foreign("a big-endian 64-bit Mach-O file", "macOS runs it")),
    (0, b"\xfe\xed\xfa\xce", Foreign("a big-endian 32-bit Mach-O file", "macOS runs it")),
    (0, b"\xca\xfe\xba\xbe", Foreign("a universal Mach-O file, or a Java class", "macOS, or Java, runs it")),
    (0, b"\x1f\x8b\x08", Foreign("a gzip-compressed file", _UNPACK)),
    (0, b"\xfd7zXZ\0", Foreign("an xz-compressed file", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Foreign("a zstd-compressed file", _UNPACK)),
    (0, b"\x5d\0\0\x80\0", Foreign("an LZMA-compressed file", _UNPACK)),
    (0, b"\x5d\0\0\x00\x01", Foreign("an LZMA-compressed file", _UNPACK)),
    (0, b"\x04\x22\x4d\x18", Foreign("an lz4-compressed file", _UNPACK)),
    (0, b"\x02\x21\x4c\x18", Foreign("an lz4-compressed file", _UNPACK)),
    (0, b"LZIP", Foreign("an lzip-compressed file", _UNPACK)),
    (0, b"\x89LZO\0\r\n", Foreign("an lzop-compressed file", _UNPACK)),
    (0, b"PK\x03\x04", Foreign("a zip archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", Foreign("a rar archive", _UNPACK)),
    (0, b"!<arch>\n", Foreign("an ar archive (a static library or a Debian package)", "link or unpack what is in it")),
    (257, b"ustar", Foreign("a tar archive", _UNPACK)),
    (0, b"070701", Foreign("a cpio archive (an initramfs)", "a Linux kernel does, as QEMU's -initrd")),
    (0, b"070702", Foreign("a cpio archive (an initramfs)", "a Linux kernel does, as QEMU's -initrd")),
    (0, b"070707", Foreign("a cpio archive", _UNPACK)),
    (0, b"QFI\xfb", Foreign("a qcow2 disk image", _DISK)),
    (0, b"KDMV", Foreign("a VMDK disk image", _DISK)),
    (0, b"COWD", Foreign("a VMDK disk image", _DISK)),
    (0, b"# Disk DescriptorFile", Foreign("a VMDK disk image", _DISK)),
    (0, b"vhdxfile", Foreign("a VHDX disk image", _DISK)),
    (0, b"conectix", Foreign("a VHD disk image", _DISK)),
    (0x40, b"\x7f\x10\xda\xbe", Foreign("a VDI disk image", _DISK)),
    (0x8001, b"CD001", Foreign("an ISO 9660 image (a CD or DVD)", "QEMU runs it: qemu-system-x86_64 -cdrom")),
    (_SECTOR, b"EFI PART", Foreign("a disk image with a GPT", _DISK)),
    (0, b"hsqs", Foreign("a squashfs file system", _DISK)),
    (0x438, b"\x53\xef", Foreign("an ext2, ext3 or ext4 file system", _DISK)),
    (0, b"\xd0\x0d\xfe\xed", Foreign("a device tree blob", "nothing does: a kernel reads it")),
    (0, b"\x27\x05\x19\x56", Foreign("a U-Boot image", "U-Boot boots it")),
    (0, b"ANDROID!", Foreign("an Android boot image", "an Android boot loader boots it")),
    (0, b"BC\xc0\xde", Foreign("LLVM bitcode", "compile and link it")),
    (0, b"\0asm", Foreign("a WebAssembly module", "a WebAssembly runtime runs it")),
    (0, b"%PDF-", Foreign("a PDF document", "nothing does")),
    (0, b"\x89PNG\r\n", Foreign("a PNG picture", "nothing does")),
    (0, b"\xff\xd8\xff", Foreign("a JPEG picture", "nothing does")),
)
_MULTIBOOT: Final = 0x1BADB002
_MULTIBOOT2: Final = 0xE85250D6
_EFI: Final = range(10, 14)
_MACHINES: Final = {0x14C: "the 386", 0x8664: "x86-64", 0xAA64: "AArch64", 0x1C0: "ARM", 0x1C4: "ARM", 0x5064: "RISC-V"}


def recognise(head: bytes, tail: bytes | None = None) -> Foreign | None:
    r"""Tell what an image is if it is not for a bare machine; None if it may be a flat binary or an ELF file for one.

    ``head`` is the file, or its first ``ENOUGH`` bytes and ``tail`` its end.

    >>> recognise(b"\x1f\x8b\x08" + bytes(20)).what, recognise(b"\xf4")
    ('a gzip-compressed file', None)
    """
    if head[:4] == b"\x7fELF":
        # Only here: it takes as long to import as everything else together.
        from anykvm.vmm.elf_formats import recognise_elf

        return recognise_elf(head)
    start, end = head[:ENOUGH], head[-_SECTOR:] if tail is None else tail[-_SECTOR:]
    found = _linux(start) or _marked(start) or _multiboot(start) or _mz(start) or _bzip2(start)
    size = len(head) if tail is None else None
    return found or _option_rom(start) or _disk(start, end, size) or _firmware(start, end, size) or _text(start, end)


def _linux(start: bytes) -> Foreign | None:
    if start[0x202:0x206] != b"HdrS":
        return None
    at = int.from_bytes(start[0x20E:0x210], "little") + 0x200
    version = start[at : at + 64].split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")
    named = f" {version}" if at > 0x200 and version and version.isprintable() else ""
    return Foreign(f"a Linux kernel{named} (bzImage)", _LINUX)


def _marked(start: bytes) -> Foreign | None:
    return next((found for at, magic, found in _MAGIC if start[at : at + len(magic)] == magic), None)


def multiboot(start: bytes) -> Foreign | None:
    """Tell whether there is a multiboot header, of either version, where a boot loader would find it."""
    for at in range(0, min(len(start), 8192) - 11, 4):
        magic, flags, checksum = (int.from_bytes(start[at + n : at + n + 4], "little") for n in (0, 4, 8))
        if magic == _MULTIBOOT and not (magic + flags + checksum) & 0xFFFFFFFF:
            return Foreign("a multiboot kernel", "QEMU's -kernel or GRUB boots it")
    for at in range(0, min(len(start), 32768) - 15, 8):
        fields = [int.from_bytes(start[at + n : at + n + 4], "little") for n in (0, 4, 8, 12)]
        if fields[0] == _MULTIBOOT2 and not sum(fields) & 0xFFFFFFFF:
            return Foreign("a multiboot2 kernel", "GRUB boots it")
    return None


_multiboot = multiboot


def _mz(start: bytes) -> Foreign | None:
    if start[:2] != b"MZ" or len(start) < 28:
        return None
    at = int.from_bytes(start[0x3C:0x40], "little")
    if start[at : at + 4] != b"PE\0\0":
        return Foreign("a DOS or Windows program (MZ)", "DOS or Windows runs it")
    number = int.from_bytes(start[at + 4 : at + 6], "little")
    machine = _MACHINES.get(number, f"machine {number:#x}")
    if int.from_bytes(start[at + 0x5C : at + 0x5E], "little") in _EFI:
        return Foreign(f"an EFI program for {machine}", "UEFI firmware runs it, such as OVMF in QEMU")
    return Foreign(f"a Windows program (PE) for {machine}", "Windows runs it")


def _bzip2(start: bytes) -> Foreign | None:
    return Foreign("a bzip2-compressed file", _UNPACK) if re.match(rb"BZh[1-9]1AY&SY", start) else None


def _option_rom(start: bytes) -> Foreign | None:
    # 55 AA, then the length in sectors. Code that begins so would be push bp; stosb.
    if start[:2] == b"\x55\xaa" and len(start) >= _SECTOR and start[2]:
        return Foreign("an option ROM", "a BIOS runs it: qemu-system-x86_64 -option-rom")
    return None


def _disk(start: bytes, end: bytes, size: int | None) -> Foreign | None:
    """Recognise a disk with a boot sector. The sector alone is a flat binary, for just where one goes by default."""
    if end[:8] == b"conectix":
        return Foreign("a VHD disk image", _DISK)
    if start[510:512] == b"\x55\xaa" and (size is None or size > _SECTOR):
        return Foreign("a disk image with a boot sector", _DISK)
    return None


def _firmware(start: bytes, end: bytes, size: int | None) -> Foreign | None:
    """Recognise firmware: an EFI volume, or whole 64 KiB with a jump at the reset vector, 16 bytes from the end."""
    runs = "QEMU runs it: qemu-system-x86_64 -bios"
    if start[0x28:0x2C] == b"_FVH":
        return Foreign("an EFI firmware volume", runs)
    vector = end[-16:]
    for idle in (b"\x90", b"\x0f\x09", b"\xfa", b"\xfc"):  # nop, wbinvd, cli, cld
        while vector.startswith(idle):
            vector = vector[len(idle) :]
    far = vector[:1] == b"\xea" and vector[4:5] in (b"\xf0", b"\xff")
    if size and size % (1 << 16) == 0 and (far or vector[:1] in (b"\xe9", b"\xeb")):
        return Foreign("a firmware image, with a jump at the reset vector", runs)
    return None


def _text(start: bytes, end: bytes) -> Foreign | None:
    if start[:2] == b"#!":
        interpreter = start[2:].split(b"\n")[0].strip().decode("ascii", "backslashreplace")[:64]
        return Foreign(f"a script for {interpreter or 'an interpreter'}", "its interpreter runs it")
    if len(start) >= _ZEROS and not any(start) and not any(end):
        return Foreign("a file that begins and ends with zeros, such as an empty disk image", "nothing does")
    whole = start[: len(start) - 4] if len(start) == ENOUGH else start  # a character may be cut
    if not whole or any(byte < 0x20 and byte not in _TEXT_CONTROLS or byte == 0x7F for byte in whole):
        return None
    try:
        text = whole.decode("utf-8", "strict" if len(start) < ENOUGH else "ignore")
    except UnicodeDecodeError:
        return None
    if len(start) == ENOUGH and len(text.encode()) < len(whole) - 8:
        return None
    if text.isascii() or len(whole) >= _UNICODE_TEXT:
        return Foreign("a text file", "assemble or compile it, if it is a program")
    return None


def kind_of_file(mode: int) -> str:
    """Name the kind of a file by its ``st_mode``.

    >>> kind_of_file(stat.S_IFIFO)
    'a FIFO'
    """
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a file of another kind")
