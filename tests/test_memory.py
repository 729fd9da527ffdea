"""GuestMemory: bounds, page games, and no crash where the host has nothing."""

from __future__ import annotations

import errno
import mmap
import tempfile

import pytest

from anykvm import PAGE_SIZE, GuestMemory
from anykvm.host import libc


def test_slices_and_bounds() -> None:
    with GuestMemory(2 * PAGE_SIZE) as memory:
        assert len(memory) == memory.size == 2 * PAGE_SIZE
        memory[10:13] = b"abc"
        memory[13] = 0x64
        assert memory[10:14] == b"abcd"
        assert memory[10] == 0x61
        assert memory.read(0, 0) == b""
        assert bytes(memory.view[10:14]) == b"abcd"
        for wrong in (slice(0, 2 * PAGE_SIZE + 1), slice(-1, 5), slice(5, 4)):
            with pytest.raises(IndexError):
                memory[wrong]
        with pytest.raises(IndexError):
            memory[2 * PAGE_SIZE]
        with pytest.raises(IndexError):
            memory.write(2 * PAGE_SIZE - 1, b"ab")
        with pytest.raises(ValueError):
            memory[0:3] = b"ab"
        with pytest.raises(ValueError):
            memory[0:4:2]


@pytest.mark.parametrize("size", [0, -4096, 100])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="page size"):
        GuestMemory(size)


def test_protection_is_efault_not_a_crash() -> None:
    with GuestMemory(2 * PAGE_SIZE) as memory:
        memory[0:1] = b"x"
        memory.protect(0, PAGE_SIZE, libc.PROT_READ)
        assert memory[0:1] == b"x"
        with pytest.raises(OSError) as caught:
            memory[0:1] = b"y"
        assert caught.value.errno == errno.EFAULT
        memory.protect(0, PAGE_SIZE, 0)
        with pytest.raises(OSError) as caught:
            memory.read(0, 1)
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(ValueError):
            memory.protect(1, PAGE_SIZE, 0)


def test_unmap_and_map_again() -> None:
    with GuestMemory(4 * PAGE_SIZE) as memory:
        memory.write(0, b"\xff" * memory.size)
        memory.unmap(PAGE_SIZE, 2 * PAGE_SIZE)
        memory.unmap(PAGE_SIZE, PAGE_SIZE)  # again: nothing
        for offset in (PAGE_SIZE - 1, PAGE_SIZE, 3 * PAGE_SIZE - 1):
            with pytest.raises(OSError) as caught:
                memory.read(offset, 2)
            assert caught.value.errno == errno.EFAULT
        memory.map(0, 2 * PAGE_SIZE)  # half ours, half a hole
        assert memory.read(0, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
        with pytest.raises(OSError):
            memory.protect(2 * PAGE_SIZE, PAGE_SIZE, 0)
        assert memory[3 * PAGE_SIZE] == 0xFF


def test_a_hole_someone_else_uses_is_left_alone() -> None:
    memory = GuestMemory(3 * PAGE_SIZE)
    memory.unmap(PAGE_SIZE, PAGE_SIZE)
    hole = memory.address + PAGE_SIZE
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
    assert libc.mmap(hole, PAGE_SIZE, 3, flags) == hole
    libc.copy_in(hole, b"foreign")
    with pytest.raises(OSError) as caught:
        memory.read(PAGE_SIZE, 7)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError) as caught:
        memory.map(PAGE_SIZE, PAGE_SIZE)
    assert caught.value.errno == errno.EEXIST
    memory.close()
    assert libc.copy_out(hole, 7) == b"foreign"  # closing did not unmap what is not ours
    libc.munmap(hole, PAGE_SIZE)


@pytest.mark.parametrize("shared", [True, False])
def test_discard_gives_zeros(shared: bool) -> None:
    with GuestMemory(2 * PAGE_SIZE, shared=shared) as memory:
        memory.write(0, b"\xff" * memory.size)
        memory.discard(0, PAGE_SIZE)
        assert memory.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert memory[PAGE_SIZE] == 0xFF


def test_file_backed() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
        file.flush()
        with GuestMemory(PAGE_SIZE, fd=file.fileno(), offset=PAGE_SIZE) as memory:
            assert memory[0:2] == b"bb"
            memory[0:2] = b"BB"
        file.seek(PAGE_SIZE)
        assert file.read(3) == b"BBb"
        with GuestMemory(2 * PAGE_SIZE) as memory:
            memory.map(PAGE_SIZE, PAGE_SIZE, fd=file.fileno(), fd_offset=0, shared=False)
            assert memory[PAGE_SIZE : PAGE_SIZE + 2] == b"aa"
            file.truncate(0)
            with pytest.raises(OSError) as caught:  # a plain access would be SIGBUS
                memory.read(PAGE_SIZE, 1)
            assert caught.value.errno == errno.EFAULT


def test_closed_memory() -> None:
    memory = GuestMemory(PAGE_SIZE)
    view = memory.view
    view[0] = 7
    memory.close()
    memory.close()
    assert memory.closed
    assert view[0] == 7  # a view keeps the mapping
    for use in (lambda: memory[0], lambda: memory.address, lambda: memory.view):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_page_size_is_the_hosts() -> None:
    assert mmap.PAGESIZE == PAGE_SIZE
