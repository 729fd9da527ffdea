"""Changes of the host's mappings that the guest sees at once (MMU notifiers): ABI.md 4.7."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from anykvm.abi.constants import KVM_MEM_LOG_DIRTY_PAGES
from anykvm.conformance import guest_code as code
from anykvm.conformance import layout
from anykvm.conformance.host import PAGE, READ_WRITE, Host, anonymous, fallocate, file_mapping, memfd
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario
from anykvm.conformance.scenarios.dirty_log import dirty_log
from anykvm.host.libc import MADV_DONTNEED, PROT_NONE, PROT_READ

AREA = "host_changes"
_PUNCH: Final = 3
_TABLE: Final = 0x20000000
_READ_TWICE: Final = bytes.fromhex(
    "488b07e610488b0fe611f4"
)  # mov rax, [rdi]; out 0x10, al; mov rcx, [rdi]; out 0x11, al; hlt


def _memory(lab: Lab, pages: int = 4) -> tuple[Machine, Host]:
    m, host = lab.machine(), anonymous(pages * PAGE)
    m.slot(1, TEST, pages * PAGE, host)
    return m, host


@scenario("changed_neighbour", area=AREA)
def changed_neighbour(lab: Lab) -> None:
    """Taking a page away leaves its neighbours, in the same table and the same slot, as they are."""
    m, host = _memory(lab)
    for page in range(3):
        host.put64(page * PAGE, 0x100 + page)
        m.at(code.READ8, TEST + page * PAGE)
        m.run("read")
    host.unmap(PAGE, PAGE)
    for page in range(3):
        m.at(code.READ8, TEST + page * PAGE)
        m.run("read_without_page_1")


@scenario("changed_between_reads", area=AREA)
def changed_between_reads(lab: Lab) -> None:
    """The same instruction stream reads before and after a change: protection, contents, another mapping."""
    m, host = _memory(lab)
    changes: tuple[tuple[str, Callable[[], None]], ...] = (
        ("dont_need", lambda: host.advise(MADV_DONTNEED, 0, PAGE)),
        ("other_memory", lambda: host.fix(0, PAGE)),
        ("no_access", lambda: host.protect(PROT_NONE, 0, PAGE)),
    )
    for step, change in changes:
        host.put64(0, 0x77)
        m.at(_READ_TWICE, TEST)
        m.run(f"before_{step}")
        change()
        m.run(f"after_{step}")
        host.protect(READ_WRITE, 0, PAGE)


@scenario("changed_protection_cycle", area=AREA)
def changed_protection_cycle(lab: Lab) -> None:
    """Read-write, read-only, nothing, read-only, read-write: each takes effect with the next access."""
    m, host = _memory(lab)
    for protection in (READ_WRITE, PROT_READ, PROT_NONE, PROT_READ, READ_WRITE):
        host.protect(protection, 0, PAGE)
        m.at(code.READ8, TEST)
        m.run(f"read_{protection}")
        m.at(code.WRITE8, TEST)
        m.run(f"write_{protection}")


@scenario("changed_by_fork", area=AREA)
def changed_by_fork(lab: Lab) -> None:
    """After fork the guest's write breaks copy-on-write: parent and guest see it, the child does not."""
    m, host = _memory(lab)
    host.put64(0, 0x11)
    m.at(code.WRITE8, TEST + 8)
    m.run("write_before")
    asked, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(asked[0], 1)
        os.write(told[1], host.get(0, 16))
        os._exit(0)
    m.at(code.WRITE8, TEST)
    m.run("write_after_fork")
    os.write(asked[1], b"x")
    lab.note("child", bytes=os.read(told[0], 16).hex())
    os.waitpid(child, 0)
    lab.note("parent", bytes=host.get(0, 16).hex())
    m.at(code.READ8, TEST)
    m.run("guest")


