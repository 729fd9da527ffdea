"""A guest to try things in: 64-bit mode, page tables, a GDT with user segments, a TSS, an IDT whose handlers report.

Each handler sends its vector to port 0x80. It sends the error code (0 where there is none), CR2 and RIP to port 0x81,
as 32-bit halves. Then it halts. ``Machine.trap`` reads that back.
"""

from __future__ import annotations

import functools
import struct
from types import TracebackType
from typing import Self

from anykvm.abi.structures import kvm_segment, kvm_sregs
from anykvm.api import GuestMemory, Hlt, Io, Kvm, Vcpu, Vm
from anykvm.testing.assembler import assemble
from anykvm.vmm.modes import flat_segment

#: Guest-physical and linear addresses of what the guest has.
CODE, STACK, DATA = 0x1000, 0x70000, 0x60000
GDT, IDT, TSS, HANDLERS, PML4 = 0x4000, 0x5000, 0x6000, 0x20000, 0x10000
IST1, RSP0 = 0x84000, 0x80000
#: Selectors.
KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TSS_SEL = 0x08, 0x10, 0x1B, 0x23, 0x28
WITH_ERROR = {8, 10, 11, 12, 13, 14, 17}
PORT_VECTOR, PORT_DETAIL = 0x80, 0x81


@functools.cache
def _handler(vector: int) -> bytes:
    error = "pop %rbx" if vector in WITH_ERROR else "xor %ebx, %ebx"
    return assemble(
        f"""{error}
        mov ${vector}, %al; out %al, $0x80
        mov %ebx, %eax; out %eax, $0x81
        mov %cr2, %rax; out %eax, $0x81; shr $32, %rax; out %eax, $0x81
        mov (%rsp), %rax; out %eax, $0x81; shr $32, %rax; out %eax, $0x81
        hlt""",
        HANDLERS,
    )


class Trap:
    """What a handler reported: vector, error code, CR2, and the RIP it was entered with."""

    def __init__(self, vector: int, error: int, cr2: int, rip: int) -> None:
        """Make one."""
        self.vector, self.error, self.cr2, self.rip = vector, error, cr2, rip

    def __repr__(self) -> str:
        """Show the fields."""
        return f"Trap(vector={self.vector}, error={self.error:#x}, cr2={self.cr2:#x}, rip={self.rip:#x})"


class Machine:
    """One vCPU in 64-bit mode over ``size`` bytes of memory at gpa 0, mapped one to one by 2 MiB pages.

    >>> import anykvm
    >>> with anykvm.open("soft") as kvm, Machine(kvm) as m:
    ...     m.long_mode("mov 0x800000, %al")  # a page that no memslot has, so a device's
    ...     m.vcpu.run()
    Mmio(phys_addr=0x800000, data=b'', len=1, is_write=False)
    """

    def __init__(self, kvm: Kvm, size: int = 4 << 20, type: int = 0) -> None:
        """Make the VM (of KVM_X86_*_VM ``type``), its memory and its vCPU. Raises OSError as KVM refuses."""
        self.kvm = kvm
        self.memory = GuestMemory(size)
        self.vm: Vm = self.create_vm(kvm, type)
        self.slot = self.vm.map(self.memory, 0)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(kvm.get_supported_cpuid())
        self.extra: list[Vcpu] = []

    def create_vm(self, kvm: Kvm, type: int) -> Vm:
        """Make the VM. A subclass may set it up here, before it has a slot or a vCPU."""
        return kvm.create_vm(type)

    def __enter__(self) -> Self:
        """Close it at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Close the VM and its memory."""
        self.vm.close()
        self.memory.close()

    def quads(self, at: int, *values: int) -> None:
        """Write 64-bit values into guest memory."""
        self.memory.write(at, struct.pack(f"<{len(values)}Q", *values))

    def long_mode(self, source: str, cpl: int = 0, rflags: int = 2, cr0: int = 0x80010033) -> None:
        """Load assembled ``source`` at ``CODE`` and stand there in ring ``cpl``, with all tables made anew."""
        self.memory.write(CODE, assemble(source, CODE))
        self._tables()
        sregs = self.vcpu.get_sregs()
        self._segments(sregs, cpl)
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = cr0, PML4, 0x620, 0xD01
        self.vcpu.set_sregs(sregs)
        self.set_regs(rip=CODE, rsp=STACK, rflags=rflags)

    def _tables(self) -> None:
        self.quads(PML4, (PML4 + 0x1000) | 7)
        self.quads(PML4 + 0x1000, (PML4 + 0x2000) | 7)
        self.quads(PML4 + 0x2000, *((i << 21) | 0x87 for i in range(512)))
        user = (0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
        self.quads(GDT, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, *user, 0x0000890060000067, 0)
        self.quads(TSS + 4, RSP0)
        self.quads(TSS + 0x24, IST1)
        self.memory.write(TSS + 0x66, struct.pack("<H", 0x68))  # no I/O permission bitmap
        for vector in range(256):
            self.gate(vector)
            if vector < 32:
                self.memory.write(HANDLERS + vector * 64, _handler(vector))

    def gate(self, vector: int, target: int | None = None, dpl: int = 3, ist: int = 0) -> None:
        """Point a vector at ``target``, or at its reporting handler."""
        at = HANDLERS + (vector % 32) * 64 if target is None else target
        low = (at & 0xFFFF) | KERNEL_CS << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | (at >> 16 & 0xFFFF) << 48
        self.quads(IDT + 16 * vector, low, at >> 32)

    def _segments(self, sregs: kvm_sregs, cpl: int) -> None:
        data = segment(USER_DS if cpl else KERNEL_DS, 3, cpl)
        sregs.cs = segment(USER_CS if cpl else KERNEL_CS, 11, cpl, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, data)
        sregs.tr = kvm_segment(base=TSS, limit=0x67, selector=TSS_SEL, type=11, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, 0x37
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF

    def set_regs(self, **values: int) -> None:
        """Change some general registers."""
        regs = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def run_to_halt(self) -> None:
        """Run to the next HLT. Raises AssertionError for another exit."""
        exit = self.vcpu.run()
        if exit != Hlt():
            raise AssertionError(exit)

    def trap(self) -> Trap:
        """Run into an exception and read the handler's report. Raises AssertionError for an exit that is none of it."""
        values = []
        while isinstance(exit := self.vcpu.run(), Io):
            values.append(int.from_bytes(exit.data, "little"))
        if exit != Hlt() or len(values) != 6:
            raise AssertionError((exit, values, hex(self.vcpu.get_regs().rip)))
        return Trap(values[0], values[1], values[2] | values[3] << 32, values[4] | values[5] << 32)


def segment(selector: int, type: int, dpl: int, long: int = 0) -> kvm_segment:
    """Make a flat segment; ``type`` is the descriptor's (11: code, 3: data)."""
    return flat_segment(selector, type, dpl=dpl, long=bool(long))
