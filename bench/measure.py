"""The benchmarks themselves: each returns a figure for anykvm and for its peers, taken in the same run."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import anykvm
from anykvm import GuestMemory, Io, Kvm, MemoryFault, Vcpu, Vm
from anykvm.backends import Backend
from anykvm.vmm.modes import long_mode
from bench.guests import MIX, MIX_INSTRUCTIONS, OUT_LOOP, TOUCH

CODE, STACK, TABLE = 0x80000, 0x90000, 0xA0000
LOW = 1 << 20
PAGE = 4096
ROUNDS = 5


def guest(kvm: Kvm, memory: GuestMemory, code: bytes, **regs: int) -> tuple[Vm, Vcpu]:
    """A long-mode vCPU at `code`, over `memory` at gpa 0."""
    vm = kvm.create_vm()
    vm.map(memory, 0)
    vcpu = vm.create_vcpu()
    memory.write(CODE, code)
    long_mode(vcpu, memory, CODE, STACK, ((0, max(memory.size, 1 << 30)),))
    state = vcpu.get_regs()
    for name, value in regs.items():
        setattr(state, name, value)
    vcpu.set_regs(state)
    return vm, vcpu


def rounds(once: Callable[[], float]) -> float:
    """The median of several measurements."""
    return median(once() for _ in range(ROUNDS))


def pio_exit(backend: str, count: int) -> float:
    """Microseconds a PIO exit: `vcpu.run()` and a look at the exit, in Python."""
    with anykvm.open(backend) as kvm, GuestMemory(LOW) as memory:
        vm, vcpu = guest(kvm, memory, OUT_LOOP)
        run = vcpu.run

        def once() -> float:
            start = time.perf_counter()
            for _ in range(count):
                exit = run()
            took = time.perf_counter() - start
            assert isinstance(exit, Io) and exit.port == 0xE9
            return took / count * 1e6

        result = rounds(once)
        vm.close()
        return result


def layer_cost(wrap: Callable[[Backend], Backend], count: int = 20_000, tries: int = 40) -> tuple[float, float]:
    """Microseconds of CPU time a PIO exit, without a layer and with it: best of many, in turn."""
    soft = anykvm.backend("soft")
    best = [float("inf")] * 2
    with ExitStack() as stack:
        runs = []
        for backend in (soft, wrap(soft)):
            kvm, ram = stack.enter_context(anykvm.open(backend)), stack.enter_context(GuestMemory(LOW))
            runs.append(guest(kvm, ram, OUT_LOOP)[1].run)
        for _ in range(tries):
            for which, run in enumerate(runs):
                start = time.process_time()
                for _ in range(count):
                    run()
                best[which] = min(best[which], (time.process_time() - start) / count * 1e6)
    return best[0], best[1]


def _stock() -> tuple[Any, Any]:
    """Unicorn's own binding: a peer, and without types."""
    return importlib.import_module("unicorn"), importlib.import_module("unicorn.x86_const")


def stock_pio_exit(count: int) -> float:
    """The same loop on Unicorn's own binding: a hook on OUT that stops, and starting again behind it."""
    unicorn, x86_const = _stock()
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, LOW)
    uc.mem_write(CODE, OUT_LOOP)
    seen = []

    def out(engine: Any, port: int, size: int, value: int, user: object) -> None:
        seen.append(port)
        engine.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INSN, out, None, 1, 0, x86_const.UC_X86_INS_OUT)
    uc.reg_write(x86_const.UC_X86_REG_RIP, CODE)

    def once() -> float:
        seen.clear()
        start = time.perf_counter()
        for _ in range(count):
            uc.emu_start(uc.reg_read(x86_const.UC_X86_REG_RIP), CODE + len(OUT_LOOP))
        took = time.perf_counter() - start
        assert len(seen) == count
        return took / count * 1e6

    return rounds(once)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


_GUARD_INSTALL, _GUARD_REMOVE = 102, 103  # madvise(2), Linux 6.13


def _by_mmap(memory: GuestMemory, length: int) -> Callable[[int], object]:
    """Absent: reserved without access. To map a page: a fresh anonymous one over it."""
    memory.protect(LOW, length, 0)
    base, call, fixed = memory.address, _libc.mmap, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    return lambda gpa: call(base + gpa, PAGE, 3, fixed, -1, 0)


