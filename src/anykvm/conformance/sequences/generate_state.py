"""Generated steps on the vCPU's state, with values that KVM takes and values that it refuses."""

from __future__ import annotations

from typing import Any, Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.conformance.layout import TEST
from anykvm.conformance.sequences.choose import Choose
from anykvm.conformance.sequences.generate_guest import address, runs
from anykvm.conformance.sequences.step import Step, step

_NOT_CANONICAL: Final = 1 << 47
_NEVER_CANONICAL: Final = 1 << 62
"""With 57-bit addresses neither: KVM asks the host's processor, not the guest's, for MSRs that user space sets."""
_KERNEL: Final = 0xFFFF800000000000

_SREGS: Final[dict[str, list[int]]] = {
    "cr0": [0x80050033, 0x80000001, 0x80000000, 0x11, 0x10, 0x60000011, 0x20000011, 0x40000011, 0x33, 1 << 32 | 0x11,
            0x80050033 | 1 << 63, 0x8005003B, 0x80010033],
    "cr2": [5, 1 << 63],
    "cr3": [0, 0x1000, 0x1018, 0x1FFF, 1 << 40, 1 << 52, 1 << 63, 0x1000 | 1 << 39, (1 << 64) - 1],
    "cr4": [0, 0x20, 0x620, 0x6A0, 0x7FF, 0x820, 0x1620, 0x2620, 0x10620, 0x20620, 0x40620, 0x100620, 0x200620,
            0x400620, 0x800620, 0x80000620, 1 << 63 | 0x620],
    "efer": [0, 1, 0x100, 0x400, 0x500, 0x501, 0xD00, 0xD01, 0x800, 0x900, 2, 1 << 63 | 0xD00, 1 << 9],
    "apic_base": [0, 0xFEE00000, 0xFEE00800, 0xFEE00900, 0xFEE00C00, 0xFEE00400, 0xFEE00801, 0xFEE00200, 1 << 40,
                  0x800, 0x1FEE00900],
    "cr8": [0, 1, 15, 16, 1 << 63],
    "cs.l": [0],
    "cs.db": [1],
    "cs.dpl": [3],
    "cs.type": [0, 3, 9, 13],
    "cs.present": [0],
    "ss.dpl": [3],
    "ss.unusable": [1],
    "ds.base": [0x1000, 1 << 47, 1 << 63, 1 << 32],
    "fs.base": [TEST, _NOT_CANONICAL, _KERNEL],
    "gs.base": [TEST, _NOT_CANONICAL, _KERNEL],
    "es.limit": [0, 0xFFFF, 0xFFFFFFFF],
    "fs.selector": [0, 3, 0xFFFF],
    "ds.avl": [1],
    "gs.g": [0],
    "tr.type": [3, 9, 11],
    "tr.base": [_NOT_CANONICAL, 0x2000],
    "tr.present": [0],
    "ldt.base": [0x5000, _KERNEL],
    "ldt.present": [1],
    "ldt.type": [2, 0],
    "gdt.base": [0, _NOT_CANONICAL, 1 << 63],
    "gdt.limit": [0, 0xFFFF],
    "idt.limit": [0, 0xFFFF],
    "idt.base": [_KERNEL],
}  # fmt: skip
_OTHERS: Final[dict[str, dict[str, list[int]]]] = {
    "regs": {
        "rax": [1, (1 << 64) - 1],
        "r15": [7],
        "rsp": [_NOT_CANONICAL],
        "rip": [0, _NOT_CANONICAL, (1 << 64) - 1, 0x10000],
        "rflags": [0, 2, 0x202, 0xFFFFFFFF, (1 << 64) - 1, 0x8, 0x20000, 0x10000, 0x3000, 0x40000, 0x200000],
    },
    "sregs2": {
        "flags": [1, 2, 1 << 63],
        "pdptrs.0": [1, 1 << 40],
        "cr4": [0x20, 0x80000620],
        "efer": [0, 0xD01],
        "apic_base": [0xFEE00400, 0xFEE00800],
    },
    "fpu": {
        "fcw": [0, 0x37F, 0x27F, 0xFFFF],
        "fsw": [0x3800, 0x41, 0xFFFF],
        "ftwx": [0xFF, 1, 0x80],
        "last_opcode": [0x7FF, 0xFFFF],
        "last_ip": [5, 1 << 63],
        "mxcsr": [0, 0x1F80, 0xFFFF, 0x10000],
        "xmm.0.0": [5],
        "xmm.15.15": [0x80],
        "fpr.0.0": [1],
        "fpr.7.9": [0x80],
    },
    "debugregs": {
        "db.0": [0x10000, 1 << 63, _NOT_CANONICAL],
        "db.3": [5],
        "dr6": [0, 0xFFFF0FF0, 0xFFFF0FFF, 0xFFFFFFFF, 1 << 32, 0x4000],
        "dr7": [0, 0x400, 0x401 & ~1, 0x2400, 0xFC00, 0xFFFFFF00, 1 << 32, 0x700],
        "flags": [1, 1 << 63],
    },
    "mp_state": {"mp_state": [*range(11), 0xFFFFFFFF]},
    "xcrs": {
        "nr_xcrs": [0, 1, 2, 16, 17, 0xFFFFFFFF],
        "flags": [1],
        "xcrs.0.xcr": [0, 1, 2],
        "xcrs.0.value": [0, 1, 2, 3, 5, 7, 0xB, 1 << 63],
    },
    "events": {
        "flags": [0, 1, 2, 4, 8, 15, 0x10, 0x20, 0x40, 1 << 31],
        "interrupt.injected": [1],
        "interrupt.nr": [0x20, 0, 255],
        "interrupt.soft": [1],
        "interrupt.shadow": [0, 1, 2, 3],
        "nmi.injected": [1],
        "nmi.pending": [1, 2],
        "nmi.masked": [1],
        "sipi_vector": [5],
        "triple_fault.pending": [1],
    },
}
_MSRS: Final[dict[int, list[int]]] = {
    0x1B: [0xFEE00900, 0xFEE00800, 0xFEE00D00, 0xFEE00400, 1 << 40, 0xFEE00901],
    0x8B: [0, 1 << 32, 0x1000065 << 32],
    0x174: [0, 8, 0xFFFF, 1 << 32, (1 << 64) - 1],
    0x175: [0, _KERNEL, _NEVER_CANONICAL, 5],
    0x176: [0, _KERNEL, _NEVER_CANONICAL, 5],
    0x200: [0, 6, 0x1006, 1 << 40, 0x7, 2, 0x106],
    0x201: [0, 0x800, 0xFF00000800, 1 << 40, 0x400],
    0x20F: [0, 0xFF00000800],
    0x250: [0, 0x0606060606060606, 0x0202020202020202, 0x0707070707070707],
    0x258: [0x0101010101010101, 0x0606060606060605, 3],
    0x26F: [0x0404040404040404, 0xFF],
    0x277: [0, 0x0007040600070406, 0x0606060606060606, 0x0202020202020202, 0x0808080808080808, 3],
    0x2FF: [0, 6, 0xC06, 0xC00, 0x400, 0x800, 2, 7, 0x1006, 0xC02],
    0xC0000081: [0, 0x23001000000000, (1 << 64) - 1],
    0xC0000082: [0, _KERNEL, _NEVER_CANONICAL],
    0xC0000083: [0, _KERNEL, _NEVER_CANONICAL],
    0xC0000084: [0, 0x47700, 1 << 32, (1 << 64) - 1],
    0xC0000100: [0, TEST, _KERNEL, _NEVER_CANONICAL],
    0xC0000101: [0, TEST, _KERNEL, _NEVER_CANONICAL],
    0xC0000102: [0, TEST, _KERNEL, _NEVER_CANONICAL],
    0xC0000103: [0, 5, 1 << 32],
    0xC0000080: [0xD00, 0xD01, 0x500, 0xC00, 0, 2, 1 << 63, 0x900],
    0xC0010015: [0, 0x1000000, 1, 0x18, 1 << 31, 1 << 40],
    0x12345678: [0],
    0xFE: [0x508, 0],
    0x17A: [0, 7, 8],
}
_INJECTED: Final = ("interrupt.injected", "nmi.injected", "exception.injected", "exception.pending")


