"""One vCPU that executes cases. Its memory lies between canaries. Now and then it runs a program with known
results, which an engine that a case has written to would no longer get."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from random import Random
from types import FrameType

import anykvm
from anykvm import Io, Mmio
from anykvm.abi.structures import kvm_regs, kvm_vcpu_events
from instruction_fuzz.forms import Case
from instruction_fuzz.modes import BY_NAME, CODE, DATA, MODES, SIZE, STACK, image, special_registers
from instruction_fuzz.operands import INITIAL, floating, registers

PAGE = 4096
CANARY = bytes(range(256)) * 16
SLICE = 0.02
"""Seconds a guest may run."""
EXITS = 6
"""Of one case: device accesses are answered with 0."""
EVERY = 50
"""Cases between two looks at what must not change."""

# fld1; fldpi; fmulp; fistpll DATA; movq rax to xmm0; paddq; addsd; movq to memory; div; psadbw
REFERENCE = bytes.fromhex(
    "dbe3 d9e8 d9eb dec9 df3c2500000600 66480f6ec0 660fd4c0 f30f7ec8 f20f58c9 660fd60c2508000600"
    "48c7c202000000 48c7c3f9ffffff 48f7fb 4889042510000600 4889142518000600 660ff6c1 660fd6042520000600 f4"
)


class Broken(Exception):
    """What a case must not do."""


def ignore(number: int, frame: FrameType | None) -> None:
    """SIGALRM: it ends KVM_RUN, and that is all."""


class Bed:
    """A vCPU, whatever mode the next case wants. ``errors`` is the file that standard error goes to."""

    def __init__(self, errors: int) -> None:
        self.errors, self.errors_size = errors, os.fstat(errors).st_size
        self.memory = mmap.mmap(-1, SIZE + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.memory[:PAGE] = self.memory[-PAGE:] = CANARY
        self.kvm = anykvm.open("soft")
        self.vm = self.kvm.create_vm()
        self.vm.set_user_memory_region(0, 0, SIZE, self.address + PAGE)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.kvm.get_supported_cpuid())
        self.sregs = {mode.name: special_registers(mode, self.vcpu.get_sregs()) for mode in MODES}
        self.images = {mode.name: image(mode) for mode in MODES}
        self.events = kvm_vcpu_events()
        self.debugregs = self.vcpu.get_debugregs()
        signal.signal(signal.SIGALRM, ignore)
        signal.setitimer(signal.ITIMER_REAL, SLICE, SLICE)
        self.done = 0
        self.expected = self.reference()

    def load(self, mode: str, code: bytes) -> None:
        """Stand at the code in this mode, memory below IMAGE as ever."""
        picture = self.images[mode]
        ctypes.memmove(self.address + PAGE, picture, len(picture))
        ctypes.memmove(self.address + PAGE + CODE, code, len(code))
        self.vcpu.set_vcpu_events(self.events)
        self.vcpu.set_sregs(self.sregs[mode])
        self.vcpu.set_debugregs(self.debugregs)

    def reference(self) -> bytes:
        """The results of the program with known ones."""
        self.load("long0", REFERENCE)
        regs = kvm_regs(rip=CODE, rsp=STACK, rflags=2, rax=(1 << 63) + 0x3FF1_2345_6789_ABCD)
        self.vcpu.set_regs(regs)
        self.vcpu.set_xsave(INITIAL)
        exit = self.vcpu.run()
        while isinstance(exit, anykvm.Intr):
            exit = self.vcpu.run()
        rip = self.vcpu.get_regs().rip
        if not isinstance(exit, anykvm.Hlt) or rip != CODE + len(REFERENCE):
            raise Broken(f"the program with known results ends with {exit}, RIP {rip:#x}")
        return bytes(self.memory[PAGE + DATA : PAGE + DATA + 40])

    def execute(self, case: Case, seed: int) -> None:
        """Raise Broken if it has broken something that can be seen at once."""
        random = Random(f"{seed} {case.number} operands")
        mode = BY_NAME[case.mode]
        self.load(mode.name, case.code)
        self.vcpu.set_xsave(floating(random))
        self.vcpu.set_regs(registers(mode, random))
        for _ in range(EXITS):
            exit = self.vcpu.run()
            if not isinstance(exit, Io | Mmio):
                break
        self.done += 1
        if os.fstat(self.errors).st_size != self.errors_size:
            self.errors_size = os.fstat(self.errors).st_size
            raise Broken("the engine wrote to standard error")

    def check(self) -> None:
        """Look at the canaries, and whether the engine still does what it did."""
        if self.memory[:PAGE] != CANARY or self.memory[-PAGE:] != CANARY:
            raise Broken("memory beside the slot has changed")
        found = self.reference()
        if found != self.expected:
            raise Broken(f"known results have changed: {found.hex()}, not {self.expected.hex()}")