@scenario("changed_file_hole", area=AREA)
def changed_file_hole(lab: Lab) -> None:
    """A hole punched into the file of a shared mapping: the guest reads zeros; its write fills the hole."""
    fd = memfd(4 * PAGE)
    m, host = lab.machine(), file_mapping(fd, 4 * PAGE)
    host.put64(PAGE, 0x4242)
    m.slot(1, TEST, 4 * PAGE, host)
    m.at(code.READ8, TEST + PAGE)
    m.run("read")
    lab.step("punch", lambda: fallocate(fd, _PUNCH, PAGE, PAGE))
    m.at(code.READ_WRITE_READ, TEST + PAGE)
    for step in ("read_hole", "write_hole", "read_again"):
        m.run(step)
    lab.note("file", value=os.pread(fd, 8, PAGE).hex())


@scenario("changed_file_through_write", area=AREA)
def changed_file_through_write(lab: Lab) -> None:
    """A file that is written with pwrite is the memory the guest reads, in two slots that map it."""
    fd = memfd(PAGE)
    m = lab.machine()
    m.slot(1, TEST, PAGE, file_mapping(fd, PAGE))
    m.slot(2, TEST + 0x100000, PAGE, file_mapping(fd, PAGE, PROT_READ))
    for value in (0x51, 0x52):
        os.pwrite(fd, value.to_bytes(8, "little"), 0)
        for address in (TEST, TEST + 0x100000):
            m.at(code.READ8, address)
            m.run(f"read_{value:#x}")
    m.at(code.WRITE8, TEST)
    m.run("write")
    m.at(code.READ8, TEST + 0x100000)
    m.run("read_through_the_other")


@scenario("changed_code", area=AREA)
def changed_code(lab: Lab) -> None:
    """Code the guest has run is replaced by user space, by a new mapping, and taken away."""
    m, host = _memory(lab)
    for step, port in (("first", 0x21), ("rewritten", 0x22), ("mapped_anew", 0x23)):
        if step == "mapped_anew":
            host.fix(0, PAGE)
        host.put(0, bytes((0xE6, port, 0xF4)))  # out PORT, al; hlt
        m.at(code.JUMP, TEST)
        m.run(step)
    host.unmap(0, PAGE)
    m.at(code.JUMP, TEST)
    m.run("taken_away")


@scenario("changed_page_table", area=AREA)
def changed_page_table(lab: Lab) -> None:
    """The memory of a page table is replaced by other memory: after a flush the guest walks what is there now."""
    m, table, host = lab.machine(), anonymous(PAGE), anonymous(2 * PAGE)
    m.slot(1, TEST, 2 * PAGE, host)
    m.slot(2, _TABLE, PAGE, table)
    layout.map_small_pages(m.memory, TEST, _TABLE, table)
    host.put64(0, 0x1)
    host.put64(PAGE, 0x2)
    m.at(code.READ8, TEST)
    m.run("read")
    table.fix()
    table.put64(0, TEST + PAGE | 0x67)
    m.at(code.LOAD_CR3, layout.PML4)
    m.run("flush")
    m.at(code.READ8, TEST)
    m.run("read_through_the_new")


@scenario("changed_dirty_log_kept", area=AREA, needs=("dirty_log",))
def changed_dirty_log_kept(lab: Lab) -> None:
    """A page that was dirty stays so when its mapping is replaced."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host, KVM_MEM_LOG_DIRTY_PAGES)
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write")
    host.fix(PAGE, PAGE)
    outcome, bitmap = dirty_log(m, 1)
    lab.step("GET_DIRTY_LOG", outcome, bitmap=hex(bitmap))


@scenario("changed_moved_in", area=AREA)
def changed_moved_in(lab: Lab) -> None:
    """Memory that is moved to where a slot has none is the slot's memory."""
    m, host = _memory(lab)
    host.unmap(0, PAGE)
    m.at(code.READ8, TEST)
    m.run("nothing_there")
    other = memfd(PAGE)
    os.pwrite(other, b"\x99", 0)
    host.map_file(other, 0, PAGE)
    m.run("there")
