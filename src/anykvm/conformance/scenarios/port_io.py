"""Port exits and how the next KVM_RUN completes them: ABI.md 1.3, the rows of KVM_EXIT_IO."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.modes import USER_IOPL, user_mode
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "port_io"
_RAX: Final = 0x1122334455667788
_IN_1: Final = bytes.fromhex("ece610f4")  # in al, dx; out 0x10, al; hlt
_IN_2: Final = bytes.fromhex("66ede610f4")  # in ax, dx; out 0x10, al; hlt
_IN_4: Final = bytes.fromhex("ede610f4")  # in eax, dx; out 0x10, al; hlt
_OUT_1: Final = bytes.fromhex("eee610f4")  # out dx, al; out 0x10, al; hlt
_OUT_2: Final = bytes.fromhex("66efe610f4")  # out dx, ax; out 0x10, al; hlt
_OUT_4: Final = bytes.fromhex("efe610f4")  # out dx, eax; out 0x10, al; hlt
_OUT_7E: Final = bytes.fromhex("e67ee610f4")  # out 0x7e, al; out 0x10, al; hlt
_IN_7E: Final = bytes.fromhex("e47ee610f4")  # in al, 0x7e; out 0x10, al; hlt
_INSB: Final = bytes.fromhex("fcf36ce610f4")  # cld; rep insb; out 0x10, al; hlt
_INSB_DOWN: Final = bytes.fromhex("fdf36cfce610f4")  # std; rep insb; cld; out 0x10, al; hlt
_INSB_ONCE: Final = bytes.fromhex("6ce610f4")  # insb; out 0x10, al; hlt
_INSW: Final = bytes.fromhex("66f36de610f4")  # rep insw; out 0x10, al; hlt
_INSD: Final = bytes.fromhex("f36de610f4")  # rep insd; out 0x10, al; hlt
_OUTSB: Final = bytes.fromhex("f36ee610f4")  # rep outsb; out 0x10, al; hlt
_OUTSB_DOWN: Final = bytes.fromhex("fdf36efce610f4")  # std; rep outsb; cld; out 0x10, al; hlt
_OUTSW: Final = bytes.fromhex("66f36fe610f4")  # rep outsw; out 0x10, al; hlt
_OUTSD: Final = bytes.fromhex("f36fe610f4")  # rep outsd; out 0x10, al; hlt
_PORT: Final = 0x3F8
_CHUNKS: Final = 8


@scenario("port_in_widths", area=AREA)
def port_in_widths(lab: Lab) -> None:
    """IN of 1 and 2 bytes is merged into RAX, of 4 clears its upper half."""
    m = lab.machine()
    for step, guest, size in (("1", _IN_1, 1), ("2", _IN_2, 2), ("4", _IN_4, 4)):
        m.at(guest, rdx=_PORT, rax=_RAX)
        m.run(f"in_{step}")
        m.pio_data(size)[:] = b"\xf1\xf2\xf3\xf4"[:size]
        m.run(f"in_{step}_completed")


@scenario("port_out_widths", area=AREA)
def port_out_widths(lab: Lab) -> None:
    """OUT of 1, 2 and 4 bytes; the largest port; what lies in the data page."""
    m = lab.machine()
    for step, guest, size, port in (
        ("1", _OUT_1, 1, 0),
        ("2", _OUT_2, 2, 0xFFFE),
        ("4", _OUT_4, 4, 0xFFFF),
        ("high_rdx", _OUT_1, 1, 0x12345678),
    ):
        m.at(guest, rdx=port, rax=_RAX)
        m.run(f"out_{step}")
        lab.note("data", bytes=bytes(m.pio_data(size)).hex(), offset=m.run_page.io.data_offset)
        m.run(f"out_{step}_completed")


@scenario("port_in_rip_moved", area=AREA)
def port_in_rip_moved(lab: Lab) -> None:
    """When user space has moved RIP the value is dropped and nothing is skipped."""
    m = lab.machine()
    m.at(_IN_1, rdx=_PORT, rax=_RAX)
    m.memory.put(CODE + 0x100, bytes.fromhex("e611 f4"))  # out 0x11, al; hlt
    m.run("in")
    m.pio_data(1)[0] = 0x99
    m.change(rip=CODE + 0x100)
    m.run("elsewhere")
    m.at(_IN_1, rdx=_PORT, rax=_RAX)
    m.run("in_again")
    m.pio_data(1)[0] = 0x99
    m.change(rip=CODE)
    m.run("same_rip_set_again")


@scenario("port_out_rip_moved", area=AREA)
def port_out_rip_moved(lab: Lab) -> None:
    """When user space has moved RIP past an OUT it is not skipped a second time."""
    m = lab.machine()
    m.at(_OUT_1, rdx=_PORT)
    m.run("out")
    m.change(rip=CODE + 1)
    m.run("after_it")
    m.at(_OUT_1, rdx=_PORT)
    m.run("out_again")
    m.change(rax=0x55)
    m.run("rax_changed")


@scenario("port_7e", area=AREA)
def port_7e(lab: Lab) -> None:
    """The quirk of OUT to port 0x7e: RIP is past it at the exit already; IN has none."""
    m = lab.machine()
    m.at(_OUT_7E)
    m.run("out")
    m.run("out_completed")
    m.at(_OUT_7E)
    m.run("out_again")
    m.change(rip=CODE)
    m.run("rip_set_back")
    m.at(_IN_7E)
    m.run("in")
    m.run("in_completed")


@scenario("port_7e_without_quirk", area=AREA, needs=("quirks",))
def port_7e_without_quirk(lab: Lab) -> None:
    """With KVM_X86_QUIRK_OUT_7E_INC_RIP disabled port 0x7e is a port as any other."""
    m = lab.machine()
    quirks = m.vm.check_extension(c.KVM_CAP_DISABLE_QUIRKS2)
    lab.note("quirk", offered=bool(quirks & c.KVM_X86_QUIRK_OUT_7E_INC_RIP))
    lab.step("unknown_quirk", attempt(m.vm.enable_cap, c.KVM_CAP_DISABLE_QUIRKS2, 1 << 31))
    disabled = lab.step("disable", attempt(m.vm.enable_cap, c.KVM_CAP_DISABLE_QUIRKS2, c.KVM_X86_QUIRK_OUT_7E_INC_RIP))
    if not disabled.failed:
        m.at(_OUT_7E)
        m.run("out")
        m.run("out_completed")


@scenario("port_user_mode", area=AREA)
def port_user_mode(lab: Lab) -> None:
    """In ring 3 a port needs IOPL 3, or a bit in the TSS, which has none: #GP."""
    m = lab.machine()
    user_mode(m)
    m.at(_OUT_1, rdx=_PORT, rflags=USER_IOPL)
    m.run("iopl_3")
    m.at(_OUT_1, rdx=_PORT, rflags=2)
    m.run("iopl_0")


