"""A real guest for a trace: its instructions in order, and its pages with what is wrong with each.

Real mode with 4 GiB segments, so that every access of the guest is a shared one and the pages are named by their
guest-physical addresses. Each instruction takes eight bytes of code.
"""

from __future__ import annotations

import errno as e
import mmap
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final

import anykvm
from anykvm import abi
from anykvm.abi.validity import EHWPOISON
from anykvm.backends.soft import SgxVepc, SoftBackend
from anykvm.backends.soft.files import FILES
from anykvm.backends.soft.guest_memfd import fail_page
from anykvm.backends.soft.vm import VmFile
from anykvm.explorer.state import PAGE_OF, Insn, Page
from anykvm.host.ranges import PAGE_SIZE

CODE: Final = 0x1000
DEVICE: Final = 0x800000
"""No memslot is there."""
GPA: Final = {Page.G: 0x100000, Page.N: 0x110000, Page.P: 0x120000, Page.H: 0x130000, Page.E: 0x140000}
"""Where the pages of each kind begin."""
EACH: Final = 16
"""How many pages there are of each kind: every instruction that touches one has its own."""
_SIZE: Final = EACH * PAGE_SIZE
KICK: Final = signal.SIGUSR1
"""The signal that KVM_RUN lets through."""
_FAULTS: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_BLOCK: Final = 8
_PRIVATE_GPA_BIT: Final = 47
_HLT: Final = bytes.fromhex("f4").ljust(_BLOCK, b"\x90")


def _store(address: int) -> bytes:
    return bytes.fromhex("66 67 89 0d") + address.to_bytes(4, "little")  # mov [address], ecx


def page_at(gpa: int) -> Page | None:
    """Tell of which kind a page is; None: none."""
    return next((page for page, first in GPA.items() if first <= gpa < first + _SIZE), None)


def encode(insn: Insn, number: int = 0) -> bytes:
    """Give the machine code of an instruction, the ``number``-th of its kind.

    Raises KeyError for one that soft's guests cannot have.
    """
    if insn is Insn.HLT:
        return _HLT
    if insn is Insn.READ:
        return bytes.fromhex("66 67 8b 1d") + DEVICE.to_bytes(4, "little")  # mov ebx, [DEVICE]
    if insn is Insn.WRITE:
        return _store(DEVICE)
    if insn is Insn.WRITE_ACROSS:
        return _store(DEVICE + PAGE_SIZE - 2)
    return _store(GPA[PAGE_OF[insn]] + number * PAGE_SIZE)


class Guest:
    """One vCPU that stands before ``insns``."""

    def __init__(self, profile: str, insns: Sequence[Insn], *, private: bool) -> None:
        """``private``: the KVM knows guest_memfd. Raises OSError when the VM cannot be made."""
        self.insns = tuple(insns)
        self._stack = ExitStack()
        try:
            self._make(profile, private)
        except BaseException:
            self._stack.close()
            raise

    def _make(self, profile: str, private: bool) -> None:
        enter = self._stack.enter_context
        self.backend = SoftBackend(profile, private_gpa_bit=_PRIVATE_GPA_BIT if private else None)
        kvm = enter(anykvm.open(self.backend))
        self.vm = enter(kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM if private else abi.KVM_X86_DEFAULT_VM))
        ram = enter(anykvm.GuestMemory(2 * PAGE_SIZE))
        numbered = [encode(insn, self.insns[:at].count(insn)) for at, insn in enumerate(self.insns)]
        ram.write(CODE, b"".join([*numbered, _HLT]))
        self.vm.map(ram, 0)
        self._unmapped = enter(anykvm.GuestMemory(_SIZE))
        self._unmapped.protect(0, _SIZE, 0)
        self.vm.map(self._unmapped, GPA[Page.H])
        self._epc = SgxVepc(pages=0)
        self.vm.map(enter(self._epc.map(_SIZE)), GPA[Page.E])
        self._files: dict[Page, int] = {}
        if private:
            self._gmem(Page.G, 0)
            self.vm.set_memory_attributes(GPA[Page.G], _SIZE, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
            for page, error in ((Page.N, e.ENOMEM), (Page.P, EHWPOISON)):
                self._gmem(page, abi.GUEST_MEMFD_FLAG_MMAP)
                for number in range(EACH):
                    fail_page(self._files[page], number * PAGE_SIZE, error)
        self.vcpu = enter(self.vm.create_vcpu())
        self.vcpu.set_signal_mask(signal.valid_signals() - _FAULTS - {KICK})
        self.vcpu.set_real_mode(rip=CODE)
        sregs = self.vcpu.get_sregs()
        sregs.ds.limit = 0xFFFFFFFF
        self.vcpu.set_sregs(sregs)

    def _gmem(self, page: Page, flags: int) -> None:
        shared = self._stack.enter_context(anykvm.GuestMemory(_SIZE))
        fd = self._files[page] = self.vm.create_guest_memfd(_SIZE, flags)
        self._stack.callback(os.close, fd)
        slot = 100 + len(self._files)
        self.vm.set_user_memory_region2(slot, GPA[page], _SIZE, shared.address, abi.KVM_MEM_GUEST_MEMFD, fd, 0)

    def __enter__(self) -> Guest:
        """Enter."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Free all of it."""
        self._stack.close()

    def resolve(self, gpa: int) -> None:
        """Let the guest have a page, whatever was wrong with it."""
        page = page_at(gpa)
        if page is None or page is Page.G:
            self.convert(gpa)
            return
        offset = gpa - GPA[page]
        if page is Page.H:
            self._unmapped.protect(offset, PAGE_SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        elif page is Page.E:
            self._epc.grow(1)
        else:
            fail_page(self._files[page], offset, 0)

    def convert(self, gpa: int) -> None:
        """Make a page what the access was, shared: all that a confidential VMM does, whether it helps or not."""
        if self._files:
            self.vm.set_memory_attributes(gpa, PAGE_SIZE, 0)

    def kill(self) -> None:
        """Let the VM die, as a bug check of KVM's does."""
        file = FILES.get(self.vm.fileno())
        assert isinstance(file, VmFile)
        file.vm.kill()

    def position(self) -> int:
        """The number of the instruction the guest stands at; ``len(insns)``: behind the last."""
        return -(-(self.vcpu.get_regs().rip - CODE) // _BLOCK)
