"""Traps of the engine itself, which no guest may turn into the end of the process. A helper is broken on purpose, in a
child: its first bytes are replaced by ones that trap. And the host's floating-point modes, under which the engine must
compute as ever and which must be the thread's own again afterwards."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import TracebackType

import pytest

import anykvm
from anykvm import Exit, GuestMemory, Hlt, InternalError, MemoryFault, abi
from anykvm.backends.soft import engine
from anykvm.testing.assembler import assemble
from anykvm.vmm import modes

LIBRARY = Path(engine.__file__).parent / "libanykvm_engine.so"
#: Not a jump out of the engine: nothing then says whose it was.
TRAPS = {
    "ud2": "0f0b",
    "division by zero": "31d231c9b801000000f7f1",
    "read of page 0": "31c08b00",
    "write of page 0": "31c08900",
    "non-canonical address": "48b800000000000000808900",
}


@functools.cache
def symbols() -> dict[str, int]:
    lines = subprocess.run(["nm", LIBRARY], check=True, capture_output=True, text=True).stdout.splitlines()
    return {fields[2]: int(fields[0], 16) for line in lines if len(fields := line.split()) == 3}


def loaded_at() -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(LIBRARY) and int(fields[2], 16) == 0:
            return int(fields[0].split("-")[0], 16)
    raise AssertionError("the engine is not loaded")


def poke(symbol: str, code: bytes) -> None:
    """Replace the first bytes of one of the engine's functions."""
    at = loaded_at() + symbols()[symbol]
    page = at & ~4095
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(8192), 7) == 0
    ctypes.memmove(at, code, len(code))


def in_child(source: str) -> subprocess.CompletedProcess[str]:
    """Run it with this module's names; a hang is a failure."""
    script = "from test_engine_traps import *\n" + textwrap.dedent(source)
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)


class Guest:
    """A vCPU in 64-bit mode, without handlers: made quickly."""

    def __init__(self) -> None:
        self.kvm = anykvm.open("soft")
        self.memory = GuestMemory(1 << 20)
        self.vm = self.kvm.create_vm()
        self.vm.map(self.memory, 0)
        self.vcpu = self.vm.create_vcpu()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kvm.close()
        self.memory.close()

    def run(self, code: str) -> Exit:
        self.memory.write(CODE, bytes.fromhex(code) + b"\xf4")
        modes.long_mode(self.vcpu, self.memory, CODE, STACK)
        return self.vcpu.run()


CODE, STACK, DATA = 0x8000, 0x7000, 0xA000
FSQRT = "48c7c307000000 d9e8 d9fa 48c7c308000000"  # mov $7, %rbx; fld1; fsqrt; mov $8, %rbx


def break_and_run(symbol: str, trap: str) -> None:
    """In the child: a guest whose FSQRT the broken function does; then one that does not need it."""
    guest = Guest()
    assert guest.run(FSQRT) == Hlt()
    poke(symbol, bytes.fromhex(trap))
    for _ in range(2):
        exit = guest.run(FSQRT)
        regs = guest.vcpu.get_regs()
        print(type(exit).__name__, hex(regs.rip), regs.rbx)
    assert isinstance(exit, InternalError) and exit.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    print(guest.run("48c7c309000000"), guest.vcpu.get_regs().rbx)


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS.keys())
def test_a_helper_that_traps_ends_the_run(trap: str) -> None:
    done = in_child(f"break_and_run('helper_fsqrt_x86_64', '{trap}')")
    assert done.returncode == 0, done.stderr
    at = hex(CODE + 9)  # FSQRT, and everything before it is done
    assert done.stdout.split() == ["InternalError", at, "7", "InternalError", at, "7", "Hlt()", "9"]
    assert done.stderr.count("anykvm: SIG") == 2 and f"RIP {at}" in done.stderr


