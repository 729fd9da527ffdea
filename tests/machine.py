"""A long-mode machine for tests: GDT with user segments, TSS, IDT whose handlers report, and an assembler.

Every handler sends its vector to port 0x80, the error code (if there is one) and CR2 to port 0x81 as 32-bit halves,
and halts: `Machine.trap()` reads that back. Guest code is assembled by GNU as, which comes with the compiler.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from anykvm import GuestMemory, Hlt, Io, Kvm, Vcpu, Vm
from anykvm.abi.structures import kvm_segment, kvm_sregs

CODE, STACK, DATA = 0x1000, 0x70000, 0x60000
GDT, IDT, TSS, HANDLERS, PML4 = 0x4000, 0x5000, 0x6000, 0x20000, 0x10000
IST1, RSP0 = 0x84000, 0x80000
KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TSS_SEL = 0x08, 0x10, 0x1B, 0x23, 0x28
WITH_ERROR = {8, 10, 11, 12, 13, 14, 17}
PORT_VECTOR, PORT_DETAIL = 0x80, 0x81


@functools.cache
def assemble(source: str, org: int = CODE, bits: int = 64) -> bytes:
    """Assemble AT&T source at an address."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "a.s").write_text(f".code{bits}\n.globl _start\n_start:\n{source}\n")
        subprocess.run(["as", "--64", "-o", at / "a.o", at / "a.s"], check=True, capture_output=True)
        link = ["ld", "-Ttext", hex(org), "--oformat", "binary", "-o", at / "a.bin", at / "a.o"]
        subprocess.run(link, check=True, capture_output=True)
        return (at / "a.bin").read_bytes()


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
    """What a handler reported."""

    def __init__(self, vector: int, error: int, cr2: int, rip: int) -> None:
        self.vector, self.error, self.cr2, self.rip = vector, error, cr2, rip

    def __repr__(self) -> str:
        return f"Trap(vector={self.vector}, error={self.error:#x}, cr2={self.cr2:#x}, rip={self.rip:#x})"


class Machine:
    """One vCPU in 64-bit mode over `size` bytes of memory at gpa 0, mapped one to one by 2 MiB pages."""

    def __init__(self, kvm: Kvm, size: int = 4 << 20, type: int = 0) -> None:
        self.kvm = kvm
        self.memory = GuestMemory(size)
        self.vm: Vm = self.create_vm(kvm, type)
        self.slot = self.vm.map(self.memory, 0)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(kvm.get_supported_cpuid())
        self.extra: list[Vcpu] = []

    def create_vm(self, kvm: Kvm, type: int) -> Vm:
        """Before it has a slot or a vCPU."""
        return kvm.create_vm(type)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.vm.close()
        self.memory.close()

    def quads(self, at: int, *values: int) -> None:
        self.memory.write(at, struct.pack(f"<{len(values)}Q", *values))

    def long_mode(self, source: str, cpl: int = 0, rflags: int = 2, cr0: int = 0x80010033) -> None:
        """Load assembled source at CODE and stand there in ring `cpl`."""
        self.memory.write(CODE, assemble(source))
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
        regs = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def run_to_halt(self) -> None:
        exit = self.vcpu.run()
        assert exit == Hlt(), exit

    def trap(self) -> Trap:
        """Run into an exception and read the handler's report."""
        values = []
        while isinstance(exit := self.vcpu.run(), Io):
            values.append(int.from_bytes(exit.data, "little"))
        assert exit == Hlt() and len(values) == 6, (exit, values, hex(self.vcpu.get_regs().rip))
        return Trap(values[0], values[1], values[2] | values[3] << 32, values[4] | values[5] << 32)


def segment(selector: int, type: int, dpl: int, long: int = 0) -> kvm_segment:
    """A flat segment."""
    return kvm_segment(
        base=0, limit=0xFFFFFFFF, selector=selector, type=type, present=1, dpl=dpl, db=1 - long, s=1, l=long, g=1
    )