def _strings(lab: Lab, m: Machine, step: str, guest: bytes, count: int, rdi: int = 0, rsi: int = 0) -> None:
    """Run a string instruction to its end, answering each chunk with bytes of its number."""
    m.at(guest, rdi, rsi=rsi, rcx=count, rdx=_PORT)
    for number in range(1, _CHUNKS + 1):
        m.run(step)
        io = m.run_page.io
        if m.run_page.exit_reason != c.KVM_EXIT_IO or io.port != _PORT:
            return
        length = io.size * io.count
        if io.direction == c.KVM_EXIT_IO_IN:
            m.pio_data(length)[:] = bytes((number,)) * length
        else:
            lab.note("data", first=bytes(m.pio_data(length))[:8].hex())


@scenario("string_in_sizes", area=AREA)
def string_in_sizes(lab: Lab) -> None:
    """REP INS of bytes, words, double words: the whole count is one exit; without REP, and with a count of 0."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    for step, guest, count in (
        ("bytes", _INSB, 5),
        ("words", _INSW, 3),
        ("double_words", _INSD, 2),
        ("once", _INSB_ONCE, 7),
        ("count_0", _INSB, 0),
    ):
        _strings(lab, m, step, guest, count, rdi=TEST)
        lab.note("memory", bytes=host.get(0, 9).hex())
        host.fix()


@scenario("string_in_chunks", area=AREA)
def string_in_chunks(lab: Lab) -> None:
    """More than KVM reads ahead, and more than a page holds, comes in several exits."""
    m, host = lab.machine(), anonymous(4 * PAGE)
    m.slot(1, TEST, 4 * PAGE, host)
    _strings(lab, m, "long", _INSB, 2500, rdi=TEST)
    lab.note("memory", ends=[host.get(at, 1)[0] for at in (0, 1023, 1024, 2048, 2499, 2500)])
    _strings(lab, m, "to_page_end", _INSB, 10, rdi=TEST + PAGE - 4)
    lab.note("memory", bytes=host.get(PAGE - 5, 12).hex())


@scenario("string_in_down", area=AREA)
def string_in_down(lab: Lab) -> None:
    """With the direction flag set each element is an exit."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    _strings(lab, m, "down", _INSB_DOWN, 3, rdi=TEST + 8)
    lab.note("memory", bytes=host.get(4, 8).hex())


