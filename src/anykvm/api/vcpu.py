"""Vcpu: running a virtual CPU, and its kvm_run page."""

from __future__ import annotations

import ctypes
import errno as _errno
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.ioctls import KVM_RUN
from anykvm.abi.structures import kvm_run
from anykvm.api.exits import Exit, Io
from anykvm.api.exits.decode import DECODERS, REASON_AND_IO, decode_failure, decode_fault, decode_unknown
from anykvm.api.handle import explain
from anykvm.api.pages import map_pages
from anykvm.api.vcpu_events import VcpuEvents
from anykvm.api.vcpu_features import VcpuFeatures
from anykvm.api.vcpu_state import VcpuState
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.api.vm import Vm

_new: Final = object.__new__
_BYTES: Final = tuple(bytes((value,)) for value in range(256))
_EXIT_IO: Final = c.KVM_EXIT_IO
_EFAULT: Final = _errno.EFAULT


class Vcpu(VcpuState, VcpuEvents, VcpuFeatures):
    """A virtual CPU, made by ``Vm.create_vcpu``.

    >>> import anykvm
    >>> from anykvm import Hlt, Io
    >>> with anykvm.open() as kvm, kvm.create_vm() as vm, anykvm.GuestMemory(4096) as memory:
    ...     memory[0:5] = bytes.fromhex("b021 e6e9 f4")  # mov al, '!'; out 0xe9, al; hlt
    ...     _ = vm.map(memory, 0)
    ...     vcpu = vm.create_vcpu()
    ...     vcpu.set_real_mode(0)
    ...     while True:
    ...         match vcpu.run():
    ...             case Io(Io.OUT, 0xE9, data=data):
    ...                 print(data)
    ...             case Hlt():
    ...                 break
    b'!'
    """

    def __init__(self, vm: Vm, fd: int, vcpu_id: int, mmap_size: int) -> None:
        """Own the vCPU descriptor ``fd`` and map its pages; use ``Vm.create_vcpu``."""
        super().__init__(vm._backend, fd, vm)
        self.vm = vm
        """The ``Vm`` this was made from."""
        self.vcpu_id = vcpu_id
        """Its number, the APIC id."""
        self._run_ioctl = vm._backend.ioctl  # bound once: run() calls it a million times a second
        self._serial = 0  # counts run() calls; an exit of an earlier call is stale
        try:
            self._pages: ctypes.Array[ctypes.c_uint8] | None = map_pages(self._backend, fd, mmap_size)
        except OSError:
            self._close()
            raise
        self._page = memoryview(self._pages).cast("B")

    def run(self) -> Exit:
        """Run the guest until something needs user space, and return that as an exit. Source: api.rst 4.10.

        A pending answer to the previous exit is completed first. Answer an exit, or read what the page says about it,
        before calling this again.

        Raises OSError for what is not an exit: EFAULT without a valid annotation (an access KVM could not resolve and
        did not describe), EINVAL (invalid synced registers), EIO (VM dead, or called in another process than made it),
        ENOMEM; BlockingIOError (EAGAIN) when an uninitialised vCPU was woken: run again.
        """
        serial = self._serial = self._serial + 1
        page = self._page  # now: a signal handler may close the vCPU before the exit is read
        try:
            self._run_ioctl(self._fd, KVM_RUN, 0)
        except OSError as error:
            if error.errno == _EFAULT and (fault := decode_fault(page, _EFAULT)):
                return fault
            return self._failed(error, page)
        reason, direction, size, port, count, offset = REASON_AND_IO(page)
        if reason == _EXIT_IO:
            result = _new(Io)
            result.direction = direction
            result.port = port
            result.size = size
            result.count = count
            if direction:
                length = size * count
                result._data = _BYTES[page[offset]] if length == 1 else page[offset : offset + length].tobytes()
            else:
                result._data = b""
            result._offset = offset
            result._vcpu = self
            result._serial = serial
            return result
        decoder = DECODERS.get(reason)
        return decode_unknown(page, reason) if decoder is None else decoder(page, self, serial)

    def _failed(self, error: OSError, page: memoryview) -> Exit:
        """Turn a failed KVM_RUN into an exit, or raise the error with an explanation."""
        if self._fd < 0 and error.errno == _errno.EBADF:
            raise explain(error, KVM_RUN, None, lambda _: "this Vcpu is closed") from None
        result = decode_failure(page, error.errno or 0)
        if result is None:
            raise explain(error, KVM_RUN, {"vcpu": self.vcpu_id}, _why) from error.__cause__
        return result

    @property
    def kvm_run(self) -> kvm_run:
        """The kvm_run page as the kernel's structure, live: read it only between runs.

        It stays readable after ``close``, until the last reference to it is gone.
        Raises OSError with EBADF when the vCPU is closed.
        """
        return kvm_run.from_buffer(self._mapped())

    @property
    def io_page(self) -> memoryview:
        """All pages of the vCPU: kvm_run, PIO data at 4096, coalesced ring at 8192. Raises as ``kvm_run``."""
        return memoryview(self._mapped()).cast("B")

    @property
    def immediate_exit(self) -> bool:
        """Make the next ``run`` complete what is pending and return ``Intr`` without entering the guest.

        KVM samples it once at the start of KVM_RUN and never clears it (api.rst, kvm_run.immediate_exit). May be set
        from another thread or a signal handler.
        """
        return bool(self._page[1])

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._page[1] = int(value)

    def _mapped(self) -> ctypes.Array[ctypes.c_uint8]:
        if self._pages is None:
            raise OSError(_errno.EBADF, "kvm_run: this Vcpu is closed")
        return self._pages

    def _release(self) -> None:
        self._serial += 1  # exits that were not answered cannot be any more
        self._page = memoryview(bytearray(PAGE_SIZE))
        self._pages = None  # unmaps, unless the caller still holds a view


def _why(errno: int) -> str | None:
    """Explain the errnos of KVM_RUN that mean something of their own."""
    if errno == _errno.EFAULT:
        return "a guest access could not be resolved, and this KVM does not say which (no valid memory_fault)"
    if errno == _errno.EAGAIN:
        return "the uninitialised vCPU was woken; run again"
    if errno == _errno.EINVAL:
        return "invalid state: kvm_valid_regs, kvm_dirty_regs or the synced registers, cr8, or mp_state"
    return None
