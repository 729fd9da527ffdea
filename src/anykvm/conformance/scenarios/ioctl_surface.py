"""Which ioctls a descriptor has, and what is checked before any of them does something: ABI.md 5, 5.1."""

from __future__ import annotations

import os
from typing import Final

from anykvm.abi import constants as c
from anykvm.abi import ioctls as n
from anykvm.abi.names import ioctl_name
from anykvm.api.handle import Handle
from anykvm.backends.base import Backend
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import attempt
from anykvm.conformance.scenario import Lab, scenario

AREA = "ioctls"
_BAD_POINTER: Final = 8
_NO_SUCH: Final = (0xAEFF, 0x4008AEFE, 0x8008AEFD, 0xC008AEFC)
"""_IO, _IOW, _IOR, _IOWR of KVMIO with numbers that nothing has."""
_OTHER_TYPE: Final = (0x1280, 0x5401, 0xAF80)
"""The numbers of KVM_RUN, TCGETS and KVM_RUN again, of other types than KVMIO."""
_VM_POINTERS: Final = (
    n.KVM_SET_USER_MEMORY_REGION,
    n.KVM_SET_USER_MEMORY_REGION2,
    n.KVM_GET_DIRTY_LOG,
    n.KVM_CLEAR_DIRTY_LOG,
    n.KVM_ENABLE_CAP,
    n.KVM_SET_IDENTITY_MAP_ADDR,
)
_VCPU_POINTERS: Final = (
    n.KVM_GET_REGS,
    n.KVM_SET_REGS,
    n.KVM_GET_SREGS,
    n.KVM_SET_SREGS,
    n.KVM_GET_SREGS2,
    n.KVM_SET_SREGS2,
    n.KVM_GET_FPU,
    n.KVM_SET_FPU,
    n.KVM_TRANSLATE,
    n.KVM_INTERRUPT,
    n.KVM_GET_MSRS,
    n.KVM_SET_MSRS,
    n.KVM_SET_CPUID,
    n.KVM_SET_CPUID2,
    n.KVM_GET_CPUID2,
    n.KVM_SET_SIGNAL_MASK,
    n.KVM_GET_MP_STATE,
    n.KVM_SET_MP_STATE,
    n.KVM_GET_VCPU_EVENTS,
    n.KVM_SET_VCPU_EVENTS,
    n.KVM_GET_DEBUGREGS,
    n.KVM_SET_DEBUGREGS,
    n.KVM_GET_XSAVE,
    n.KVM_SET_XSAVE,
    n.KVM_GET_XCRS,
    n.KVM_SET_XCRS,
    n.KVM_ENABLE_CAP,
)
_SYSTEM_POINTERS: Final = (
    n.KVM_GET_SUPPORTED_CPUID,
    n.KVM_GET_EMULATED_CPUID,
    n.KVM_GET_MSR_INDEX_LIST,
    n.KVM_GET_MSR_FEATURE_INDEX_LIST,
    n.KVM_GET_MSRS,
)


def _unknown(lab: Lab, handle: Handle) -> None:
    for request in _NO_SUCH + _OTHER_TYPE:
        lab.ioctl(hex(request), handle, request)


@scenario("ioctls_unknown_system", area=AREA)
def ioctls_unknown_system(lab: Lab) -> None:
    """/dev/kvm has no such ioctl."""
    _unknown(lab, lab.machine().kvm)


@scenario("ioctls_unknown_vm", area=AREA)
def ioctls_unknown_vm(lab: Lab) -> None:
    """A VM has no such ioctl."""
    _unknown(lab, lab.machine().vm)


@scenario("ioctls_unknown_vcpu", area=AREA)
def ioctls_unknown_vcpu(lab: Lab) -> None:
    """A vCPU has no such ioctl; KVM_RUN's number of another type is no KVM_RUN (row 2), and kvm_run stays."""
    m = lab.machine()
    m.run_page.exit_reason, m.run_page.flags = 0x1234, 0x55
    _unknown(lab, m.vcpu)
    lab.note("kvm_run", reason=m.run_page.exit_reason, flags=m.run_page.flags)


