"""Images: where they go, and one line on each kind of image that cannot be loaded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.api import GuestMemory
from anykvm.vmm.loaders import Image, ImageError, Segment, detect, elf, flat
from vmm_helpers import elf32, elf64

CODE = bytes.fromhex("90f4")


def test_flat() -> None:
    image = flat(CODE, 0x7C00, "real")
    assert image == Image("flat", "real", 0x7C00, (Segment(0x7C00, CODE, 2),))
    with GuestMemory(0x8000) as memory:
        image.load(memory)
        assert memory[0x7C00:0x7C02] == CODE


def test_elf64_goes_to_physical_addresses_and_is_entered_there() -> None:
    image = elf(elf64(CODE, 0x200000, vaddr=0xFFFFFFFF80000000, entry=0xFFFFFFFF80000001))
    assert image == Image("ELF64", "long", 0x200001, (Segment(0x200000, CODE, 2),))


def test_elf32_is_for_protected_mode() -> None:
    assert elf(elf32(CODE)) == Image("ELF32", "protected", 0x200000, (Segment(0x200000, CODE, 2),))


def test_bss_is_zeroed_even_in_used_memory() -> None:
    with GuestMemory(0x2000) as memory:
        memory[0:0x2000] = b"\xff" * 0x2000
        elf(elf64(CODE, 0x1000, memsz=0x800)).load(memory)
        assert memory[0x1000:0x1800] == CODE.ljust(0x800, b"\0")
        assert memory[0x1800] == 0xFF


def test_entry_can_be_chosen() -> None:
    assert elf(elf64(CODE), 0x200001).entry == flat(CODE, 0x200000, "long", 0x200001).entry == 0x200001


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (elf64(CODE, type=3), "position-independent"),
        (elf64(CODE, type=1), "not an executable"),
        (elf64(CODE, machine=183), "EM_AARCH64, not for x86"),
        (elf64(CODE, p_type=3), "dynamically linked"),
        (elf64(CODE, p_type=0), "nothing to load"),
        (elf64(CODE)[:-1], "reaches over its end"),
        (elf64(CODE, memsz=1), "larger in the file than in memory"),
        (elf64(CODE)[:40], "damaged ELF file"),
        (b"\x7fELF", "damaged ELF file"),
    ],
)
def test_what_is_not_such_an_elf_file_is_one_line(data: bytes, text: str) -> None:
    with pytest.raises(ImageError, match=text) as info:
        elf(data)
    assert "\n" not in str(info.value)


@given(cut=st.integers(0, 122), at=st.integers(0, 119), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_elf_file_is_an_image_or_an_image_error(cut: int, at: int, value: int) -> None:
    data = bytearray(elf64(CODE))
    data[at] = value
    try:
        image = elf(bytes(data[:cut]))
        with GuestMemory(0x1000) as memory:
            image.load(memory)
    except ImageError:
        pass


def test_what_does_not_fit_is_said() -> None:
    with GuestMemory(0x8000) as memory:
        with pytest.raises(ImageError, match=r"needs \[0x7fff, 0x8001\), and memory ends at 0x8000"):
            flat(CODE, 0x7FFF, "real").load(memory)
        with pytest.raises(ImageError, match="tables of long mode end at 0x7000"):
            flat(CODE, 0x6000, "long").load(memory, 0x7000)
        with pytest.raises(ImageError, match="entry 0x7002 is not in the image"):
            flat(CODE, 0x7000, "long", 0x7002).load(memory)
        with pytest.raises(ImageError, match="memory ends"):
            elf(elf64(CODE, 0, memsz=1 << 60)).load(memory)
    with pytest.raises(ImageError, match="empty"):
        flat(b"", 0, "real")


def test_detect() -> None:
    assert detect(elf64(CODE)) and not detect(CODE) and not detect(b"")