def structure(choose: Choose) -> list[Step]:
    """Set a structure with one to three odd fields, and set it back."""
    kind = choose.weighted({"sregs": 8, **dict.fromkeys(_OTHERS, 1.5)})
    palette = _SREGS if kind == "sregs" else _OTHERS[kind]
    changes: list[list[Any]] = []
    for _ in range(choose.of([1, 1, 2, 3])):
        field = choose.of(list(palette))
        changes.append([field, choose.of(palette[field])])
    return [step("state", kind=kind, changes=changes)]


def msrs(choose: Choose) -> list[Step]:
    """Set some MSRs in one call, and set them back."""
    chosen = {index: choose.of(_MSRS[index]) for index in [choose.of(list(_MSRS)) for _ in range(choose.of([1, 2, 3]))]}
    return [step("msrs", values=[[index, value] for index, value in chosen.items()])]


def cpuid(choose: Choose) -> list[Step]:
    """Read the CPUID table, or set the same or another."""
    if choose.chance(0.4):
        return [step("get_cpuid", count=choose.of([0, 1, 15, 16, 17, 100, 256]))]
    count = choose.of([16, 16, 16, 15, 17, 0, 256, 257])
    field = choose.of(["eax", "ebx", "ecx", "edx", "index", "flags"])
    flip = choose.weighted({0: 3, 1: 1, 1 << 9: 1, 1 << 27: 1, 1 << 31: 0.5})
    return [step("set_cpuid", count=count, entry=choose.below(16), field=field, flip=flip)]


def translate(choose: Choose) -> list[Step]:
    """KVM_TRANSLATE."""
    return [step("translate", address=choose.of([address(choose), address(choose), 1 << 63, (1 << 64) - 1]))]


