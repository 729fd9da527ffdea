"""What a layer knows of VMs, memslots and vCPUs, learned from the ioctls that pass through it.

A layer cannot ask KVM which memslots a VM has: no ioctl tells. So it watches the ones that make and change them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from typing import Final, NamedTuple

from anykvm.abi import ioctls as n
from anykvm.abi.constants import KVM_MEM_READONLY
from anykvm.abi.structures import kvm_run, kvm_userspace_memory_region, kvm_userspace_memory_region2
from anykvm.backends.base import Backend

PAGE: Final = 4096
_REGIONS: Final = {
    n.KVM_SET_USER_MEMORY_REGION: kvm_userspace_memory_region,
    n.KVM_SET_USER_MEMORY_REGION2: kvm_userspace_memory_region2,
}
LEARNED: Final = frozenset((n.KVM_CREATE_VM, n.KVM_CREATE_VCPU, *_REGIONS))
"""The ioctls that ``Shadow.learn`` wants to see after they worked."""


class Slot(NamedTuple):
    """A memslot. Its number has the address space in the upper 16 bits, as KVM has it."""

    slot: int
    flags: int
    gpa: int
    size: int
    hva: int

    @property
    def read_only(self) -> bool:
        """KVM_MEM_READONLY: writes are device accesses, and table entries in it are not written."""
        return bool(self.flags & KVM_MEM_READONLY)


class ShadowVm:
    """A VM: its memslots by number."""

    def __init__(self) -> None:
        """Without a memslot."""
        self.slots: dict[int, Slot] = {}


class _Page(ctypes.c_uint8 * PAGE):  # type: ignore[misc]
    """A class of its own, because only such a one takes weak references."""


class ShadowVcpu:
    """A vCPU: its VM, its number, and the layer's own mapping of its kvm_run page.

    The mapping lives as long as this, or a view of it.
    """

    __slots__ = ("__weakref__", "page", "vcpu_id", "view", "vm")

    def __init__(self, vm: ShadowVm, vcpu_id: int) -> None:
        """Without a mapping yet."""
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.page = 0
        """Address of the mapping; 0: it could not be made."""
        self.view = memoryview(b"")
        """The page's bytes, live; empty if there is no mapping."""

    def map(self, inner: Backend, fd: int) -> None:
        """Map the page of descriptor ``fd``, if that can be done."""
        with contextlib.suppress(OSError):
            self.page = inner.mmap(fd, PAGE, 0)
            array = _Page.from_address(self.page)
            weakref.finalize(array, _unmap, inner, self.page).atexit = False
            self.view = memoryview(array).cast("B")

    @property
    def run(self) -> kvm_run:
        """The kvm_run page, live. ``page`` must not be 0."""
        return kvm_run.from_address(self.page)


class Shadow:
    """VMs and vCPUs by descriptor, as ``inner`` made them.

    A VM made elsewhere, and a duplicate of a descriptor, are unknown here.
    """

    def __init__(self, inner: Backend) -> None:
        """Know nothing yet; ``inner`` is asked for the mappings of kvm_run."""
        self._inner = inner
        self._lock = threading.Lock()
        self._vms: dict[int, ShadowVm] = {}
        self._vcpus: dict[int, ShadowVcpu] = {}

    def vcpu(self, fd: int) -> ShadowVcpu | None:
        """Find the vCPU of a descriptor; None for one that was not seen being made."""
        return self._vcpus.get(fd)

    def vm(self, fd: int) -> ShadowVm | None:
        """Find the VM of a descriptor; None for one that was not seen being made."""
        return self._vms.get(fd)

    def slots(self, vm: ShadowVm) -> tuple[Slot, ...]:
        """List a VM's memslots as they are now."""
        with self._lock:
            return tuple(vm.slots.values())

    def learn(self, fd: int, request: int, arg: int, result: int) -> None:
        """Take note of an ioctl in ``LEARNED`` that worked."""
        with self._lock:
            if request == n.KVM_CREATE_VM:
                self._vms[result] = ShadowVm()
            elif (vm := self._vms.get(fd)) is None:
                return
            elif request == n.KVM_CREATE_VCPU:
                made = self._vcpus[result] = ShadowVcpu(vm, arg)
                made.map(self._inner, result)  # now: later it could land where guest memory was taken away
            else:
                _learn_region(vm, request, arg)

    def close(self, fd: int) -> None:
        """Forget a descriptor that is about to be closed."""
        with self._lock:
            self._vms.pop(fd, None)
            vcpu = self._vcpus.pop(fd, None)
        del vcpu  # unmapped here, or when a thread that still looks at it is done


def _unmap(inner: Backend, page: int) -> None:
    with contextlib.suppress(OSError):
        inner.munmap(page, PAGE)


def _learn_region(vm: ShadowVm, request: int, arg: int) -> None:
    region = _REGIONS[request].from_address(arg)
    if region.memory_size:
        values = region.slot, region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr
        vm.slots[region.slot] = Slot(*values)
    else:
        vm.slots.pop(region.slot, None)