@scenario("ioctls_wrong_fd", area=AREA)
def ioctls_wrong_fd(lab: Lab) -> None:
    """An ioctl of one kind of descriptor on another kind."""
    m = lab.machine()
    for name, handle, requests in (
        ("system", m.kvm, (n.KVM_RUN, n.KVM_GET_REGS, n.KVM_CREATE_VCPU, n.KVM_SET_USER_MEMORY_REGION)),
        ("vm", m.vm, (n.KVM_RUN, n.KVM_GET_REGS, n.KVM_CREATE_VM, n.KVM_GET_API_VERSION, n.KVM_GET_SUPPORTED_CPUID)),
        ("vcpu", m.vcpu, (n.KVM_CREATE_VCPU, n.KVM_SET_USER_MEMORY_REGION, n.KVM_GET_API_VERSION, n.KVM_CREATE_VM)),
    ):
        for request in requests:
            lab.ioctl(f"{ioctl_name(request)}_on_{name}", handle, request, _BAD_POINTER)


@scenario("ioctls_bad_pointers_system", area=AREA)
def ioctls_bad_pointers_system(lab: Lab) -> None:
    """Each ioctl of /dev/kvm with a structure, given an address where nothing is."""
    m = lab.machine()
    for request in _SYSTEM_POINTERS:
        lab.ioctl(ioctl_name(request), m.kvm, request, _BAD_POINTER)


@scenario("ioctls_bad_pointers_vm", area=AREA)
def ioctls_bad_pointers_vm(lab: Lab) -> None:
    """Each ioctl of a VM with a structure, given an address where nothing is."""
    vm = lab.machine().kvm.create_vm()
    for request in _VM_POINTERS:
        lab.ioctl(ioctl_name(request), vm, request, _BAD_POINTER)


@scenario("ioctls_bad_pointers_vcpu", area=AREA)
def ioctls_bad_pointers_vcpu(lab: Lab) -> None:
    """Each ioctl of a vCPU with a structure, given an address where nothing is; nothing has changed."""
    m = lab.machine()
    m.registers(rax=0x55)
    for request in _VCPU_POINTERS:
        lab.ioctl(ioctl_name(request), m.vcpu, request, _BAD_POINTER)
    registers = m.vcpu.get_regs()
    lab.note("regs", rip=hex(registers.rip), rax=hex(registers.rax))


@scenario("ioctls_after_fork", area=AREA)
def ioctls_after_fork(lab: Lab) -> None:
    """In a forked child VM and vCPU say EIO, before anything else is looked at; /dev/kvm works (row 1)."""
    m = lab.machine()
    for step, handle, request, arg in (
        ("GET_API_VERSION", m.kvm, n.KVM_GET_API_VERSION, 0),
        ("CHECK_EXTENSION_vm", m.vm, n.KVM_CHECK_EXTENSION, c.KVM_CAP_USER_MEMORY),
        ("SET_USER_MEMORY_REGION_bad_pointer", m.vm, n.KVM_SET_USER_MEMORY_REGION, _BAD_POINTER),
        ("unknown_vm", m.vm, _NO_SUCH[0], 0),
        ("GET_REGS_bad_pointer", m.vcpu, n.KVM_GET_REGS, _BAD_POINTER),
        ("unknown_vcpu", m.vcpu, _NO_SUCH[0], 0),
        ("other_type_vcpu", m.vcpu, _OTHER_TYPE[0], 0),
        ("RUN_argument_1", m.vcpu, n.KVM_RUN, 1),
    ):
        lab.note(step, errno=_in_child(handle, request, arg))
    lab.ioctl("parent_CHECK_EXTENSION", m.vm, n.KVM_CHECK_EXTENSION, c.KVM_CAP_USER_MEMORY)


