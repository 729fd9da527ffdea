"""Host memory of devices: mappings whose faults a handler in Python resolves, or fails to.

What the kernel knows by a mapping's flags (VM_IO, VM_PFNMAP) the soft backend is told here. It works for guests of the
soft backend; nothing needs privileges. Sources: ABI.md 3.1 and 3.2; km:hva_to_pfn_remapped().
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Final, TypeAlias

from anykvm.backends.soft import upcall
from anykvm.backends.soft.engine import values
from anykvm.backends.soft.engine.library import library
from anykvm.host import libc
from anykvm.host.atomic import Finalizer, atomically, atomically_or_here
from anykvm.host.closing import Closing
from anykvm.host.ranges import PAGE_SIZE, check_bytes, check_pages, check_size

_ACCESS_WRITE: Final = values.AK_WRITE
_PRESENT: Final = values.AK_DEVICE_PRESENT
_FAILED: Final = values.AK_DEVICE_FAILED
_READ_ONLY: Final = values.AK_DEVICE_READ_ONLY
_RESERVED: Final = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE

FaultHandler: TypeAlias = "Callable[[DeviceMapping, int, bool], None]"
"""Called with the mapping, the page's offset, and whether the access is a write: ``vm_operations_struct.fault``."""


class DeviceMapping(Closing):
    """``size`` bytes of host address space that belong to a device: VM_IO and VM_PFNMAP, empty until touched.

    A guest's access to a page that is not present calls ``fault``, which puts a page there with ``insert``, or raises
    OSError: then KVM_RUN fails with EFAULT, annotated or bare as the backend's profile has it. A write to a page that
    was inserted read-only is KVM_EXIT_MMIO, as to a read-only slot. Inside KVM's instruction emulator a fault that
    fails is KVM_EXIT_MMIO too.

    ``fault`` runs on the vCPU's thread, within KVM_RUN: signals do not end it, and changes of the VM's slots wait for
    it. So an ioctl of this VM or of its vCPUs, or of another VM that is in such a handler, raises OSError: EDEADLK.

    A bug in it, any other Exception and this EDEADLK, fails like an OSError. It is reported to ``sys.unraisablehook``;
    where the backend's KVM_RUN raises OSError, it is the ``__cause__``. What is no Exception (KeyboardInterrupt of a
    signal handler) ends KVM_RUN as a signal does, and is raised by it.

    The process's own accesses go through ``read`` and ``write``; touching the address otherwise is a crash where no
    page is present. ``Vm.map`` takes it like a ``GuestMemory``.

    >>> ram = os.memfd_create("device")
    >>> os.ftruncate(ram, 4096)
    >>> with DeviceMapping(8192, lambda mapping, offset, write: mapping.insert(offset, ram)) as device:
    ...     device.write(4096, b"hello")
    ...     device.present(4096), device.present(0), os.pread(ram, 5, 0)
    (True, False, b'hello')
    >>> os.close(ram)
    """

    def __init__(
        self,
        size: int,
        fault: FaultHandler,
        *,
        writable: bool = True,
        released: Callable[[], None] | None = None,
    ) -> None:
        """Reserve addresses. ``writable`` False maps it PROT_READ alone: a write to an absent page fails.

        ``released`` is called once, when the mapping is closed or dropped. Raises ValueError for a size that is 0 or
        not page aligned; OSError as mmap(2), ENOMEM.
        """
        check_size(size)
        _install()
        self._size = size
        self._fault = fault
        self._writable = writable
        self._pages: dict[int, bool] = {}  # offset of a present page: whether it may be written
        self._lock = threading.RLock()  # taken on workers only: see anykvm.host.atomic
        atomically(self._reserve, released)

    def _reserve(self, released: Callable[[], None] | None) -> None:
        self._address = libc.mmap(0, self._size, libc.PROT_NONE, _RESERVED)
        if result := library().ak_device_add(self._address, self._size):
            libc.munmap(self._address, self._size)
            raise OSError(-result, os.strerror(-result))
        _MAPPINGS[self._address] = weakref.ref(self)
        self._finalizer = Finalizer(self, _release, self._address, self._size, released)

    @property
    def address(self) -> int:
        """Host virtual address of the first byte. Raises ValueError when closed."""
        if self.closed:
            raise ValueError("this DeviceMapping is closed")
        return self._address

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return not self._finalizer.alive

    def insert(self, offset: int, fd: int, fd_offset: int = 0, *, writable: bool = True) -> None:
        """Make a page present: the page of file ``fd`` at ``fd_offset`` (vmf_insert_pfn()); replaces what was there.

        Raises IndexError, ValueError for an offset that is no page of the mapping; OSError as mmap(2), and ENXIO when
        the mapping is closed.
        """
        check_pages(offset, PAGE_SIZE, self._size)
        allowed = writable and self._writable
        atomically(self._insert, offset, fd, fd_offset, allowed)

    def _insert(self, offset: int, fd: int, fd_offset: int, allowed: bool) -> None:
        prot = libc.PROT_READ | (libc.PROT_WRITE if allowed else 0)
        with self._lock:
            if self.closed:
                raise OSError(errno.ENXIO, "this DeviceMapping is closed")
            libc.mmap(self._address + offset, PAGE_SIZE, prot, libc.MAP_SHARED | libc.MAP_FIXED, fd, fd_offset)
            self._pages[offset] = allowed

    def zap(self, offset: int = 0, length: int | None = None) -> None:
        """Make pages absent (zap_vma_ptes()): no vCPU reaches them when it returns. Default: to the end.

        Raises IndexError, ValueError for a range that is not of the mapping's pages.
        """
        length = self._size - offset if length is None else length
        check_pages(offset, length, self._size)
        atomically(self._zap, offset, length)

    def _zap(self, offset: int, length: int) -> None:
        with self._lock:
            if self.closed:
                return
            libc.mmap(self._address + offset, length, libc.PROT_NONE, _RESERVED | libc.MAP_FIXED)
            for page in [page for page in self._pages if offset <= page < offset + length]:
                del self._pages[page]

    def present(self, offset: int) -> bool:
        """Say whether the page at this offset is there."""
        return offset // PAGE_SIZE * PAGE_SIZE in self._pages

    def read(self, offset: int, length: int) -> bytes:
        """Read as the process: pages that are absent are faulted in. Raises IndexError; OSError: EFAULT."""
        self._touch(offset, length, 0)
        return libc.copy_out(self._address + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write as the process. Raises as ``read``."""
        self._touch(offset, len(data), _ACCESS_WRITE)
        libc.copy_in(self._address + offset, data)

    def close(self) -> None:
        """Unmap it. A guest that still has it in a slot faults. Idempotent."""
        atomically_or_here(self._close)

    def _close(self) -> None:
        with self._lock:
            self._finalizer()
            self._pages.clear()

    def _touch(self, offset: int, length: int, access: int) -> None:
        check_bytes(offset, length, self._size)
        for page in range(offset // PAGE_SIZE * PAGE_SIZE, offset + length, PAGE_SIZE):
            what = f"the device's fault handler failed at offset {page:#x}"
            try:
                answer = self.resolve(page, access)
            except Exception as error:
                raise OSError(errno.EFAULT, what) from error
            if answer == _FAILED:
                raise OSError(errno.EFAULT, what)

    def resolve(self, offset: int, access: int) -> int:
        """The engine's question about an absent or protected page: ``enum ak_device_answer``.

        Raises what the fault handler raises, except OSError other than EDEADLK.
        """
        write = access == _ACCESS_WRITE
        if offset not in self._pages:
            if self.closed or (write and not self._writable):
                return _FAILED  # fixup_user_fault(): vma_permits_fault()
            try:
                self._fault(self, offset, write)
            except OSError as error:
                if error.errno == errno.EDEADLK:
                    raise  # not the device has failed: the handler asked for what it must not
                return _FAILED  # VM_FAULT_SIGBUS
        allowed = self._pages.get(offset)
        if allowed is None:
            return _FAILED  # the handler said nothing and did nothing
        return _READ_ONLY if write and not allowed else _PRESENT

    def __repr__(self) -> str:
        """Show where it is and how much of it is present."""
        state = "closed" if self.closed else f"at {self._address:#x}, {len(self._pages)} pages present"
        return f"<{type(self).__name__} {state}, {self._size:#x} bytes>"


_MAPPINGS: Final[dict[int, weakref.ref[DeviceMapping]]] = {}


def device_fault(address: int, access: int) -> int:
    """Answer the engine for the mapping that has this address. Raises as ``DeviceMapping.resolve``."""
    for start, reference in list(_MAPPINGS.items()):
        mapping = reference()
        if mapping is not None and start <= address < start + mapping.size:
            return mapping.resolve(address - start, access)
    return _FAILED


def _install() -> None:
    upcall.install(device_fault)
    library().ak_device_handler(upcall.device_fault_address())


def _release(address: int, size: int, released: Callable[[], None] | None) -> None:
    _MAPPINGS.pop(address, None)
    library().ak_device_remove(address)
    libc.munmap(address, size)
    if released is not None:
        released()
