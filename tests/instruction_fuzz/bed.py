"""One vCPU that executes cases. Its memory lies between canaries. Now and then it runs a program with known
results, which an engine that a case has written to would no longer get."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from types import FrameType

import anykvm
from anykvm import Io, Mmio
from anykvm.abi.structures import kvm_debugregs, kvm_regs, kvm_sregs, kvm_vcpu_events
from instruction_fuzz.forms import Case, may_stay
from instruction_fuzz.modes import BY_NAME, CODE, DATA, MODES, SIZE, STACK, image, special_registers
from instruction_fuzz.operands import INITIAL, Pools

PAGE = 4096
CANARY = bytes(range(256)) * 16
SLICE = 0.02
"""Seconds of the processor's that a guest may run."""
LONG = 25
"""Slices of time after which code that has an end would have reached it."""
EXITS = 6
"""Of one case: device accesses are answered with 0."""
OPERANDS = 4
"""Sets of them for each case."""
LEFT = 200
"""Exits that an instruction cut off in the middle may still have to give: writes to devices, one by one."""
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
    """SIGPROF: it ends KVM_RUN, and that is all."""


class Bed:
    """A vCPU, whatever mode the next case wants. ``errors`` is the file that standard error goes to."""

    def __init__(self, errors: int, seed: int = 0) -> None:
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
        signal.signal(signal.SIGPROF, ignore)
        signal.setitimer(signal.ITIMER_PROF, SLICE, SLICE)
        self.pools = Pools(seed)
        self.changed = False
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
        for _ in range(LEFT):  # what the last case's device accesses have left, and then this
            exit = self.vcpu.run()
            if not isinstance(exit, anykvm.Intr | Io | Mmio):
                break
        rip = self.vcpu.get_regs().rip
        if not isinstance(exit, anykvm.Hlt) or rip != CODE + len(REFERENCE):
            raise Broken(f"the program with known results ends with {exit}, RIP {rip:#x}")
        return bytes(self.memory[PAGE + DATA : PAGE + DATA + 40])

    def execute(self, case: Case) -> None:
        """Raise Broken if it has broken something that can be seen at once."""
        extreme = case.kind == "registers"
        first, count = (0, len(self.pools.extremes)) if extreme else (case.number * OPERANDS, OPERANDS)
        for variant in range(first, first + count):
            if self.run(case.mode, case.code, variant, 1, extreme):
                continue
            self.judge_slow(case, variant, extreme)
            break  # it takes its time with any operands
        if os.fstat(self.errors).st_size != self.errors_size:
            self.errors_size = os.fstat(self.errors).st_size
            raise Broken("the engine wrote to standard error")

    def judge_slow(self, case: Case, variant: int, extreme: bool) -> None:
        """A guest that did not stop within a slice of time: whether its instruction ends at all."""
        mode, once = case.mode, case.code[: len(case.code) // case.copies]
        starts = range(len(once)) if case.kind == "page" else (0,)  # a copy may be decoded from its middle
        if self.changed:
            return  # one whose tables have no memory is tried again for ever, as KVM does
        if case.kind == "random" or any(may_stay(once[start:], BY_NAME[mode].bits) for start in starts):
            return
        if self.run(mode, case.code, variant, LONG, extreme):
            return
        if case.kind != "page" and self.vcpu.get_regs().rip == CODE:
            raise Broken(f"{once.hex(' ')} does not end")
        if case.kind == "page" and self.run(mode, once, variant, LONG, extreme):
            raise Broken(f"a page of {once.hex(' ')} does not end, one does")

    def run(self, mode: str, code: bytes, variant: int, slices: int, extreme: bool = False) -> bool:
        """Execute code with a set of operands. False: the guest would run on after these slices of time."""
        regs, floating = self.pools.pick(BY_NAME[mode], variant, extreme)
        self.load(mode, code)
        self.changed = False
        if not extreme:
            self.change(mode, variant)
        self.vcpu.set_xsave(floating)
        self.vcpu.set_regs(regs)
        for _ in range(EXITS):
            exit = self.vcpu.run()
            while isinstance(exit, anykvm.Intr):
                slices -= 1
                if not slices:
                    return False
                exit = self.vcpu.run()
            if not isinstance(exit, Io | Mmio):
                break
        return True

    def change(self, mode: str, variant: int) -> None:
        """Other special and debug registers than the mode has, where KVM has them so."""
        sregs = kvm_sregs.from_buffer_copy(self.sregs[mode])
        debugregs = kvm_debugregs.from_buffer_copy(self.debugregs)
        self.changed = self.pools.change(variant // OPERANDS, sregs, debugregs)
        with contextlib.suppress(OSError):
            self.vcpu.set_sregs(sregs)
        self.vcpu.set_debugregs(debugregs)

    def check(self) -> None:
        """Look at the canaries, and whether the engine still does what it did."""
        if self.memory[:PAGE] != CANARY or self.memory[-PAGE:] != CANARY:
            raise Broken("memory beside the slot has changed")
        found = self.reference()
        if found != self.expected:
            raise Broken(f"known results have changed: {found.hex()}, not {self.expected.hex()}")