def _by_guard(memory: GuestMemory, length: int) -> Callable[[int], object]:
    """Absent: guard pages, else (older kernels) reserved without access. To map a page: make it accessible."""
    base, advise, protect = memory.address, _libc.madvise, _libc.mprotect
    if not advise(base + LOW, length, _GUARD_INSTALL):
        return lambda gpa: advise(base + gpa, PAGE, _GUARD_REMOVE)
    memory.protect(LOW, length, 0)
    return lambda gpa: protect(base + gpa, PAGE, 3)


def fault_exit(way: str, pages: int = 4000) -> float:
    """Microseconds a memory-fault exit: the Python handler makes the page present, the guest resumes and writes it."""

    def once() -> float:
        with anykvm.open("soft") as kvm, GuestMemory(LOW + pages * PAGE, shared=False) as memory:
            vm, vcpu = guest(kvm, memory, TOUCH, rdi=LOW, rcx=pages)
            bring = (_by_mmap if way == "mmap" else _by_guard)(memory, pages * PAGE)
            run = vcpu.run
            start = time.perf_counter()
            while type(exit := run()) is MemoryFault:
                bring(exit.gpa)
            took = time.perf_counter() - start
            assert exit == anykvm.Hlt(), exit
            vm.close()
            return took / pages * 1e6

    return rounds(once)


def demand_paging(pages: int = 65536) -> float:
    """Pages a second of fresh anonymous memory, touched by the guest; no exits."""

    def once() -> float:
        with anykvm.open("soft") as kvm, GuestMemory(LOW + pages * PAGE, shared=False) as memory:
            vm, vcpu = guest(kvm, memory, TOUCH, rdi=LOW, rcx=pages)
            start = time.perf_counter()
            exit = vcpu.run()
            took = time.perf_counter() - start
            assert exit == anykvm.Hlt(), exit
            vm.close()
            return pages / took

    return rounds(once)


def plain_c_touch(pages: int = 65536) -> float:
    """Pages a second of a plain C loop over fresh anonymous memory."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "touch.c"), Path(folder, "touch.so")
        source.write_text("void touch(volatile char *p, long n) { for (long i = 0; i < n; i++) p[i * 4096] = 1; }")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        touch = ctypes.CDLL(str(library)).touch

        def once() -> float:
            with GuestMemory(pages * PAGE, shared=False) as memory:
                start = time.perf_counter()
                touch(ctypes.c_void_p(memory.address), ctypes.c_long(pages))
                return pages / (time.perf_counter() - start)

        return rounds(once)


def guest_code(count: int = 20000) -> float:
    """Million guest instructions a second in mixed integer and memory work."""
    with anykvm.open("soft") as kvm, GuestMemory(LOW) as memory:

        def once() -> float:
            vm, vcpu = guest(kvm, memory, MIX, rsi=TABLE, rcx=count)
            start = time.perf_counter()
            assert vcpu.run() == anykvm.Hlt()
            took = time.perf_counter() - start
            vm.close()
            return count * MIX_INSTRUCTIONS / took / 1e6

        return rounds(once)


def stock_guest_code(count: int = 20000) -> float:
    """The same code on raw Unicorn (data and code mapped apart, data not executable: its fast case)."""
    unicorn, x86_const = _stock()
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(CODE, 0x10000)
    uc.mem_map(TABLE, 0x10000, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
    uc.mem_write(CODE, MIX)

    def once() -> float:
        uc.reg_write(x86_const.UC_X86_REG_RSI, TABLE)
        uc.reg_write(x86_const.UC_X86_REG_RCX, count)
        start = time.perf_counter()
        uc.emu_start(CODE, CODE + len(MIX) - 1)
        return count * MIX_INSTRUCTIONS / (time.perf_counter() - start) / 1e6

    return rounds(once)


FIRST_EXIT = """
import anykvm
with anykvm.open("soft") as kvm, anykvm.GuestMemory(1 << 20) as memory:
    vm = kvm.create_vm(); vm.map(memory, 0); vcpu = vm.create_vcpu()
    memory.write(0x1000, b"\\xf4"); vcpu.set_real_mode(0x1000)
    assert vcpu.run() == anykvm.Hlt()
"""


def first_exit() -> float:
    """Seconds of a process that imports anykvm, creates a VM and gets its first exit; bare Python's start taken off."""

    def process(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return rounds(lambda: process(FIRST_EXIT)) - rounds(lambda: process("pass"))