def _in_child(handle: Handle, request: int, arg: int) -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes((attempt(lambda: handle.ioctl(request, arg)).errno & 0xFF,)))
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1)
    os.waitpid(child, 0)
    return said[0]


@scenario("ioctls_closed_fd", area=AREA)
def ioctls_closed_fd(lab: Lab) -> None:
    """EBADF when closed; a vCPU outlives its VM's descriptor, and a VM /dev/kvm's."""
    m = lab.machine()
    backend = m.kvm.backend
    fd = backend.open()
    made = backend.ioctl(fd, n.KVM_CREATE_VM)
    backend.close(fd)
    lab.step("system_closed", lambda: backend.ioctl(fd, n.KVM_GET_API_VERSION))
    lab.step("vm_of_closed_system", lambda: backend.ioctl(made, n.KVM_CHECK_EXTENSION, c.KVM_CAP_USER_MEMORY))
    vcpu = backend.ioctl(made, n.KVM_CREATE_VCPU)
    backend.close(made)
    lab.step("vm_closed", lambda: backend.ioctl(made, n.KVM_CHECK_EXTENSION, c.KVM_CAP_USER_MEMORY))
    lab.step("vcpu_of_closed_vm", lambda: backend.ioctl(vcpu, n.KVM_RUN, 1))
    backend.close(vcpu)
    lab.step("vcpu_closed", lambda: backend.ioctl(vcpu, n.KVM_RUN, 1))
    lab.step("minus_1", lambda: backend.ioctl(-1, n.KVM_RUN))


@scenario("system_arguments", area=AREA)
def system_arguments(lab: Lab) -> None:
    """The system ioctls that take no argument refuse one; a VM type is one of a few; a capability may be any number."""
    m = lab.machine()
    for name, request in (("API_VERSION", n.KVM_GET_API_VERSION), ("MMAP_SIZE", n.KVM_GET_VCPU_MMAP_SIZE)):
        for arg in (0, 1, 1 << 63):
            lab.ioctl(name, m.kvm, request, arg, given=hex(arg))
    for arg in (31, 32, 64, 1 << 32, 1 << 63):
        lab.ioctl("CREATE_VM", m.kvm, n.KVM_CREATE_VM, arg, given=hex(arg))
    for arg in (0, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1):
        lab.ioctl("CHECK_EXTENSION", m.kvm, n.KVM_CHECK_EXTENSION, arg, given=hex(arg))
        lab.ioctl("CHECK_EXTENSION_vm", m.vm, n.KVM_CHECK_EXTENSION, arg, given=hex(arg))


@scenario("vcpu_ids", area=AREA, needs=("smp",))
def vcpu_ids(lab: Lab) -> None:
    """A vCPU's id is below KVM_CAP_MAX_VCPU_ID and its own; a limit set by KVM_ENABLE_CAP is kept."""
    m = lab.machine()
    limit = m.vm.check_extension(c.KVM_CAP_MAX_VCPU_ID)
    for step, number in (("id_0_again", 0), ("id_limit", limit), ("id_2^32", 1 << 32), ("id_minus_1", (1 << 64) - 1)):
        lab.ioctl(step, m.vm, n.KVM_CREATE_VCPU, number)
    _made(lab, m, "id_limit_minus_1", limit - 1)
    _made(lab, m, "id_7", 7)
    lab.ioctl("id_7_again", m.vm, n.KVM_CREATE_VCPU, 7)
    vm = m.kvm.create_vm()
    for step, args, flags in (
        ("limit_0", 0, 0),
        ("limit_too_large", limit + 1, 0),
        ("limit_flags", 4, 1),
        ("limit_4", 4, 0),
        ("limit_4_again", 4, 0),
        ("limit_5", 5, 0),
    ):
        lab.step(step, attempt(vm.enable_cap, c.KVM_CAP_MAX_VCPU_ID, args, flags=flags))
    lab.ioctl("id_4", vm, n.KVM_CREATE_VCPU, 4)
    lab.step("id_3", attempt(lambda: vm.create_vcpu(3).close()))


