"""Memory that arrives on demand: what is absent, what a resolver brings, and when it gives up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.api import MemoryFault
from anykvm.vmm.lazy import LazyMemory
from anykvm.vmm.resolvers import REPEATS, FileResolver, SourceError, Unresolvable

PAGE = 4096
GPA = 1 << 32


def has_guards() -> bool:
    try:
        LazyMemory(PAGE, guards=True).close()
    except OSError:
        return False
    return True


MakeLazy = Callable[[int], LazyMemory]
MakeSource = Callable[[bytes], int]


@pytest.fixture(params=[True, False], ids=["guards", "protection"])
def lazy(request: pytest.FixtureRequest) -> MakeLazy:
    if request.param and not has_guards():
        pytest.skip("this kernel has no guard regions (Linux 6.13)")
    return lambda size: LazyMemory(size, guards=request.param)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[MakeSource]:
    files: list[int] = []

    def make(data: bytes) -> int:
        path = tmp_path / f"source{len(files)}"
        path.write_bytes(data)
        files.append(os.open(path, os.O_RDWR))
        return files[-1]

    yield make
    for fd in files:
        os.close(fd)


def fault(page: int, flags: int = 0, code: int = errno.EFAULT) -> MemoryFault:
    return MemoryFault(GPA + page * PAGE, PAGE, flags, code)


def content(pages: int, tail: int = 0) -> bytes:
    return b"".join(bytes((index % 251 + 1,)) * PAGE for index in range(pages)) + b"\xaa" * tail


def test_lazy_memory_is_absent_until_admitted(lazy: MakeLazy) -> None:
    with lazy(4 * PAGE) as memory:
        assert all(memory.absent(page * PAGE) for page in range(4))
        memory.admit(PAGE, 2 * PAGE)
        assert [memory.absent(page * PAGE + 7) for page in range(4)] == [True, False, False, True]
        memory[PAGE : PAGE + 4] = b"data"
        assert memory[PAGE : PAGE + 4] == b"data"
        with pytest.raises(OSError) as info:
            memory.read(0, 1)
        assert info.value.errno == errno.EFAULT
        with pytest.raises(IndexError):
            memory.absent(4 * PAGE)


def test_it_uses_guards_where_there_are_any() -> None:
    with LazyMemory(PAGE) as memory:
        assert memory.guards == has_guards()


def test_brings_the_page_and_no_other(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(3)
    with lazy(3 * PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA)
        assert resolver.resolve(fault(1)) == 1
        assert memory[PAGE : 2 * PAGE] == data[PAGE : 2 * PAGE]
        assert memory.absent(0) and memory.absent(2 * PAGE)
        assert (resolver.present, resolver.pages) == (1, 3)


def test_last_page_is_padded_with_zeros(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(1, tail=5)
    with lazy(2 * PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA)
        assert resolver.resolve(fault(1)) == 1
        assert memory[PAGE : 2 * PAGE] == b"\xaa" * 5 + bytes(PAGE - 5)


def test_prefetch_stops_at_a_page_that_is_there_and_at_the_end(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(6)
    with lazy(6 * PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA, prefetch=3)
        assert resolver.resolve(fault(2)) == 4
        memory[2 * PAGE : 2 * PAGE + 5] = b"guest"  # must survive
        assert resolver.resolve(fault(0)) == 2
        assert memory[2 * PAGE : 2 * PAGE + 5] == b"guest"
        assert resolver.present == 6
        assert memory[0 : 2 * PAGE] == data[: 2 * PAGE] and memory[3 * PAGE :] == data[3 * PAGE :]


@given(
    order=st.lists(st.integers(0, 40), unique=True, min_size=1),
    prefetch=st.integers(0, 50),
    tail=st.integers(0, PAGE - 1),
    guards=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_order_and_prefetch_give_the_file(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], prefetch: int, tail: int, guards: bool
) -> None:
    data = content(40, tail)
    path = tmp_path_factory.getbasetemp() / "any-order"
    path.write_bytes(data)
    pages = -(-len(data) // PAGE)
    with open(path, "rb") as file, LazyMemory(pages * PAGE, guards=guards and has_guards()) as memory:
        resolver = FileResolver(file.fileno(), len(data), memory, GPA, prefetch)
        brought = sum(resolver.resolve(fault(page)) for page in order if page < pages and memory.absent(page * PAGE))
        assert brought == resolver.present == sum(not memory.absent(page * PAGE) for page in range(pages))
        for page in range(pages):
            if not memory.absent(page * PAGE):
                expected = data[page * PAGE : (page + 1) * PAGE].ljust(PAGE, b"\0")
                assert memory[page * PAGE : (page + 1) * PAGE] == expected


def test_the_same_fault_again_is_a_race_at_first_and_then_an_error(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(2)
    with lazy(2 * PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA)
        resolver.resolve(fault(0))
        assert [resolver.resolve(fault(0)) for _ in range(REPEATS)] == [0] * REPEATS
        with pytest.raises(Unresolvable, match="came again 3 times though its page is there"):
            resolver.resolve(fault(0))
        assert resolver.resolve(fault(1)) == 1
        assert resolver.resolve(fault(1)) == 0  # another page: counted from the start


@pytest.mark.parametrize("bad", [fault(2), fault(-1), fault(1 << 30), fault(0, MemoryFault.PRIVATE)])
def test_what_is_not_about_the_file_is_not_resolved(lazy: MakeLazy, source: MakeSource, bad: MemoryFault) -> None:
    data = content(2)
    with lazy(2 * PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA)
        with pytest.raises(Unresolvable, match="not about a page of the file"):
            resolver.resolve(bad)
        assert resolver.present == 0


def test_poison_is_not_resolved(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(1)
    with lazy(PAGE) as memory:
        resolver = FileResolver(source(data), len(data), memory, GPA)
        with pytest.raises(Unresolvable, match="EHWPOISON"):
            resolver.resolve(fault(0, code=133))


def test_a_file_that_became_shorter_is_an_error(lazy: MakeLazy, source: MakeSource) -> None:
    data = content(3)
    fd = source(data)
    with lazy(3 * PAGE) as memory:
        resolver = FileResolver(fd, len(data), memory, GPA)
        resolver.resolve(fault(2))
        os.ftruncate(fd, PAGE + 10)
        assert resolver.resolve(fault(0)) == 1
        with pytest.raises(SourceError, match="no byte 0x100a any more"):
            resolver.resolve(fault(1))
        assert memory[2 * PAGE : 3 * PAGE] == data[2 * PAGE :]  # a page that is there stays


def test_a_file_that_cannot_be_read_is_an_error(lazy: MakeLazy, tmp_path: Path) -> None:
    with lazy(PAGE) as memory:
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(SourceError, match="directory"):
                FileResolver(fd, PAGE, memory, GPA).resolve(fault(0))
        finally:
            os.close(fd)


def test_protection_alone_stays_within_the_number_of_mappings() -> None:
    pages = 70_000
    with LazyMemory(pages * PAGE, guards=False) as memory, open("/dev/zero", "rb") as zero:
        resolver = FileResolver(zero.fileno(), pages * PAGE, memory, GPA)
        there = 0
        for page in range(0, pages, 4):
            there += resolver.resolve(fault(page))
        assert there == resolver.present > pages // 4
