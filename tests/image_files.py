"""Images of all kinds, made here: headers as the formats have them, and nothing more."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from typing import NamedTuple

from vmm_helpers import elf32, elf64

CODE = bytes.fromhex("90f4")


class Header(NamedTuple):
    """A program header of an ELF64 file."""

    type: int
    content: bytes = b""
    vaddr: int = 0
    paddr: int | None = None
    filesz: int | None = None
    memsz: int | None = None
    align: int = 4
    offset: int | None = None


LOAD, DYNAMIC, INTERP, NOTE = 1, 2, 3, 4
TEXT = Header(LOAD, CODE, 0x200000)


def elf(*headers: Header, entry: int = 0x200000, type: int = 2, machine: int = 62, osabi: int = 0) -> bytes:
    """Make an ELF64 file with these segments."""
    ident = bytes((0x7F, 0x45, 0x4C, 0x46, 2, 1, 1, osabi)).ljust(16, b"\0")
    start = 64 + 56 * len(headers)
    table, body = b"", b""
    for header in headers:
        paddr = header.vaddr if header.paddr is None else header.paddr
        filesz = len(header.content) if header.filesz is None else header.filesz
        memsz = filesz if header.memsz is None else header.memsz
        offset = start + len(body) if header.offset is None else header.offset
        table += struct.pack("<IIQQQQQQ", header.type, 7, offset, header.vaddr, paddr, filesz, memsz, header.align)
        body += header.content
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, type, machine, 1, entry, 64, 0, 0, 64, 56, len(headers), 64, 0, 0)
    return head + table + body


def note(name: bytes, kind: int, content: bytes) -> Header:
    """Make a segment of one note."""
    name += b"\0"
    padded = name.ljust(-(-len(name) // 4) * 4, b"\0") + content.ljust(-(-len(content) // 4) * 4, b"\0")
    return Header(NOTE, struct.pack("<III", len(name), len(content), kind) + padded)


def dynamic(*tags: tuple[int, int]) -> Header:
    """Make a dynamic segment."""
    content = b"".join(struct.pack("<QQ", *tag) for tag in (*tags, (0, 0)))
    return Header(DYNAMIC, content, 0x300000, align=8)


def at(*parts: tuple[int, bytes], size: int = 4096) -> bytes:
    """Put bytes at offsets, over code that would run."""
    made = bytearray(CODE * (size // 2))
    for offset, content in parts:
        made[offset : offset + len(content)] = content
    return bytes(made)


def bzimage() -> bytes:
    version = b"6.1.0-test (builder) #1"
    return at(
        (0, b"MZ"), (0x1FE, b"\x55\xaa\xeb\x6a"), (0x202, b"HdrS\x0f\x02"), (0x20E, b"\0\x02"), (0x400, version + b"\0")
    )


def pe(subsystem: int, machine: int = 0x8664) -> bytes:
    return at(
        (0, b"MZ"), (0x3C, b"\x80\0\0\0"), (0x80, b"PE\0\0" + struct.pack("<H", machine)), (0xDC, bytes((subsystem, 0)))
    )


def multiboot(magic: int = 0x1BADB002, flags: int = 0x10003) -> bytes:
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)


def multiboot2() -> bytes:
    return struct.pack("<IIII", 0xE85250D6, 0, 24, -(0xE85250D6 + 24) & 0xFFFFFFFF) + struct.pack("<HHI", 0, 0, 8)


def firmware(vector: str) -> bytes:
    return at((0x20000 - 16, bytes.fromhex(vector).ljust(16, b"\0")), size=0x20000)


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        file.addfile(tarfile.TarInfo("kernel"))
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("kernel", CODE)
    return stream.getvalue()


HIGH = 0xFFFFFFFF81000000
INTERPRETER = Header(INTERP, b"/lib64/ld-linux-x86-64.so.2\0", 0x300000)
PVH = note(b"Xen", 18, struct.pack("<Q", 0x200000))
SOLO5 = note(b"Solo5", 0x31494241, struct.pack("<IIII", 1, 2, 0, 0))
LINUX_ABI = note(b"GNU", 1, struct.pack("<IIII", 0, 3, 2, 0))
BUILD_ID = note(b"GNU", 3, b"x" * 20)

FOREIGN: dict[str, tuple[bytes, str, str]] = {
    # what it is called here: its bytes, a word of what it is, a word of what would run it
    "bzImage": (bzimage(), "a Linux kernel 6.1.0-test (bzImage)", "anykvm oracle --kernel"),
    "vmlinux": (
        elf(Header(LOAD, b"Linux version 6.1" + CODE, HIGH, 0x1000000), entry=0x1000000),
        "a Linux kernel (vmlinux)",
        "bzImage",
    ),
    "vmlinux without its banner": (
        elf(Header(LOAD, CODE, HIGH, 0x1000000), entry=0x1000000),
        "linked for 0xffffffff81000000 and loaded at 0x1000000",
        "boot loader",
    ),
    "vmlinux entered high": (elf(Header(LOAD, CODE, HIGH, 0x1000000), entry=HIGH), "vmlinux", "boot loader"),
    "PVH": (elf(TEXT, PVH), "a kernel with a PVH entry", "QEMU's -kernel"),
    "vmlinux with PVH": (
        elf(Header(LOAD, b"Linux version 6.1", HIGH, 0x1000000), PVH, entry=0x1000000),
        "a Linux kernel (vmlinux)",
        "QEMU's -kernel",
    ),
    "unikernel": (
        elf(TEXT, Header(INTERP, b"/nonexistent/solo5/\0", 0x300000), SOLO5),
        "a Solo5 unikernel",
        "solo5-hvt",
    ),
    "unikernel of another kind": (
        elf(TEXT, Header(INTERP, b"/no/such/loader\0", 0x300000)),
        "its interpreter is /no/such/loader",
        "the system it was built for",
    ),
    "dynamic": (elf(TEXT, INTERPRETER, LINUX_ABI), "dynamically linked", "-static"),
    "static Linux program": (elf(TEXT, BUILD_ID, LINUX_ABI), "a static Linux program", "Linux runs it"),
    "static with IFUNC": (elf(TEXT, osabi=3), "a static Linux program", "Linux runs it"),
    "Go program": (elf(TEXT, note(b"Go", 4, b"id")), "a static Linux program", "Linux runs it"),
    "FreeBSD program": (elf(TEXT, note(b"FreeBSD", 1, bytes(4))), "FreeBSD program", "FreeBSD runs it"),
    "PIE": (elf(TEXT, INTERPRETER, type=3), "position-independent", "-no-pie"),
    "static PIE": (elf(TEXT, dynamic((0x6FFFFFFB, 0x8000000)), type=3), "position-independent", "-no-pie"),
    "shared library": (elf(TEXT, dynamic((14, 1)), type=3, entry=0), "a shared library", "dynamic linker"),
    "object file": (elf(type=1, entry=0), "object file", "link it"),
    "core dump": (elf(Header(NOTE, b"", 0), type=4, entry=0), "core dump", "debugger"),
    "AArch64": (elf(TEXT, machine=183), "EM_AARCH64, not for x86", "qemu-system-aarch64"),
    "ARM": (elf(TEXT, machine=40), "EM_ARM, not for x86", "qemu-system-arm"),
    "RISC-V": (elf(TEXT, machine=243), "EM_RISCV, not for x86", "qemu-system-riscv64"),
    "an unknown machine": (elf(TEXT, machine=0x1234), "not for x86", "a machine of that kind"),
    "x32": (elf32(CODE)[:18] + b"\x3e" + elf32(CODE)[19:], "x32", "Linux"),
    "ELF64 for the 386": (elf(TEXT, machine=3), "64-bit ELF file for EM_386", "no machine"),
    "multiboot ELF": (elf32(CODE + bytes(2) + multiboot()), "a multiboot kernel", "GRUB"),
    "multiboot": (at((64, multiboot())), "a multiboot kernel", "GRUB"),
    "multiboot2 ELF": (elf(Header(LOAD, CODE.ljust(8, b"\0") + multiboot2(), 0x200000)), "multiboot2", "GRUB"),
    "multiboot2": (at((64, multiboot2())), "a multiboot2 kernel", "GRUB"),
    "EFI program": (pe(10), "an EFI program for x86-64", "UEFI"),
    "EFI driver for AArch64": (pe(11, 0xAA64), "an EFI program for AArch64", "UEFI"),
    "Windows program": (pe(3), "a Windows program", "Windows"),
    "DOS program": (at((0, b"MZ")), "a DOS or Windows program", "DOS"),
    "Mach-O": (at((0, b"\xcf\xfa\xed\xfe")), "Mach-O", "macOS"),
    "Mach-O universal": (at((0, b"\xca\xfe\xba\xbe")), "Mach-O", "macOS"),
    "AArch64 kernel": (at((0, b"MZ"), (0x38, b"ARM\x64")), "a Linux kernel for AArch64", "qemu-system-aarch64"),
    "RISC-V kernel": (at((0, b"MZ"), (0x38, b"RSC\x05")), "a Linux kernel for RISC-V", "qemu-system-riscv64"),
    "gzip": (gzip.compress(CODE), "gzip", "unpack"),
    "xz": (lzma.compress(CODE), "xz", "unpack"),
    "lzma": (lzma.compress(CODE, lzma.FORMAT_ALONE), "LZMA", "unpack"),
    "bzip2": (bz2.compress(CODE), "bzip2", "unpack"),
    "zstd": (at((0, b"\x28\xb5\x2f\xfd")), "zstd", "unpack"),
    "lz4": (at((0, b"\x04\x22\x4d\x18")), "lz4", "unpack"),
    "zip": (zipped(), "zip", "unpack"),
    "tar": (archive(), "tar", "unpack"),
    "ar": (b"!<arch>\n" + CODE, "ar archive", "unpack"),
    "initramfs": (b"070701" + b"0" * 104, "cpio archive (an initramfs)", "-initrd"),
    "ISO": (at((0x8001, b"CD001"), size=0x10000), "ISO 9660", "-cdrom"),
    "bootable ISO": (at((510, b"\x55\xaa"), (0x8001, b"CD001"), size=0x10000), "ISO 9660", "-cdrom"),
    "qcow2": (at((0, b"QFI\xfb\0\0\0\x03")), "qcow2", "-drive"),
    "VDI": (at((0x40, b"\x7f\x10\xda\xbe")), "VDI", "-drive"),
    "VHD": (at((4096 - 512, b"conectix")), "VHD", "-drive"),
    "disk": (at((510, b"\x55\xaa")), "a disk image with a boot sector", "-drive"),
    "disk with a GPT": (at((510, b"\x55\xaa"), (512, b"EFI PART")), "GPT", "-drive"),
    "ext4": (at((0x438, b"\x53\xef")), "ext", "-drive"),
    "squashfs": (at((0, b"hsqs")), "squashfs", "-drive"),
    "empty disk": (bytes(1 << 20), "zeros", "nothing"),
    "SeaBIOS": (firmware("ea5be000f030362f32332f3939"), "a firmware image", "-bios"),
    "OVMF": (firmware("0f20c0a8017405e9"), "", ""),
    "OVMF with wbinvd": (firmware("0f09e92bff"), "a firmware image", "-bios"),
    "EFI volume": (at((0x28, b"_FVH")), "firmware volume", "-bios"),
    "option ROM": (b"\x55\xaa\x02" + at(size=1021), "option ROM", "-option-rom"),
    "script": (b"#!/bin/sh\nexit 0\n", "a script for /bin/sh", "interpreter"),
    "text": (b"Hello, world.\n", "a text file", "compile"),
    "assembly": (b"\tmov\t$1, %eax\n\thlt\n" * 100, "a text file", "assemble"),
    "text in UTF-8": ("Grüße aus Köln, und noch etwas mehr.\n".encode() * 4000, "a text file", "compile"),
    "device tree": (at((0, b"\xd0\x0d\xfe\xed")), "device tree", "kernel"),
    "WebAssembly": (b"\0asm\x01\0\0\0", "WebAssembly", "runtime"),
}
del FOREIGN["OVMF"]  # its first instruction is no jump: not recognised, and not claimed to be

DAMAGED: dict[str, bytes] = {
    "only the magic": b"\x7fELF",
    "half a header": elf(TEXT)[:40],
    "no program headers": elf(TEXT)[:64],
    "half a program header": elf(TEXT)[:90],
    "cut in the segment": elf(TEXT)[:-1],
    "p_filesz": elf(TEXT._replace(filesz=1 << 63, memsz=1 << 63)),
    "p_filesz of all ones": elf(TEXT._replace(filesz=(1 << 64) - 1)),
    "p_offset": elf(TEXT._replace(offset=(1 << 64) - 1)),
    "p_memsz": elf(TEXT._replace(memsz=1 << 62)),
    "p_memsz that wraps": elf(TEXT._replace(memsz=(1 << 64) - 1)),
    "p_memsz below p_filesz": elf(TEXT._replace(memsz=1)),
    "p_paddr at the end": elf(TEXT._replace(vaddr=(1 << 64) - 1), entry=(1 << 64) - 1),
    "overlap": elf(TEXT, TEXT._replace(vaddr=0x200001)),
    "the same twice": elf(TEXT, TEXT),
    "no segments": elf(),
    "nothing to load": elf(Header(0, CODE, 0x200000)),
    "entry outside": elf(TEXT, entry=0x100),
    "phnum": elf(TEXT)[:56] + b"\xff\xff" + elf(TEXT)[58:],
    "phentsize 0": elf(TEXT)[:54] + b"\0\0" + elf(TEXT)[56:],
    "phoff": elf(TEXT)[:32] + b"\xff" * 8 + elf(TEXT)[40:],
    "big-endian": elf(TEXT)[:5] + b"\x02" + elf(TEXT)[6:],
    "class 3": elf(TEXT)[:4] + b"\x03" + elf(TEXT)[5:],
    "a note of all ones": elf(TEXT, Header(NOTE, b"\xff" * 64), entry=0),
    "notes without end": elf(TEXT, Header(NOTE, bytes(100_000)), entry=0),
    "an interpreter beyond the end": elf(TEXT, Header(INTERP, b"", filesz=1 << 40)),
    "a dynamic segment beyond the end": elf(TEXT, Header(DYNAMIC, b"", filesz=1 << 40), type=3),
}

FLAT: dict[str, bytes] = {
    "hlt": b"\xf4",
    "hello": bytes.fromhex("b048e6e9baf803b069eee680f4"),
    "jump": bytes.fromhex("ebfe"),
    "push bp, stosb": bytes.fromhex("55aaf4"),
    "return, nop": bytes.fromhex("c390"),
    "boot sector": (b"\xfa\xf4".ljust(510, b"\0") + b"\x55\xaa"),
    "64 KiB": (b"\xf4" * 0x10000),
    "some zeros first": bytes(16) + b"\xf4",
    "text in code": b"\xeb\x20" + b"This is text that the code prints"[:32].ljust(32) + b"\xf4",
}
ELVES: dict[str, bytes] = {
    "ELF64": elf64(CODE),
    "ELF32": elf32(CODE),
    "with a build id": elf(TEXT, BUILD_ID),
    "no table of sections where it says": elf(TEXT)[:40]
    + b"\xff" * 8
    + elf(TEXT)[48:60]
    + b"\xff\xff\xff\xff"
    + elf(TEXT)[64:],
    "two segments": elf(TEXT, Header(LOAD, CODE, 0x201000)),
}