def _made(lab: Lab, m: Machine, step: str, number: int) -> None:
    """Make a vCPU; which descriptor it gets is no fact about KVM."""
    lab.step(step, attempt(lambda: m.vm.create_vcpu(number).close()))


@scenario("vcpu_pages", area=AREA)
def vcpu_pages(lab: Lab) -> None:
    """A vCPU's file: three pages, the same however often they are mapped; kvm_run is read-write (ABI.md 5.1)."""
    m = lab.machine()
    backend, fd, size = m.kvm.backend, m.vcpu.fileno(), m.kvm.get_vcpu_mmap_size()
    lab.note("size", size=size)
    for step, length, offset in (
        ("whole", size, 0),
        ("run", 4096, 0),
        ("pio", 4096, 4096),
        ("coalesced", 4096, 8192),
        ("unaligned_offset", 4096, 8),
        ("length_0", 0, 0),
    ):
        lab.step(step, attempt(_map, backend, fd, length, offset))
    lab.step("of_the_vm", attempt(_map, backend, m.vm.fileno(), 4096, 0))
    lab.step("of_the_system", attempt(_map, backend, m.kvm.fileno(), 4096, 0))
    m.run_page.exit_reason = 0x1234
    second = memoryview(m.vcpu.io_page)
    lab.note("seen_by_both", reason=int.from_bytes(bytes(second[8:12]), "little"))


def _map(backend: Backend, fd: int, length: int, offset: int) -> None:
    """Map; the address is no fact about KVM."""
    backend.mmap(fd, length, offset)


@scenario("vm_settings", area=AREA)
def vm_settings(lab: Lab) -> None:
    """Settings of a VM: TSS and identity map addresses, the booting vCPU, MMU pages; most only before a vCPU."""
    m = lab.machine()
    fresh = m.kvm.create_vm()
    for step, address in (
        ("TSS_ADDR_4G-3p", 0xFFFFD000),
        ("TSS_ADDR_4G-3p+1", 0xFFFFD001),
        ("TSS_ADDR_2^32", 1 << 32),
    ):
        lab.ioctl(step, fresh, n.KVM_SET_TSS_ADDR, address)
    for step, vm in (("before", fresh), ("after", m.vm)):
        lab.step(f"IDENTITY_MAP_ADDR_{step}_vcpu", attempt(vm.set_identity_map_addr, 0xFFFBC000))
        lab.ioctl(f"BOOT_CPU_ID_{step}_vcpu", vm, n.KVM_SET_BOOT_CPU_ID, 1)
    for pages in (0, 63, 64):
        lab.ioctl("NR_MMU_PAGES", fresh, n.KVM_SET_NR_MMU_PAGES, pages, pages=pages)
    lab.ioctl("GET_NR_MMU_PAGES", fresh, n.KVM_GET_NR_MMU_PAGES)
    limit = fresh.check_extension(c.KVM_CAP_MAX_VCPU_ID)
    lab.ioctl("BOOT_CPU_ID_limit", fresh, n.KVM_SET_BOOT_CPU_ID, limit + 1)


@scenario("enable_cap_unknown", area=AREA)
def enable_cap_unknown(lab: Lab) -> None:
    """KVM_ENABLE_CAP: unknown capabilities, flags; /dev/kvm has no such ioctl."""
    m = lab.machine()
    for cap in (0, c.KVM_CAP_USER_MEMORY, c.KVM_CAP_IMMEDIATE_EXIT, c.KVM_CAP_SYNC_REGS, 0xFFFFFFFF):
        for name, enable in (("vm", m.vm.enable_cap), ("vcpu", m.vcpu.enable_cap)):
            lab.step(name, attempt(enable, cap), cap=cap)
            lab.step(f"{name}_flags", attempt(enable, cap, flags=1), cap=cap)
