"""MMIO exits: widths, instructions that read and write, fragments, and what user space may do in between."""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, anonymous
from anykvm.conformance.layout import CODE, TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.scenario import Lab, scenario

AREA = "mmio"
_DEVICE: Final = TEST
_RAM: Final = TEST + 0x200000
_VALUE: Final = 0xF1E2D3C4B5A69788
_MAX_EXITS: Final = 8
_READS: Final = {
    "movzx_byte": bytes.fromhex("0fb607e610f4"),  # movzx eax, byte ptr [rdi]; out 0x10, al; hlt
    "movsx_byte": bytes.fromhex("480fbe07e610f4"),  # movsx rax, byte ptr [rdi]; out 0x10, al; hlt
    "mov_byte": bytes.fromhex("8a07e610f4"),  # mov al, [rdi]; out 0x10, al; hlt
    "mov_word": bytes.fromhex("668b07e610f4"),  # mov ax, [rdi]; out 0x10, al; hlt
    "mov_double": bytes.fromhex("8b07e610f4"),  # mov eax, [rdi]; out 0x10, al; hlt
    "mov_quad": bytes.fromhex("488b07e610f4"),  # mov rax, [rdi]; out 0x10, al; hlt
    "add_from": bytes.fromhex("480307e610f4"),  # add rax, [rdi]; out 0x10, al; hlt
    "cmp": bytes.fromhex("48391f0f94c0e610f4"),  # cmp [rdi], rbx; sete al; out 0x10, al; hlt
    "test": bytes.fromhex("f607800f95c0e610f4"),  # test byte ptr [rdi], 0x80; setne al; out 0x10, al; hlt
    "bt": bytes.fromhex("0fba27030f92c0e610f4"),  # bt dword ptr [rdi], 3; setc al; out 0x10, al; hlt
    "lods": bytes.fromhex("4889fe48ade610f4"),  # mov rsi, rdi; lodsq; out 0x10, al; hlt
    "scas": bytes.fromhex("ae0f94c0e610f4"),  # scasb; sete al; out 0x10, al; hlt
    "push_from": bytes.fromhex("ff3758e610f4"),  # push qword ptr [rdi]; pop rax; out 0x10, al; hlt
}
_JUMP_THROUGH: Final = bytes.fromhex("ff27")  # jmp [rdi]
_WRITES: Final = {
    "mov_byte": bytes.fromhex("881fe610f4"),  # mov [rdi], bl; out 0x10, al; hlt
    "mov_word": bytes.fromhex("66891fe610f4"),  # mov [rdi], bx; out 0x10, al; hlt
    "mov_double": bytes.fromhex("891fe610f4"),  # mov [rdi], ebx; out 0x10, al; hlt
    "mov_quad": bytes.fromhex("48891fe610f4"),  # mov [rdi], rbx; out 0x10, al; hlt
    "mov_immediate": bytes.fromhex("48c707feffffffe610f4"),  # mov qword ptr [rdi], -2; out 0x10, al; hlt
    "movnti": bytes.fromhex("480fc31fe610f4"),  # movnti [rdi], rbx; out 0x10, al; hlt
    "stos": bytes.fromhex("4889d8abe610f4"),  # mov rax, rbx; stosd; out 0x10, al; hlt
    "sete": bytes.fromhex("39c00f9407e610f4"),  # cmp eax, eax; sete [rdi]; out 0x10, al; hlt
    "pop_into": bytes.fromhex("538f07e610f4"),  # push rbx; pop qword ptr [rdi]; out 0x10, al; hlt
    "call_stack": bytes.fromhex("4889fce800000000e610f4"),  # mov rsp, rdi; call .+5; out 0x10, al; hlt
}
_BOTH: Final = {
    "add": bytes.fromhex("48011fe610f4"),  # add [rdi], rbx; out 0x10, al; hlt
    "lock_inc": bytes.fromhex("f0ff07e610f4"),  # lock inc dword ptr [rdi]; out 0x10, al; hlt
    "not_byte": bytes.fromhex("f617e610f4"),  # not byte ptr [rdi]; out 0x10, al; hlt
    "xchg": bytes.fromhex("48871f4889d8e610f4"),  # xchg [rdi], rbx; mov rax, rbx; out 0x10, al; hlt
    "xadd": bytes.fromhex("f0480fc11f4889d8e610f4"),  # lock xadd [rdi], rbx; mov rax, rbx; out 0x10, al; hlt
    "bts": bytes.fromhex("0fba2f030f92c0e610f4"),  # bts dword ptr [rdi], 3; setc al; out 0x10, al; hlt
    "shl": bytes.fromhex("48c12704e610f4"),  # shl qword ptr [rdi], 4; out 0x10, al; hlt
    "cmpxchg_equal": bytes.fromhex(
        "488b06f0480fb11f0f94c0e610f4"
    ),  # mov rax, [rsi]; lock cmpxchg [rdi], rbx; sete al; out 0x10, al; hlt
    "cmpxchg_unequal": bytes.fromhex(
        "31c0f0480fb11fe610f4"
    ),  # xor eax, eax; lock cmpxchg [rdi], rbx; out 0x10, al; hlt
}
_LOAD_16: Final = bytes.fromhex(
    "f30f6f0766480f7ec0660f73d80866480f7ec1e610f4"
)  # movdqu xmm0, [rdi]; movq rax, xmm0; psrldq xmm0, 8; movq rcx, xmm0; out 0x10, al; hlt
_STORE_16: Final = bytes.fromhex(
    "66480f6ec3660f6cc0f30f7f07e610f4"
)  # movq xmm0, rbx; punpcklqdq xmm0, xmm0; movdqu [rdi], xmm0; out 0x10, al; hlt
_MOVSQ: Final = bytes.fromhex("48a5e610f4")  # movsq; out 0x10, al; hlt
_REP_MOVSQ: Final = bytes.fromhex("f348a5e610f4")  # rep movsq; out 0x10, al; hlt
_REP_STOSQ: Final = bytes.fromhex("f348abe610f4")  # rep stosq; out 0x10, al; hlt
_FLD: Final = bytes.fromhex("d907e610f4")  # fld dword ptr [rdi]; out 0x10, al; hlt
_VALUE_ADDRESS: Final = CODE + 0x800


