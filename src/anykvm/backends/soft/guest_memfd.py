"""KVM_CREATE_GUEST_MEMFD: files of guest memory. Source: virt/kvm/guest_memfd.c.

The descriptor is a memfd of a size that nobody can change, so fallocate(2), fstat(2), mmap(2), dup(2) and SCM_RIGHTS
work on it, and the guest sees at once what they do. What the kernel's file refuses and a memfd does not (read(2),
pread(2), lseek(2), ftruncate(2), mmap(2) without GUEST_MEMFD_FLAG_MMAP, fallocate(2) of unaligned ranges, ...) is
refused with the kernel's errno in this process, for everything that calls the C library (engine/gmem_file.c). Not
refused: raw system calls, and what other processes do that get the descriptor.
Nothing here keeps the host out of private memory: there is no encryption.

When the caller's last descriptor and mapping are gone, so is the file: at once if a descriptor is closed by
``SoftBackend.close``; else (close(2), munmap(2)) when a vCPU next enters the guest, which one that is running there
does every millisecond. The pages themselves go when any KVM file is next closed by the backend.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from ctypes import byref, c_uint64
from typing import TYPE_CHECKING, Final

from anykvm.abi import constants as c
from anykvm.abi.structures import kvm_create_guest_memfd
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.file_size import set_file_size
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.usercopy import copy_from_user
from anykvm.host.atomic import Finalizer, atomically
from anykvm.host.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from anykvm.backends.soft.vm import Vm

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_LFS_FILESIZE: Final = (1 << 63) - 1
_serials: Final = itertools.count(1)


class GuestMemfd(File):
    """struct gmem_file. It keeps its VM; slots bound to it do not keep it: with its last descriptor and mapping go its
    pages, and what the slots then hold is EFAULT."""

    kind = "[guest-memfd]"

    def __init__(self, vm: Vm, address: int, size: int, flags: int) -> None:
        """``address`` of the engine's struct ak_gmem; ``flags`` GUEST_MEMFD_FLAG_*."""
        self.vm = vm
        self.address = address
        self.size = size
        self.flags = flags
        self.serial = next(_serials)
        """Never used twice, as ``address`` may be."""
        self.hidden_fd = library().ak_gmem_fd(address)
        if self.mappable:
            self.mmap_size = size
        Finalizer(self, _release, vm, address, library().ak_mm_generation())

    @property
    def mappable(self) -> bool:
        """GUEST_MEMFD_FLAG_MMAP: user space may map it, and all guest accesses of its slots use it."""
        return bool(self.flags & c.GUEST_MEMFD_FLAG_MMAP)

    def map(self, fd: int, length: int, offset: int) -> int:
        """kvm_gmem_mmap(): map pages; private ones are SIGBUS when touched (kvm_gmem_fault_user_mapping())."""
        address: int = library().ak_gmem_mmap(fd, length, offset)
        if address < 0:
            raise OSError(-address, f"mmap(fd={fd}, length={length:#x}, offset={offset:#x}): {os.strerror(-address)}")
        return address


def _release(vm: Vm, address: int, generation: int) -> None:
    """kvm_gmem_release(). A forked child's copy is left alone."""
    engine = library()
    if engine.ak_mm_generation() == generation:
        engine.ak_gmem_destroy(vm.address, address)


def create_guest_memfd(vm: Vm, arg: int) -> int:
    """KVM_CREATE_GUEST_MEMFD: returns a descriptor, which a program that is executed inherits.

    Refused: EFAULT; EINVAL for flags this VM does not have, a size that is not positive or not page aligned.
    Raises OSError: EMFILE; ENOMEM, also for a size that cannot be mapped; what open(2) says without /proc.
    """
    request = copy_from_user(kvm_create_guest_memfd, arg)
    valid = vm.check_extension(c.KVM_CAP_GUEST_MEMFD_FLAGS)
    if request.flags & ~valid:
        raise Refused(errno.EINVAL, f"flags: {request.flags & ~valid:#x} is not among KVM_CAP_GUEST_MEMFD_FLAGS")
    size = request.size
    if not 0 < size <= _MAX_LFS_FILESIZE or size % PAGE_SIZE:
        raise Refused(errno.EINVAL, f"size is 0 or not page aligned, or beyond files: {size:#x}")
    address = c_uint64()
    file = None
    fd = os.memfd_create("guest_memfd", os.MFD_ALLOW_SEALING)
    try:
        set_file_size(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.fchmod(fd, 0o600)
        os.set_inheritable(fd, True)
        result: int = library().ak_gmem_create(vm.address, fd, size, request.flags, byref(address))
        if result:
            why = {
                errno.ENOENT: "/proc is needed for it, and is not there",
                errno.ENOMEM: f"a file of {size:#x} bytes cannot be mapped",
            }
            raise Refused(-result, why.get(-result, ""))
        file = GuestMemfd(vm, address.value, size, request.flags)
        FILES.install(fd, file)
    except BaseException:
        os.close(fd)
        if address and file is None:
            library().ak_gmem_destroy(vm.address, address)
        raise
    return fd


def fail_page(fd: int, offset: int, error: int) -> None:
    """Let the look-up of one page of a guest_memfd fail: for tests of what needs a broken or exhausted machine.

    ``error``: EHWPOISON, ENOMEM or any other errno, which KVM_RUN and KVM_PRE_FAULT_MEMORY return with
    KVM_EXIT_MEMORY_FAULT (mmu.c:kvm_mmu_faultin_pfn_gmem()); 0 ends it. ``offset`` in bytes, of any byte of the page.
    In force for every vCPU on return.
    Raises OSError: EBADF; EINVAL for a descriptor that is no guest_memfd, an offset beyond its end; ENOMEM; EDEADLK in
    a device's fault handler that a vCPU of the VM waits for.
    """
    atomically(_fail_page, fd, offset, error)


def _fail_page(fd: int, offset: int, error: int) -> None:
    try:
        file = FILES.get(fd)
    except Refused as refused:
        code = errno.EINVAL if refused.errno == errno.ENOTTY else refused.errno
        raise OSError(code, os.strerror(code)) from None
    if not isinstance(file, GuestMemfd) or not 0 <= offset < file.size:
        raise OSError(errno.EINVAL, f"fail_page(fd={fd}, offset={offset:#x}): not in a guest_memfd")
    try:
        file.vm.check_not_in_device_fault()
    except Refused as refused:
        raise OSError(refused.errno, f"fail_page: {refused.detail}") from None
    page = offset // PAGE_SIZE * PAGE_SIZE
    result: int = library().ak_gmem_inject(file.vm.address, file.address, page, error)
    if result:
        raise OSError(-result, os.strerror(-result))