@pytest.mark.parametrize("symbol", ["tcg_optimize_x86_64", "tcg_gen_op1_x86_64"])
def test_a_translator_that_traps_ends_the_run(symbol: str) -> None:
    """RIP is the block's; the engine is of no use any more here, as every block needs this function."""
    if symbol not in symbols():
        pytest.skip(f"NOT TESTED: {symbol}: the engine was linked without its name")
    done = in_child(
        f"""
        guest = Guest()
        poke("{symbol}", b"\\x0f\\x0b")
        print(type(guest.run("90")).__name__, hex(guest.vcpu.get_regs().rip))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["InternalError", hex(CODE)]


def test_a_delivery_that_traps_ends_the_run() -> None:
    """The exception stays queued; without it the vCPU runs on."""
    done = in_child(
        """
        guest = Guest()
        poke("x86_cpu_do_interrupt_x86_64", b"\\x0f\\x0b")
        print(type(guest.run("0f0b")).__name__, hex(guest.vcpu.get_regs().rip))
        events = guest.vcpu.get_vcpu_events()
        print(events.exception.injected, events.exception.nr)
        events.exception.injected = 0
        guest.vcpu.set_vcpu_events(events)
        print(guest.run("90"))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["InternalError", hex(CODE), "1", "6", "Hlt()"]


@pytest.mark.parametrize("number", [signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_trap_of_the_program_is_the_program_s(number: signal.Signals) -> None:
    """Outside the engine nothing is swallowed: the program's handler is called, and then the default action follows."""
    code = {"SIGFPE": "31d231c9b801000000f7f1", "SIGILL": "0f0b", "SIGSEGV": "31c08b00"}.get(number.name)
    fault = f"run_bytes('{code}')" if code else "past_the_end()"
    done = in_child(f"import faulthandler; faulthandler.enable(); Guest(); {fault}")
    assert done.returncode == -number and "Current thread" in done.stderr


def run_bytes(code: str) -> None:
    """In the child: execute bytes that trap, as the program's."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, 4096, 7, 0x22, -1, 0)
    ctypes.memmove(at, bytes.fromhex(code), len(code) // 2)
    ctypes.CFUNCTYPE(None)(at)()


def past_the_end() -> None:
    """In the child: SIGBUS."""
    fd = os.memfd_create("empty")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    ctypes.string_at(libc.mmap(None, 4096, 3, 1, fd, 0), 1)


# -- the host's floating-point modes -----------------------------------------------------------------------------------

FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW, FE_UPWARD = 1, 4, 8, 0x800
GUEST_FLOATS = """
fldpi; fld1; fprem; fstpt 0xa000; fldpi; fsin; fstpt 0xa010
fldl2e; f2xm1; fstpt 0xa020; fldpi; fldl2t; fyl2x; fstpt 0xa030
mov $3, %eax; cvtsi2sd %eax, %xmm0; mov $1, %eax; cvtsi2sd %eax, %xmm1; divsd %xmm0, %xmm1; movsd %xmm1, 0xa040
fldz; fldz; fdivp; fsin; fstpt 0xa050; fldz; fld1; fdivp; f2xm1; fstpt 0xa060
movl $16000, 0xa070; fildl 0xa070; fld1; fscale; f2xm1; fstpt 0xa070; xorpd %xmm2, %xmm2; divsd %xmm2, %xmm1; hlt
"""


def computed(code: str) -> bytes:
    with Guest() as guest:
        assert guest.run(code) == Hlt()
        return guest.memory.read(DATA, 0x80)


@pytest.fixture
def libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")


def test_rounding_of_the_thread_is_not_the_guest_s(libm: ctypes.CDLL) -> None:
    code = assemble(GUEST_FLOATS, CODE).hex()
    usual = computed(code)
    before = libm.fegetround()
    try:
        assert libm.fesetround(FE_UPWARD) == 0
        rounded = computed(code)
        assert libm.fegetround() == FE_UPWARD
    finally:
        libm.fesetround(before)
    assert rounded == usual


def test_unmasked_exceptions_of_the_thread_are_not_the_guest_s() -> None:
    """Sine of a NaN, and a power of two that is none: with those unmasked, the engine got SIGFPE."""
    code = assemble(GUEST_FLOATS, CODE).hex()
    done = in_child(
        f"""
        libm, unmasked = ctypes.CDLL("libm.so.6"), FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW
        usual, guest = computed("{code}"), Guest()
        libm.feclearexcept(unmasked)
        assert libm.feenableexcept(unmasked) != -1
        exit = guest.run("{code}")
        enabled, raised = libm.fegetexcept(), libm.fetestexcept(unmasked)
        libm.fedisableexcept(unmasked)
        print(exit, enabled == unmasked, raised, guest.memory.read(DATA, 0x80) == usual)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Hlt()", "True", "0", "True"]


def test_a_fault_does_not_change_the_thread_s_rounding(libm: ctypes.CDLL) -> None:
    """Neither of a guest's page that is gone, nor of a pointer that is none: both handlers leave by a jump."""
    before = libm.fegetround()
    with Guest() as guest:
        guest.memory.protect(DATA, 4096, 0)
        try:
            libm.fesetround(FE_UPWARD)
            assert isinstance(guest.run("890425 00a00000"), MemoryFault)  # mov %eax, 0xa000
            assert libm.fegetround() == FE_UPWARD
            with pytest.raises(OSError):
                guest.kvm.backend.ioctl(guest.vcpu.fileno(), abi.KVM_GET_REGS, 8)
            assert libm.fegetround() == FE_UPWARD
        finally:
            libm.fesetround(before)
