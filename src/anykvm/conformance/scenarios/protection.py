"""Host mappings whose protection forbids what the guest does, and mappings that change under the guest."""

from __future__ import annotations

import os

from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, PROT_EXEC, READ_WRITE, anonymous, file_mapping, memfd
from anykvm.conformance.layout import TEST
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import MADV_DONTNEED, PROT_NONE, PROT_READ, PROT_WRITE

AREA = "protection"


@scenario("prot_none", area=AREA)
def prot_none(lab: Lab) -> None:
    """PROT_NONE forbids everything; mprotect lets the same instruction through."""
    m, host = lab.machine(), anonymous(16 * PAGE)
    host.put64(0, 0x77)
    m.slot(1, TEST, 16 * PAGE, host)
    host.protect(PROT_NONE)
    m.at(code.READ8, TEST)
    m.run("read")
    host.protect(PROT_READ, 0, PAGE)
    m.run("PROT_READ_resume")
    host.protect(PROT_NONE, 0, PAGE)
    m.at(code.WRITE8, TEST)
    m.run("write")
    host.protect(PROT_READ, 0, PAGE)
    m.run("write_PROT_READ")
    host.protect(READ_WRITE, 0, PAGE)
    m.run("write_PROT_RW_resume")
    m.at(code.JUMP, TEST + PAGE)
    m.run("exec")
    host.protect(READ_WRITE, PAGE, PAGE)
    host.put(PAGE, code.TARGET)
    m.run("exec_PROT_RW_resume")


@scenario("prot_read", area=AREA)
def prot_read(lab: Lab) -> None:
    """What PROT_READ, PROT_WRITE and PROT_EXEC each allow a guest: reading is enough to execute."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    host.put64(0, 0x99)
    host.put(PAGE, code.TARGET)
    host.protect(PROT_READ)
    m.slot(1, TEST, 4 * PAGE, host)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    m.run("write")
    m.run("write_again")
    host.protect(READ_WRITE, 0, PAGE)
    m.run("RW_resume")
    m.run("readback")
    m.at(code.JUMP, TEST + PAGE)
    m.run("exec_of_PROT_READ")
    m.at(code.WRITE8, TEST + 2 * PAGE)
    m.run("write_untouched")
    m.at(code.LOCK_CMPXCHG, TEST + 2 * PAGE)
    m.run("cmpxchg_untouched")
    m.at(code.READ8, TEST + 3 * PAGE)
    m.run("read_zero_page")
    host.protect(PROT_WRITE)
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("PROT_WRITE_only_read")
    m.at(code.WRITE8, TEST + 2 * PAGE)
    m.run("PROT_WRITE_only_write")
    host.protect(PROT_EXEC)
    m.at(code.READ8, TEST + 2 * PAGE)
    m.run("PROT_EXEC_only_read")
    m.at(code.JUMP, TEST + PAGE)
    m.run("PROT_EXEC_only_exec")


@scenario("remap_later", area=AREA)
def remap_later(lab: Lab) -> None:
    """Mappings that the guest has used are unmapped, protected, emptied, replaced and moved: it sees it at once."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    host.put64(0, 1)
    m.slot(1, TEST, 4 * PAGE, host)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read_backed")
    host.unmap()
    m.run("munmapped_write")
    host.fix()
    host.put64(0, 0xABC)
    m.run("remapped_write")
    m.run("readback")
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read")
    host.protect(PROT_READ, 0, PAGE)
    m.run("mprotected_READ_write")
    host.protect(READ_WRITE, 0, PAGE)
    m.run("mprotected_RW_write")
    m.run("readback")
    host.advise(MADV_DONTNEED, 0, PAGE)
    m.at(code.READ8, TEST)
    m.run("read_after_DONTNEED")
    lab.note("host_view", h=hex(host.get64(0)))
    fd = memfd(PAGE)
    os.pwrite(fd, (0xFEED).to_bytes(8, "little"), 0)
    host.map_file(fd, 0, PAGE)
    m.at(code.READ_WRITE_READ, TEST)
    m.run("read_after_replaced_by_memfd")
    m.run("write_memfd")
    lab.note("memfd_content", file=hex(int.from_bytes(os.pread(fd, 8, 0), "little")))
    host.move_away(0, PAGE)
    m.at(code.READ8, TEST)
    m.run("read_after_mremap_away")


@scenario("private_file_ro", area=AREA)
def private_file_ro(lab: Lab) -> None:
    """A shared mapping that may only be read refuses a write; a private one copies the page."""
    fd = memfd(4 * PAGE)
    os.pwrite(fd, (0x31).to_bytes(8, "little"), 0)
    m = lab.machine()
    m.slot(1, TEST, 4 * PAGE, file_mapping(fd, 4 * PAGE, PROT_READ))
    m.at(code.READ_WRITE_READ, TEST)
    m.run("shared_PROT_READ_read")
    m.run("shared_PROT_READ_write")
    m.slot(2, TEST + 0x100000, 4 * PAGE, file_mapping(fd, 4 * PAGE, shared=False))
    m.at(code.READ_WRITE_READ, TEST + 0x100000)
    m.run("private_RW_read")
    m.run("private_RW_cow_write")
    m.run("private_RW_readback")
    lab.note("file_unchanged", file=hex(int.from_bytes(os.pread(fd, 8, 0), "little")))


@scenario("beyond_eof", area=AREA)
def beyond_eof(lab: Lab) -> None:
    """Pages of a mapping beyond the end of its file: a fault, never a SIGBUS; also after the file shrank."""
    fd = memfd(PAGE)
    m, host = lab.machine(), file_mapping(fd, 4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host)
    m.at(code.READ8, TEST)
    m.run("read_inside")
    m.at(code.READ8, TEST + PAGE)
    m.run("read_beyond")
    m.at(code.WRITE8, TEST + PAGE)
    m.run("write_beyond")
    m.at(code.JUMP, TEST + PAGE)
    m.run("exec_beyond")
    m.at(code.READ8, TEST + PAGE)
    m.run("read_beyond2")
    os.ftruncate(fd, 4 * PAGE)
    m.run("extended_resume")
    m.at(code.READ_WRITE_READ, TEST)
    m.run("inside_read")
    os.ftruncate(fd, 0)
    m.run("truncated_write")
    m.run("truncated_write_again")
