"""Devices whose memory a VMM maps into its guest, and whose faults can fail: SGX's page cache, a PCI memory BAR.

On real machines these need the hardware. They are what ABI.md 2.3 lists as VM_IO and VM_PFNMAP mappings whose fault
handler fails, for a VMM's author to see KVM_RUN fail with EFAULT, and to recover.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections import deque
from typing import Final

from anykvm.backends.soft.host_memory import DeviceMapping
from anykvm.host.atomic import Finalizer, atomically
from anykvm.host.ranges import PAGE_SIZE

_ZEROS: Final = bytes(PAGE_SIZE)


class SgxVepc:
    """A machine's Enclave Page Cache of ``pages`` pages, and /dev/sgx_vepc, which maps it for guests.

    Pages are taken when a guest touches them. When there is none left the fault fails, as
    arch/x86/kernel/cpu/sgx/virt.c:sgx_vepc_fault() does, and KVM_RUN with it: EFAULT. The VMM takes pages from another
    mapping (``remove``) or the machine gets more (``grow``), and the guest goes on at the same instruction.

    Memory alone: there are no enclaves, and reads see what was written.

    >>> epc = SgxVepc(pages=2)
    >>> with epc.map(16 * 4096) as vepc:
    ...     vepc.write(0, b"a")
    ...     vepc.write(8192, b"b")
    ...     epc.free
    0
    >>> epc.free
    2
    """

    def __init__(self, pages: int) -> None:
        """Have ``pages`` free pages. Raises ValueError for a negative number; OSError: EMFILE, ENOMEM."""
        if pages < 0:
            raise ValueError(f"{pages} pages")
        self._fd = os.memfd_create("sgx-epc", os.MFD_CLOEXEC)
        Finalizer(self, os.close, self._fd)
        self._lock = threading.Lock()  # taken on workers only: see anykvm.host.atomic
        self._pages = 0
        self._free: deque[int] = deque()  # numbers of pages in the file; in order, so that mappings of them merge
        self.grow(pages)

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return self._pages

    @property
    def free(self) -> int:
        """How many of them nobody has."""
        return len(self._free)

    def grow(self, pages: int) -> None:
        """Add free pages. Raises ValueError for a negative number; OSError: ENOMEM."""
        if pages < 0:
            raise ValueError(f"{pages} pages")
        atomically(self._grow, pages)

    def _grow(self, pages: int) -> None:
        with self._lock:
            os.ftruncate(self._fd, (self._pages + pages) * PAGE_SIZE)
            self._free.extend(range(self._pages, self._pages + pages))
            self._pages += pages

    def map(self, size: int) -> DeviceMapping:
        """Open /dev/sgx_vepc and map ``size`` bytes: as large as the guest shall see its EPC, whatever there is.

        Its pages come back when it is closed. Raises as ``DeviceMapping``.
        """
        return atomically(self._map, size)

    def _map(self, size: int) -> DeviceMapping:
        taken: dict[int, int] = {}  # offset in the mapping: page in the file

        def fault(mapping: DeviceMapping, offset: int, write: bool) -> None:
            atomically(take, mapping, offset)

        def take(mapping: DeviceMapping, offset: int) -> None:
            with self._lock:
                if offset in taken:
                    return  # another vCPU was first
                if not self._free:
                    raise OSError(errno.ENOMEM, "no free EPC page")
                page = self._free.popleft()
                try:
                    os.pwrite(self._fd, _ZEROS, page * PAGE_SIZE)
                    mapping.insert(offset, self._fd, page * PAGE_SIZE)
                except BaseException:
                    self._free.appendleft(page)
                    raise
                taken[offset] = page

        def released() -> None:
            self._free.extend(taken.values())
            taken.clear()

        mapping = DeviceMapping(size, fault, released=released)
        _TAKEN[mapping] = taken
        return mapping

    def remove(self, mapping: DeviceMapping, offset: int = 0, length: int | None = None) -> int:
        """Take pages back from a mapping of this EPC (SGX_IOC_VEPC_REMOVE_ALL, for a range); returns how many.

        Their contents are gone: the guest's next access finds a fresh page, if there is one.
        Raises IndexError, ValueError for a range that is not of the mapping's pages.
        """
        return atomically(self._remove, mapping, offset, mapping.size if length is None else offset + length)

    def _remove(self, mapping: DeviceMapping, offset: int, end: int) -> int:
        with self._lock:
            mapping.zap(offset, end - offset)
            taken = _TAKEN[mapping]
            gone = [page for page in taken if offset <= page < end]
            self._free.extend(taken.pop(page) for page in gone)
        return len(gone)


_TAKEN: Final[weakref.WeakKeyDictionary[DeviceMapping, dict[int, int]]] = weakref.WeakKeyDictionary()


class PciBar(DeviceMapping):
    """A memory BAR of ``size`` bytes, as VFIO maps it: while memory decoding is off, faults on it fail.

    Source: drivers/vfio/pci/vfio_pci_core.c:vfio_pci_mmap_huge_fault(); vfio_pci_zap_and_down_write_memory_lock().

    >>> with PciBar(4096) as bar:
    ...     bar.registers[0:2] = b"hi"
    ...     bar.memory_decoding = False
    ...     bar.read(0, 2)
    Traceback (most recent call last):
    ...
    OSError: [Errno 14] the device's fault handler failed at offset 0x0
    """

    def __init__(self, size: int) -> None:
        """Make a BAR that decodes. Raises as ``DeviceMapping``."""
        self._fd = os.memfd_create("pci-bar", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            self._memory_lock = threading.Lock()  # taken on workers only: see anykvm.host.atomic
            self._decoding = True
            self._registers = mmap.mmap(self._fd, size)
            super().__init__(size, type(self)._vfio_fault, released=_closer(self._fd))
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def registers(self) -> mmap.mmap:
        """The BAR's contents, as the device sees them: whether it decodes or not."""
        return self._registers

    @property
    def memory_decoding(self) -> bool:
        """PCI_COMMAND_MEMORY. When switched off, no vCPU reaches the BAR any more as soon as that returns."""
        return self._decoding

    @memory_decoding.setter
    def memory_decoding(self, on: bool) -> None:
        atomically(self._decode, on)

    def _decode(self, on: bool) -> None:
        with self._memory_lock:
            self._decoding = on
            if not on:
                self.zap()

    @staticmethod
    def _vfio_fault(mapping: DeviceMapping, offset: int, write: bool) -> None:
        assert isinstance(mapping, PciBar)
        atomically(mapping._show, offset)

    def _show(self, offset: int) -> None:
        with self._memory_lock:
            if not self._decoding:
                raise OSError(errno.EIO, "memory decoding is off")
            self.insert(offset, self._fd, offset)


class _closer:
    """os.close(fd), without a reference to the object that has it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self) -> None:
        os.close(self._fd)