def vm_numbers(choose: Choose) -> list[Step]:
    """Ioctls that take a number, and capabilities.

    No vCPU id is tried between the two sides' limits, and no TSC frequency, which is the machine's.
    """
    kind = choose.weighted({"number": 4, "cap": 4, "vcpu": 1, "pointer": 0.7})
    if kind == "number":
        request, values = choose.of(
            [
                (n.KVM_SET_TSS_ADDR, [0, 0xFFFBD000, 0xFFFFD000, 0xFFFFE000, 1 << 32]),
                (n.KVM_SET_NR_MMU_PAGES, [0, 19, 20, 63, 64, 1000]),
                (n.KVM_SET_BOOT_CPU_ID, [0, 1]),
            ]
        )
        return [step("number", request=request, value=choose.of(values))]
    if kind == "pointer":
        return [step("pointer", request=n.KVM_SET_IDENTITY_MAP_ADDR, value=choose.of([0, 0xFFFBC000]))]
    if kind == "vcpu":
        return [step("create_vcpu", id=choose.of([0, 1, 2, 1 << 16, 1 << 31, 0xFFFFFFFF]))]
    cap = choose.of(
        [
            c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            c.KVM_CAP_DIRTY_LOG_RING,
            c.KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
            c.KVM_CAP_MEMORY_FAULT_INFO,
            c.KVM_CAP_EXIT_HYPERCALL,
            c.KVM_CAP_GUEST_MEMFD,
            c.KVM_CAP_USER_MEMORY2,
            9999,
        ]
    )
    arg = choose.of([0, 1, 2, 3, 4, 1 << 12, 1 << 32, 0x800, 0x1000, 4095, 1 << 21])
    return [step("cap", cap=cap, flags=choose.weighted({0: 5, 1: 1}), arg=arg, vcpu=choose.chance(0.15))]


def refused(choose: Choose) -> list[Step]:
    """Requests that nobody has, or not there."""
    request = choose.of([0xAEFF, 0xAE00, 0xAE01, 0xAE80, 0x4020AE46, n.KVM_GET_REGS, 0x1234, 0, 0xC008AE05])
    on_vcpu = choose.chance(0.5)
    if on_vcpu and request in (0xAE80, n.KVM_GET_REGS):
        request = 0xAEFF
    return [step("number", request=request, value=choose.of([0, 8]), vcpu=on_vcpu)]


def events(choose: Choose) -> list[Step]:
    """Set events, and leave them so; then run."""
    several = choose.chance(0.3)
    one = choose.of(["interrupt.injected", "nmi.injected", "exception"])
    unwanted = {field for field in _INJECTED if not (field == one or (several and not field.startswith("exception")))}
    palette = {field: values for field, values in _OTHERS["events"].items() if field not in unwanted}
    fields = [choose.of(list(palette)) for _ in range(choose.between(1, 3))]
    changes = [[field, choose.of(palette[field])] for field in fields]
    changes += [[field, 0] for field in _INJECTED if field in unwanted]
    if several:
        changes += [["nmi.injected", int(choose.chance(0.4))], ["interrupt.injected", int(choose.chance(0.6))]]
    if one == "exception":
        changes += _exception(choose)
    if ["interrupt.injected", 1] in changes:
        changes = [pair for pair in changes if pair[0] != "interrupt.soft"]
        if all(pair[0] != "interrupt.nr" for pair in changes):
            changes.append(["interrupt.nr", 0x40])  # not that of an earlier one
    return [step("state", kind="events", changes=changes, restore=choose.chance(0.3)), runs(choose)]


def _exception(choose: Choose) -> list[list[Any]]:
    """All of an exception: what is not set would be what the kernel kept of an earlier one."""
    vector = choose.of([0, 2, 3, 6, 8, 13, 14, 17, 32, 255])
    error = int(vector in (8, 13, 14, 17))
    return [
        ["exception.injected", int(choose.chance(0.8))],
        ["exception.pending", int(choose.chance(0.3))],
        ["exception.nr", vector],
        ["exception.has_error_code", error],
        ["exception.error_code", error and choose.of([0, 5, 0xFFFFFFFF])],
        ["exception_payload", 0],
    ]


def inject(choose: Choose) -> list[Step]:
    """KVM_INTERRUPT or KVM_NMI, and run."""
    kind = choose.weighted({"interrupt": 3, "nmi": 2})
    if kind == "nmi":
        return [step("nmi"), runs(choose)]
    return [step("interrupt", irq=choose.of([0x20, 0x21, 3, 0, 255, 256, 1 << 31])), runs(choose)]


def signal_mask(choose: Choose) -> list[Step]:
    """KVM_SET_SIGNAL_MASK."""
    length = choose.weighted({8: 5, 0: 2, 4: 0.5, 16: 0.5})
    # SIGALRM, which ends a run that takes too long, is never masked.
    return [step("signal_mask", length=length, mask=choose.of([0, 1 << 9]))]
