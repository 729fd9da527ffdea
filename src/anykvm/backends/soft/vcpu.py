"""A vCPU: its pages, its descriptor, and which of its ioctls there are. Source: kvm_main.c:kvm_vcpu_ioctl()."""

from __future__ import annotations

import errno
import os
from ctypes import byref, c_uint64
from typing import TYPE_CHECKING, Final

from anykvm.backends.soft.dirty import ENTRY_SIZE, RING_OFFSET
from anykvm.backends.soft.engine import values
from anykvm.backends.soft.engine.library import library
from anykvm.backends.soft.errors import Refused
from anykvm.backends.soft.files import FILES, File
from anykvm.backends.soft.profiles import Profile, Purge
from anykvm.backends.soft.vcpu_state import HANDLERS, MAX_IO_MSRS
from anykvm.host.libc import munmap

if TYPE_CHECKING:
    from anykvm.backends.soft.vm import Vm

VCPU_MMAP_SIZE: Final = 3 * 4096
"""KVM_GET_VCPU_MMAP_SIZE: kvm_run, the PIO data page, the coalesced ring."""
_KVMIO: Final = 0xAE
_PURGES: Final = {
    Purge.VCPU_RUN: values.AK_PURGE_VCPU_RUN,
    Purge.BEFORE_LOCK: values.AK_PURGE_BEFORE_LOCK,
    Purge.AFTER_LOCK: values.AK_PURGE_AFTER_LOCK,
    Purge.AFTER_COMPLETION: values.AK_PURGE_AFTER_COMPLETION,
    Purge.NEVER: values.AK_PURGE_NEVER,
}
__all__ = ["MAX_IO_MSRS", "VCPU_MMAP_SIZE", "Vcpu", "VcpuFile", "create_vcpu"]


class Vcpu:
    """struct kvm_vcpu. Owned by its VM, which destroys it."""

    def __init__(self, address: int, vcpu_id: int, pages: int, ring: int = 0, ring_size: int = 0) -> None:
        """``address`` of struct ak_vcpu, ``pages`` and ``ring`` of the backend's mappings of its file."""
        self.address = address
        self.vcpu_id = vcpu_id
        self.pages = pages
        self.ring = ring
        self.ring_size = ring_size

    def destroy(self) -> None:
        """Free it; nothing may use it any more."""
        library().ak_vcpu_destroy(self.address)
        munmap(self.pages, VCPU_MMAP_SIZE)
        if self.ring_size:
            munmap(self.ring, self.ring_size)


class VcpuFile(int, File):
    """A vCPU's descriptor; as a number, the address of its struct ak_vcpu, for calls of the engine.

    It keeps the VM, and so the vCPU. Whoever runs the vCPU holds the file (``run.kvm_run``).
    """

    kind = "anon_inode:kvm-vcpu"
    direct = frozenset(HANDLERS)
    """Each is copying, and one call into C."""
    mmap_size = VCPU_MMAP_SIZE
    vcpu: Vcpu
    vm: Vm

    def __new__(cls, vcpu: Vcpu, vm: Vm) -> VcpuFile:
        """Keeps ``vm`` alive, and so ``vcpu``."""
        self = super().__new__(cls, vcpu.address)
        self.vcpu = vcpu
        self.vm = vm
        self.mmap_size = file_size(vcpu.ring_size)
        self.vcpu_address = vcpu.address
        return self

    def ioctl(self, request: int, arg: int) -> int:
        """Do a vCPU ioctl other than KVM_RUN; it waits while another thread is in one.

        Refused: EIO as ``Vm.check_alive``; EINVAL for one a vCPU does not have; as each says.
        """
        self.vm.check_alive()
        handler = HANDLERS.get(request)
        if handler is None or request in self.vm.profile.absent_ioctls:
            what = "not an ioctl of a vCPU, or not offered" if request >> 8 & 0xFF == _KVMIO else "not an ioctl of KVM"
            raise Refused(errno.EINVAL, what)
        return handler(self, arg)


def file_size(ring_size: int) -> int:
    """Bytes of a vCPU's file: its pages, and from RING_OFFSET on its dirty ring; nothing is between them."""
    return RING_OFFSET + ring_size if ring_size else VCPU_MMAP_SIZE


def _behaviour(profile: Profile) -> int:
    """What the engine asks the profile: ``enum ak_behaviour``."""
    choices = {
        values.AK_INIT_AFTER_SHUTDOWN: profile.init_after_shutdown,
        values.AK_EMULATE_IN_DELIVERY: profile.emulate_in_delivery,
        values.AK_ANY_EFER: profile.any_efer,
        values.AK_SYNC_LOW_HALF: profile.sync_low_half,
        values.AK_STALE_PRE_FAULT: profile.stale_pre_fault,
        values.AK_HYPERCALL_6_12: profile.hypercall_as_6_12,
    }
    return sum(bit for bit, chosen in choices.items() if chosen)


def create_vcpu(vm_address: int, vcpu_id: int, profile: Profile, *, bsp: bool, ring_size: int = 0) -> tuple[int, Vcpu]:
    """Make a vCPU of the engine's VM and a descriptor with its pages.

    ``profile``: whose KVM it belongs to; ``bsp``: it boots the VM; ``ring_size``: bytes of its dirty ring.
    Raises OSError: EMFILE, ENOMEM; Refused: ENOMEM, EAGAIN (no thread could be made for ``engine/ticker.c``).
    """
    result: int = library().ak_ticker_start()
    if result:
        what = "no thread that makes KVM_RUN look for signals"
        raise Refused(-result, f"{what} (RLIMIT_NPROC, RLIMIT_AS, a cgroup's pids.max)")
    created = c_uint64()
    fd = FILES.create(f"kvm-vcpu:{vcpu_id}", file_size(ring_size))
    pages = ring = 0
    try:
        pages = FILES.map(fd, VCPU_MMAP_SIZE, 0)
        ring = FILES.map(fd, ring_size, RING_OFFSET) if ring_size else 0
        result = library().ak_vcpu_create(vm_address, vcpu_id, pages, byref(created))
        if result:
            raise Refused(-result, "no memory for a vCPU")
        purge, behaviour = _PURGES[profile.purge], _behaviour(profile)
        library().ak_vcpu_configure(created, profile.annotate_unresolved, behaviour, purge, bsp)
        if ring_size:
            library().ak_dirty_ring_setup(created, ring, ring_size // ENTRY_SIZE)
        return fd, Vcpu(created.value, vcpu_id, pages, ring, ring_size)
    except BaseException:
        if created:
            library().ak_vcpu_destroy(created)
        if pages:
            munmap(pages, VCPU_MMAP_SIZE)
        if ring:
            munmap(ring, ring_size)
        os.close(fd)
        raise
