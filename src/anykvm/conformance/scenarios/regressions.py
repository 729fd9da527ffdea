"""Where random sequences found the soft backend to differ from a real kernel: the shortest sequence of each.

They are kept as steps of ``anykvm.conformance.sequences``, which also records what memory and events are at the end.
"""

from __future__ import annotations

from typing import Final

from anykvm.abi import constants as c
from anykvm.conformance.host import PAGE
from anykvm.conformance.layout import TEST
from anykvm.conformance.scenario import Body, Lab, scenario
from anykvm.conformance.sequences.perform import perform
from anykvm.conformance.sequences.step import Step, step
from anykvm.conformance.sequences.world import FREE

AREA = "regressions"
DEVICE = 0x20000000
"""No slot is there."""
UNMAPPED = 0x100000000
"""The guest's page tables end before it."""
NOT_CANONICAL = 1 << 62


def guest(group: str, asm: str, rdi: int = DEVICE, rsi: int = FREE, rcx: int = 2, rax: int = 0x41, **more: int) -> Step:
    """Put a program into the guest."""
    return step("guest", group=group, asm=asm, rdi=rdi, rsi=rsi, rcx=rcx, rax=rax, **more)


def run(count: int = 1, **more: object) -> Step:
    """KVM_RUN; reads of devices are answered."""
    return step("run", count=count, answer=7, **more)


def state(kind: str, **changes: int) -> Step:
    """Set a structure with some fields changed, and leave it so; ``__`` in a name is a dot."""
    pairs = [[path.replace("__", "."), value] for path, value in changes.items()]
    return step("state", kind=kind, changes=pairs, restore=False)


def msr(*values: tuple[int, int]) -> Step:
    """KVM_SET_MSRS, and what each is then."""
    return step("msrs", values=[list(pair) for pair in values])


SHOW_REGS: Final = step("show", kind="regs")
SHOW_EVENTS: Final = step("show", kind="events")