def _to_the_end(m: Machine, step: str, guest: bytes, rdi: int = _DEVICE, value: int = _VALUE, **registers: int) -> None:
    """Run until something else than an MMIO exit, answering reads."""
    m.at(guest, rdi, **registers)
    for _ in range(_MAX_EXITS):
        m.run(step)
        if m.run_page.exit_reason != c.KVM_EXIT_MMIO:
            return
        if not m.run_page.mmio.is_write:
            m.answer_mmio(value)


@scenario("mmio_reads", area=AREA)
def mmio_reads(lab: Lab) -> None:
    """Instructions that read: which width, and what they make of the answer."""
    m = lab.machine()
    for name, guest in _READS.items():
        _to_the_end(m, name, guest, rax=0x1111111111111111)
    m.memory.put(CODE + 0x400, code.TARGET)
    _to_the_end(m, "jump_through", _JUMP_THROUGH, value=CODE + 0x400)


@scenario("mmio_writes", area=AREA)
def mmio_writes(lab: Lab) -> None:
    """Instructions that write: which width and data; RIP is past them at the exit."""
    m = lab.machine()
    for name, guest in _WRITES.items():
        _to_the_end(m, name, guest, rdi=_DEVICE + 0x808)


@scenario("mmio_read_modify_write", area=AREA)
def mmio_read_modify_write(lab: Lab) -> None:
    """Instructions that read and then write: an exit each; a locked one is no different."""
    m = lab.machine()
    m.memory.put64(_VALUE_ADDRESS, _VALUE)
    for name, guest in _BOTH.items():
        _to_the_end(m, name, guest, rsi=_VALUE_ADDRESS)


@scenario("mmio_16_bytes", area=AREA)
def mmio_16_bytes(lab: Lab) -> None:
    """An access of 16 bytes comes in two parts of 8, each with its own answer."""
    m = lab.machine()
    m.at(_LOAD_16, _DEVICE)
    for part in (1, 2):
        m.run("load")
        m.answer_mmio(part * 0x0101010101010101)
    m.run("load_done")
    _to_the_end(m, "store", _STORE_16)


@scenario("mmio_page_crossing", area=AREA)
def mmio_page_crossing(lab: Lab) -> None:
    """An access over two pages is a part for each, whichever bytes fall where."""
    m = lab.machine()
    for first in (1, 4, 7):
        m.at(code.READ8, _DEVICE + PAGE - first)
        for part in (1, 2):
            m.run(f"read_{first}")
            m.answer_mmio(part * 0x1111111111111111)
        m.run(f"read_{first}_done")
        m.at(code.WRITE8, _DEVICE + PAGE - first)
        for _ in range(3):
            m.run(f"write_{first}")