@scenario("string_in_registers_changed", area=AREA)
def string_in_registers_changed(lab: Lab) -> None:
    """What becomes of a REP INS whose RCX user space changes between the exit and the next KVM_RUN."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, TEST, PAGE, host)
    for step, count in (("to_1", 1), ("to_4096", 4096), ("to_0", 0)):
        m.at(_INSB, TEST, rcx=8, rdx=_PORT)
        m.run(f"rcx_{step}")
        m.pio_data(8)[:] = b"ABCDEFGH"
        m.change(rcx=count)
        m.run(f"rcx_{step}_resume")
        lab.note("memory", bytes=host.get(0, 8).hex())


@scenario("string_in_immediate_exit", area=AREA)
def string_in_immediate_exit(lab: Lab) -> None:
    """Completing one chunk with immediate_exit gives the next, and 0; only the last gives EINTR (rows 15, 17)."""
    m = lab.machine()
    m.slot(1, TEST, 4 * PAGE, anonymous(4 * PAGE))
    m.at(_INSB, TEST, rcx=1500, rdx=_PORT)
    m.run("first")
    m.run_page.immediate_exit = 1
    for step in ("second", "done", "again"):
        m.run(step)
    m.run_page.immediate_exit = 0
    m.run("resume")


@scenario("string_out_sizes", area=AREA)
def string_out_sizes(lab: Lab) -> None:
    """REP OUTS of bytes, words, double words; downwards; with a count of 0."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put(0, bytes(range(0x40, 0x80)))
    m.slot(1, TEST, PAGE, host)
    for step, guest, count, rsi in (
        ("bytes", _OUTSB, 5, TEST),
        ("words", _OUTSW, 3, TEST),
        ("double_words", _OUTSD, 2, TEST + 4),
        ("down", _OUTSB_DOWN, 2, TEST + 8),
        ("count_0", _OUTSB, 0, TEST),
    ):
        _strings(lab, m, step, guest, count, rsi=rsi)


@scenario("string_out_changed_rcx", area=AREA)
def string_out_changed_rcx(lab: Lab) -> None:
    """REP OUTS has no completion: the instruction is executed again with the registers user space left."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put(0, b"abcdefgh")
    m.slot(1, TEST, PAGE, host)
    m.at(_OUTSB, rsi=TEST, rcx=4, rdx=_PORT)
    m.run("first")
    m.change(rcx=2)
    m.run("rcx_2")
    m.run("next")