REGRESSIONS: Final[dict[str, tuple[str, list[Step]]]] = {
    "movbe_device": (
        "MOVBE swaps bytes on its way to a device too, aligned or not.",
        [
            guest("moves", "movbe [rdi], rbx"),
            run(2),
            guest("moves", "movbe rax, [rdi]"),
            run(3),
            guest("moves", "movbe rax, [rdi]", DEVICE + 3),
            run(3),
        ],
    ),
    "narrow_device_read": (
        "Of an answer in kvm_run only as many bytes count as were asked for.",
        [
            guest("moves", "movzx eax, byte ptr [rdi]"),
            run(3),
            guest("moves", "movzx eax, word ptr [rdi]"),
            run(3),
            guest("moves", "movsx rax, byte ptr [rdi]"),
            run(3),
        ],
    ),
    "cmpxchg8b_device": (
        "CMPXCHG8B of an unaligned place of a device reads exactly that.",
        [
            guest("locked", "cmpxchg8b [rdi]", DEVICE + 2),
            run(3),
            guest("locked", "cmpxchg8b [rdi]", DEVICE - 4),
            run(5),
        ],
    ),
    "not_emulated": (
        "Instructions that KVM's emulator does not have end in an internal error where they meet a device.",
        [
            part
            for asm in ("popcnt rax, [rdi]", "crc32 rax, qword ptr [rdi]")
            for part in (guest("arithmetic", asm), run(2))
        ],
    ),
    "sysenter_long_mode": (
        "SYSENTER in 64-bit mode is no instruction of AMD's, and KVM gives it up.",
        [guest("system", "sysenter"), run(2)],
    ),
    "interrupt_without_if": (
        "KVM_INTERRUPT without an in-kernel irqchip is delivered whatever IF says.",
        [guest("system", "cli; nop"), step("interrupt", irq=0x30), run(2), SHOW_EVENTS],
    ),
    "nmis": (
        "Two NMIs wait, one while NMIs are blocked; an injected one blocks them.",
        [
            step("nmi"),
            step("nmi"),
            step("nmi"),
            SHOW_EVENTS,
            guest("system", "cli; nop"),
            run(2),
            SHOW_EVENTS,
            step("nmi"),
            SHOW_EVENTS,
            state("events", nmi__masked=1, nmi__injected=1, nmi__pending=0),
            run(1),
            SHOW_EVENTS,
        ],
    ),
    "interrupt_and_nmi": (
        "An injected interrupt is delivered before an NMI that waits.",
        [guest("system", "cli; nop"), step("interrupt", irq=0x30), step("nmi"), run(2), SHOW_REGS],
    ),
    "soft_interrupt": (
        "A software interrupt that user space injects is the instruction's at RIP, and none without it.",
        [
            state("events", interrupt__injected=1, interrupt__nr=0x30, interrupt__soft=1),
            run(2),
            SHOW_EVENTS,
            guest("system", "int 0x30"),
            state("events", interrupt__injected=1, interrupt__nr=0x30, interrupt__soft=1),
            run(2),
            SHOW_REGS,
        ],
    ),
    "nmi_in_shadow": (
        "An NMI that STI's shadow blocks waits until an instruction was stepped over, which HLT never is.",
        [
            guest("system", "hlt"),
            state("events", flags=12, interrupt__shadow=1, nmi__pending=1),
            run(3),
            SHOW_EVENTS,
            step("interrupt", irq=0x30),
            run(2),
            guest("system", "cli; nop"),
            state("events", flags=13, interrupt__shadow=1, nmi__pending=1, nmi__masked=0),
            run(2),
            SHOW_REGS,
        ],
    ),
    "outs_ends_shadow": (
        "OUTS, which KVM emulates, ends STI's shadow, so that an NMI that waited comes with the next entry.",
        [
            guest("ports", "rep outsd", rsi=FREE, rcx=3),
            run(1),
            state("events", flags=12, interrupt__shadow=1, nmi__pending=1),
            run(4),
            SHOW_REGS,
        ],
    ),
    "outs_over_pages": (
        "OUTS over the end of a page: the second page's fault comes before the first page's device.",
        [guest("ports", "outsd", rsi=UNMAPPED - 2), run(3), SHOW_REGS],
    ),
    "events_refused_last": (
        "KVM_SET_VCPU_EVENTS that fails for the triple fault has set all else, but nothing looks at it.",
        [
            state("events", flags=0x20, exception__injected=1, exception__nr=6),
            run(2),
            SHOW_EVENTS,
            state("events", flags=0x20, exception__injected=1, exception__nr=6),
            step("nmi"),
            run(2),
            SHOW_EVENTS,
        ],
    ),
    "set_tpr": (
        "A guest that lowers CR8 exits.",
        [
            guest("system", "mov cr8, rcx; mov rax, cr8", rcx=9),
            run(2, cr8=0),
            guest("system", "mov cr8, rcx; mov rax, cr8", rcx=3),
            run(3),
        ],
    ),
    "mtrr_values": (
        "MTRRs take memory types that there are, and no reserved bits.",
        [
            msr((0x200, 0x106)),
            msr((0x200, 2)),
            msr((0x201, 0x400)),
            msr((0x250, 0x0202020202020202)),
            msr((0x258, 3)),
            msr((0x2FF, 0xC02)),
            msr((0x2FF, 0xC06), (0x200, 0x1006), (0x201, 0xFF00000800)),
        ],
    ),
    "msr_values": (
        "What MSRs make of values: SYSENTER's addresses, TSC_AUX, SFMASK, HWCR, MCG_STATUS, EFER.",
        [
            msr((0x174, 1 << 32 | 8)),
            msr((0x175, 0xFFFF800000000000), (0x176, NOT_CANONICAL)),
            msr((0xC0000103, 1 << 32 | 5)),
            msr((0xC0000084, (1 << 64) - 1)),
            msr((0xC0010015, 0x1000018)),
            msr((0xC0010015, 1)),
            msr((0x17A, 8)),
            msr((0xC0000080, 1 << 63 | 0xD00)),
        ],
    ),
    "debugregs_as_given": (
        "KVM_SET_DEBUGREGS keeps what it is given, bits that are always 1 too.",
        [state("debugregs", dr6=0x4000), state("debugregs", dr7=0)],
    ),
    "segments_as_read": (
        "What SVM does not keep of a segment: G follows the limit, a loaded data segment is accessed.",
        [
            state("sregs", es__limit=0xFFFF, gs__g=0, ds__type=2),
            state("sregs", ss__unusable=1),
            state("sregs", fs__limit=0x100000, fs__g=0),
        ],
    ),
    "translate_not_canonical": (
        "KVM_TRANSLATE looks at 48 bits of an address.",
        [step("translate", address=1 << 63 | TEST), step("translate", address=1 << 47)],
    ),
    "ins_count": (
        "REP INS asks for as many items as the page has bytes, backwards too, and writes backwards one by one.",
        [
            guest("ports", "rep insw", FREE + PAGE - 4, rcx=9),
            run(2),
            guest("ports", "std; rep insb; cld", FREE + 8, rcx=3),
            run(2),
            guest("ports", "std; rep insb; cld", DEVICE + 8, rcx=3),
            run(4),
        ],
    ),
    "rep_resume_flag": (
        "RF is set while KVM's emulator is in a REP instruction.",
        [
            guest("string", "rep stosb"),
            run(1),
            SHOW_REGS,
            run(1),
            SHOW_REGS,
            guest("ports", "rep outsb", rsi=FREE),
            run(1),
            SHOW_REGS,
        ],
    ),
    "locked_crossing_read_only": (
        "A locked access over a page boundary of a read-only slot is a device access, whatever the host has there.",
        [
            step("slot", slot=1, gpa=TEST, size=4 * PAGE, buffer=2, page=0, flags=c.KVM_MEM_READONLY),
            step("truncate", pages=0),
            guest("locked", "lock add [rdi], rbx", TEST + PAGE - 1),
            run(5),
        ],
    ),
    "ins_completion_faults": (
        "A fault in the completion of INS is queued, and delivered by the next entry.",
        [
            guest("ports", "insb", UNMAPPED),
            run(1),
            run(1, immediate=True),
            SHOW_REGS,
            SHOW_EVENTS,
            run(1),
        ],
    ),
    "instruction_bytes": (
        "Behind the bytes of an instruction that could not be fetched whole is NOP.",
        [
            step("slot", slot=1, gpa=TEST, size=PAGE, buffer=0, page=8),
            guest("jumps", "jmp rdi", TEST + PAGE - 1),
            run(1),
        ],
    ),
    "string_io_replaced": (
        "Code that takes the place of string I/O is seen, though its first byte is the same.",
        [
            guest("ports", "std; rep insb; cld", FREE + 0x100),
            run(1),
            guest("string", "std; rep movsb; cld", FREE + 0x100, FREE + PAGE, rcx=1),
            run(2),
        ],
    ),
    "soft_exceptions": (
        "An injected #BP is dropped where no INT3 is, and else reports from behind it.",
        [
            guest("system", "cli; nop"),
            state("events", exception__injected=1, exception__nr=3),
            run(1),
            guest("system", "int3"),
            state("events", exception__injected=1, exception__nr=3),
            run(1),
            SHOW_REGS,
        ],
    ),
    "rep_completion_goes_on": (
        "The completion of a device read goes on with the next items of a REP, and with the port of OUTS.",
        [
            guest("string", "rep movsd", FREE + 0x100, DEVICE, rcx=3),
            run(1),
            run(4, immediate=True),
            SHOW_REGS,
            guest("ports", "rep outsw", rsi=DEVICE, rcx=2),
            run(1),
            run(2, immediate=True),
            guest("ports", "rep outsw", rsi=DEVICE, rcx=2),
            run(3),
        ],
    ),
    "fault_before_device_read": (
        "A read over a page boundary whose second page is not mapped faults before the device is read.",
        [guest("moves", "mov ax, [rdi]", UNMAPPED - 1), run(2)],
    ),
    "registers_as_given": (
        "KVM_SET_REGS and KVM_SET_SREGS keep reserved bits of RFLAGS, and CR0.ET as it is given.",
        [state("regs", rflags=0xFFFFFFFF), state("regs", rflags=0x8), state("sregs", cr0=0x80000001)],
    ),
    "microcode_revision": (
        "What MSR_IA32_UCODE_REV is in a new vCPU of AMD's.",
        [msr((0x12345678, 0), (0x8B, 5))],
    ),
    "sregs_after_cpuid": (
        "Without CPUID there is no EFER.LME to set.",
        [step("set_cpuid", count=0, entry=0, field="eax", flip=0), state("sregs", cr2=5), state("sregs2", cr2=5)],
    ),
    "triple_fault_event": (
        "KVM_VCPUEVENT_VALID_TRIPLE_FAULT without its capability is found last: what else there is has been set.",
        [state("events", flags=0x20, nmi__injected=1)],
    ),
    "nmi_behind_exception": (
        "An NMI that waits is delivered at the first instruction of an injected exception's handler.",
        [
            guest("system", "cli; nop"),
            step("nmi"),
            state("events", exception__injected=1, exception__nr=13, exception__has_error_code=1),
            run(2),
            SHOW_REGS,
        ],
    ),
    "failed_iret_unblocks_nmis": (
        "SVM's KVM takes an IRET that faults for one.",
        [
            state("events", nmi__masked=1),
            guest("memory_only", "mov rsp, rdi; iretq", FREE + 0x100),
            run(2),
            SHOW_EVENTS,
        ],
    ),
    "cr8_over_init": (
        "A triple fault's INIT leaves CR8.",
        [run(1, cr8=5), step("registers", changes=[["rsp", UNMAPPED + PAGE]]), step("nmi"), run(1, cr8=5)],
    ),
    "nmi_blocked_over_init": (
        "NMIs stay blocked when a triple fault has reset the vCPU.",
        [
            step("registers", changes=[["rsp", UNMAPPED + PAGE]]),
            step("nmi"),
            run(1),
            SHOW_EVENTS,
        ],
    ),
    "events_flags": (
        "KVM_GET_VCPU_EVENTS: the SMM fields are there, the shadow is of both kinds, #BP is never injected.",
        [
            SHOW_EVENTS,
            state("events", interrupt__shadow=1),
            state("events", exception__injected=1, exception__nr=3, interrupt__shadow=0),
        ],
    ),
}
"""Name -> what it is about, and the steps."""


def _body(steps: list[Step]) -> Body:
    return lambda lab: perform(lab, "plain", steps)


for _name, (_about, _steps) in REGRESSIONS.items():
    scenario(f"regression_{_name}", area=AREA)(_body(_steps))


@scenario("regression_new_vcpu", area=AREA)
def new_vcpu(lab: Lab) -> None:
    """What a vCPU has before anybody sets it: RDX, the x87 control word."""
    m = lab.machine()
    lab.note("regs", rdx=hex(m.vcpu.get_regs().rdx))
    fpu = m.vcpu.get_fpu()
    lab.note("fpu", fcw=hex(fpu.fcw), ftwx=fpu.ftwx, mxcsr=hex(fpu.mxcsr))