@scenario("mmio_into_memory", area=AREA)
def mmio_into_memory(lab: Lab) -> None:
    """An access that begins in a device and ends in memory, and the other way: the memory's part is done at once."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put64(0, 0x8877665544332211)
    m.slot(1, _DEVICE + PAGE, PAGE, host)
    m.at(code.READ8, _DEVICE + PAGE - 4)
    m.run("read_from_device")
    m.answer_mmio(0xAAAAAAAA)
    m.run("read_done")
    m.at(code.WRITE8, _DEVICE + PAGE - 4)
    m.run("write_from_device")
    lab.note("memory", at_exit=hex(host.get64(0)))
    m.run("write_done")
    m.at(code.READ8, _DEVICE + 2 * PAGE - 4)
    m.run("read_into_device")
    m.answer_mmio(0xBBBBBBBB)
    m.run("read_into_device_done")


@scenario("mmio_movs", area=AREA)
def mmio_movs(lab: Lab) -> None:
    """MOVS from device to device, to memory, from memory."""
    m, host = lab.machine(), anonymous(PAGE)
    host.put64(0, 0x5151)
    m.slot(1, _RAM, PAGE, host)
    _to_the_end(m, "device_to_device", _MOVSQ, rdi=_DEVICE, rsi=_DEVICE + 0x100)
    _to_the_end(m, "device_to_memory", _MOVSQ, rdi=_RAM + 8, rsi=_DEVICE)
    lab.note("memory", value=hex(host.get64(8)))
    _to_the_end(m, "memory_to_device", _MOVSQ, rdi=_DEVICE, rsi=_RAM)


@scenario("mmio_rep", area=AREA)
def mmio_rep(lab: Lab) -> None:
    """REP MOVS and STOS on a device: an exit for each element, with RCX counted down."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, _RAM, PAGE, host)
    _to_the_end(m, "stos", _REP_STOSQ, rcx=3, rax=0x7777)
    _to_the_end(m, "movs_to_memory", _REP_MOVSQ, rdi=_RAM, rsi=_DEVICE, rcx=3)
    lab.note("memory", bytes=host.get(0, 24).hex())
    _to_the_end(m, "movs_from_memory", _REP_MOVSQ, rsi=_RAM, rcx=2)


@scenario("mmio_rep_into_device", area=AREA)
def mmio_rep_into_device(lab: Lab) -> None:
    """REP STOS that begins in memory and reaches a device."""
    m, host = lab.machine(), anonymous(PAGE)
    m.slot(1, _DEVICE + 0x100000, PAGE, host)
    _to_the_end(m, "stos", _REP_STOSQ, rdi=_DEVICE + 0x100000 + PAGE - 16, rcx=4, rax=0x2222)
    lab.note("memory", last=hex(host.get64(PAGE - 8)))


@scenario("mmio_read_set_regs", area=AREA)
def mmio_read_set_regs(lab: Lab) -> None:
    """Registers that user space sets between a read's exit and its completion: the instruction is emulated anew."""
    m = lab.machine()
    m.at(code.READ8, _DEVICE)
    m.run("read")
    m.answer_mmio(_VALUE)
    m.change(rcx=0x3333)
    m.run("rcx_set")
    m.at(code.READ8, _DEVICE)
    m.run("read_again")
    m.answer_mmio(_VALUE)
    m.memory.put(CODE + 0x100, bytes.fromhex("e611f4"))  # out 0x11, al; hlt
    m.change(rip=CODE + 0x100)
    m.run("rip_set")


@scenario("mmio_write_set_regs", area=AREA)
def mmio_write_set_regs(lab: Lab) -> None:
    """A write is over at its exit: user space may move RIP."""
    m = lab.machine()
    m.at(code.WRITE8, _DEVICE)
    m.run("write")
    m.memory.put(CODE + 0x100, bytes.fromhex("e611f4"))  # out 0x11, al; hlt
    m.change(rip=CODE + 0x100)
    m.run("rip_set")


@scenario("mmio_get_regs_pending", area=AREA)
def mmio_get_regs_pending(lab: Lab) -> None:
    """Looking at registers, system registers and events does not disturb a pending read."""
    m = lab.machine()
    m.at(code.READ8, _DEVICE)
    m.run("read")
    m.vcpu.get_sregs()
    m.vcpu.get_vcpu_events()
    m.vcpu.get_fpu()
    m.vcpu.get_msrs((0x10,))
    m.answer_mmio(_VALUE)
    m.run("done")


@scenario("mmio_not_emulated", area=AREA)
def mmio_not_emulated(lab: Lab) -> None:
    """An instruction that KVM does not emulate: an internal error that shows its bytes, and again when run again."""
    m = lab.machine()
    m.at(_FLD, _DEVICE)
    m.run("fld")
    m.run("fld_again")
    m.change(rip=CODE + 2)
    m.run("skipped")
