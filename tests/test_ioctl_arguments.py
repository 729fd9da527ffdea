"""Whatever an ioctl's argument holds: a result or an errno, never another exception, and the VM still works."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anykvm
from anykvm import GuestMemory, Kvm, Vcpu, Vm, abi
from anykvm.abi.arguments import ARGUMENTS
from anykvm.abi.names import ioctl_name
from anykvm.backends.soft import PROFILES, SoftBackend
from anykvm.backends.soft.system import _HANDLERS as SYSTEM
from anykvm.backends.soft.vcpu_state import HANDLERS as VCPU
from anykvm.backends.soft.vm import _HANDLERS as VM
from anykvm.host import libc
from soft_helpers import PAGE

SCOPES: dict[str, dict[int, Any]] = {"kvm": dict(SYSTEM), "vm": dict(VM), "vcpu": dict(VCPU)}
VM_TYPES = {"default": abi.KVM_X86_DEFAULT_VM, "protected": abi.KVM_X86_SW_PROTECTED_VM}
ROOM = 64 * 1024


def boundaries(bits: int) -> list[int]:
    """Numbers at which something of so many bits changes: for C, and for what it indexes, shifts or counts."""
    edges = {0, 1, 2, 3, 63, 64, 65, 127, 128, 254, 255, 256, 257, PAGE - 1, PAGE, PAGE + 1, 32763, 32764, 32765}
    for power in (7, 8, 15, 16, 17, 31, 32, 33, 40, 47, 51, 52, 63, 64):
        edges |= {(1 << power) + step for step in (-PAGE, -1, 0, 1, PAGE)}
    edges |= {as_id << 16 | slot for as_id in (1, 2, 3, 0x7FFF, 0x8000, 0xFFFF) for slot in (0, 1, 32764, 0xFFFF)}
    return sorted(edge for edge in edges if 0 <= edge < 1 << bits)


def places(kind: type[ctypes.Structure], base: int = 0) -> Iterator[tuple[int, int]]:
    """Offset and size of every number in a structure; of arrays the first two and the last."""
    for name, field_type, *_ in kind._fields_:
        yield from _places(field_type, base + getattr(kind, name).offset)


def _places(kind: Any, offset: int) -> Iterator[tuple[int, int]]:
    if issubclass(kind, ctypes.Array):
        for index in sorted({0, 1, kind._length_ - 1} & set(range(kind._length_))):
            yield from _places(kind._type_, offset + index * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure | ctypes.Union):
        for name, field_type, *_ in kind._fields_:
            yield from _places(field_type, offset + getattr(kind, name).offset)
    else:
        yield offset, ctypes.sizeof(kind)


class World:
    """A VM with a vCPU, two slots and a log; an argument with room behind it."""

    def __init__(self, type: int, profile: str = "documented", ring: bool = False) -> None:
        self.backend = SoftBackend(profile)
        self.kvm = self.backend.open()
        self.vm = self.backend.ioctl(self.kvm, abi.KVM_CREATE_VM, type)
        if ring:
            cap = abi.kvm_enable_cap(cap=abi.KVM_CAP_DIRTY_LOG_RING, args=(65536,))
            self.backend.ioctl(self.vm, abi.KVM_ENABLE_CAP, ctypes.addressof(cap))
        self.vcpu = self.backend.ioctl(self.vm, abi.KVM_CREATE_VCPU)
        self.memory = libc.mmap(0, 16 * PAGE, libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        self.buffer = libc.mmap(0, ROOM, libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        self.fds = {"kvm": self.kvm, "vm": self.vm, "vcpu": self.vcpu}
        self.slots()

    def slots(self) -> None:
        for slot in (0, 1):
            region = abi.kvm_userspace_memory_region(slot, 1, slot << 16, 8 * PAGE, self.memory + slot * 8 * PAGE)
            with contextlib.suppress(OSError):
                self.backend.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))

    def do(self, scope: str, request: int, argument: int) -> int:
        """Errno or 0. Any exception but OSError goes through."""
        try:
            result = self.backend.ioctl(self.fds[scope], request, argument)
        except OSError as error:
            assert error.errno in errno.errorcode
            assert str(error.strerror).startswith(ioctl_name(request) + ":")
            return int(error.errno or 0)
        if request in (abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU, abi.KVM_CREATE_GUEST_MEMFD):
            self.backend.close(result)
        return 0

    def put(self, content: bytes) -> int:
        ctypes.memset(self.buffer, 0, 8192)
        ctypes.memmove(self.buffer, content, len(content))
        return self.buffer

    def works(self) -> None:
        assert self.do("vcpu", abi.KVM_GET_REGS, self.buffer) == 0
        assert self.do("vm", abi.KVM_CHECK_EXTENSION, 3) == 0

    def close(self) -> None:
        for fd in (self.vcpu, self.vm, self.kvm):
            self.backend.close(fd)
        libc.munmap(self.memory, 16 * PAGE)
        libc.munmap(self.buffer, ROOM)


def ioctls() -> list[tuple[str, int]]:
    return [(scope, request) for scope, requests in SCOPES.items() for request in sorted(requests)]


@pytest.fixture(scope="module", params=VM_TYPES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(VM_TYPES[request.param])
    yield made
    made.close()


def identify(value: object) -> str | None:
    return ioctl_name(value) if isinstance(value, int) else None


@pytest.mark.parametrize(("scope", "request_"), ioctls(), ids=identify)
def test_every_field_at_every_boundary(world: World, scope: str, request_: int) -> None:
    kind = ARGUMENTS.get(request_)
    if kind is None:
        for number in boundaries(64):
            world.do(scope, request_, number)
        world.works()
        return
    size = ctypes.sizeof(kind)
    for template in (bytes(size), b"\xff" * size):
        for offset, width in places(kind):
            for number in boundaries(8 * width):
                content = template[:offset] + number.to_bytes(width, "little") + template[offset + width :]
                world.do(scope, request_, world.put(content))
    world.works()
    world.slots()


def test_slots_that_cannot_be(world: World) -> None:
    """The kind of the fault that this is for: an address space or a slot there is not, in each ioctl that names one."""
    spaces = world.backend.ioctl(world.vm, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_MULTI_ADDRESS_SPACE) or 1
    for as_id in (*range(spaces, 4), 0x7FFF, 0x8000, 0xFFFF):
        for slot in (0, 1, 32763):
            name = as_id << 16 | slot
            log, clear = abi.kvm_dirty_log(slot=name), abi.kvm_clear_dirty_log(slot=name, num_pages=64)
            one = abi.kvm_userspace_memory_region(name, 0, 0, PAGE, world.memory)
            two = abi.kvm_userspace_memory_region2(name, 0, 0, PAGE, world.memory)
            for request, data in (
                (abi.KVM_GET_DIRTY_LOG, log),
                (abi.KVM_CLEAR_DIRTY_LOG, clear),
                (abi.KVM_SET_USER_MEMORY_REGION, one),
                (abi.KVM_SET_USER_MEMORY_REGION2, two),
            ):
                assert world.do("vm", request, ctypes.addressof(data)) == errno.EINVAL


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type", VM_TYPES)
def test_several_fields_at_once(data: st.DataObject, profile: str, type: str) -> None:
    """Sequences of ioctls whose arguments have several unusual fields, on VMs of each type, with and without rings."""
    world = World(VM_TYPES[type], profile, ring=data.draw(st.booleans()))
    try:
        for _ in range(data.draw(st.integers(1, 12))):
            scope, request = data.draw(st.sampled_from(ioctls()))
            if (request, profile) == (abi.KVM_PRE_FAULT_MEMORY, "linux-6.12"):
                continue  # after a slot's deletion it waits for a signal, as that kernel does
            kind = ARGUMENTS.get(request)
            if kind is None:
                world.do(scope, request, data.draw(st.sampled_from(boundaries(64))))
                continue
            content = bytearray(ctypes.sizeof(kind))
            for offset, width in places(kind):
                if data.draw(st.booleans()):
                    number = data.draw(st.sampled_from([*boundaries(8 * width), *_addresses(world, width)]))
                    content[offset : offset + width] = number.to_bytes(width, "little")
            world.do(scope, request, world.put(bytes(content)))
        world.works()
    finally:
        world.close()


def _addresses(world: World, width: int) -> list[int]:
    return [world.memory, world.memory + PAGE, world.buffer] if width == 8 else []


@pytest.mark.parametrize("request_", [-1, -(1 << 31), 1 << 32, 1 << 63, 1 << 64, 1 << 200, 0x8090AE81 - (1 << 32)])
@pytest.mark.parametrize("argument", [-1, -(1 << 63), 1 << 64, 1 << 200])
def test_numbers_beyond_c(world: World, request_: int, argument: int) -> None:
    """They are cut as C cuts them."""
    for scope in SCOPES:
        with contextlib.suppress(OSError):
            world.backend.ioctl(world.fds[scope], request_, argument)
        with contextlib.suppress(OSError):
            world.backend.ioctl(world.fds[scope], abi.KVM_RUN, argument)
    for request in {request for _, request in ioctls()} - {abi.KVM_CREATE_VM}:
        world.do("vm", request, argument)


# -- the same by the typed API -----------------------------------------------------------------------------------------

ODD = [-(1 << 63), -(1 << 31), -1, 0, 1, 2, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
ODD += [1 << 47, 1 << 48, 1 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200]
NOT_CALLED = {"close", "run", "fileno", "ioctl"}


def methods(kind: type) -> list[str]:
    """Public methods with arguments."""
    return [
        name
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name not in NOT_CALLED and len(inspect.signature(function).parameters) > 1
    ]


@pytest.mark.parametrize("name", [f"{kind.__name__}.{name}" for kind in (Kvm, Vm, Vcpu) for name in methods(kind)])
def test_odd_numbers_by_the_api(name: str) -> None:
    """Each number in turn; the others are zero. What leaves is an OSError, or says that the argument cannot be."""
    kind, _, method = name.partition(".")
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm:
        target: Any = {"Kvm": kvm, "Vm": vm, "Vcpu": vm.create_vcpu()}[kind]
        parameters = list(inspect.signature(getattr(target, method)).parameters.values())
        kinds = get_type_hints(getattr(type(target), method))
        required = {p.name: _value(kinds[p.name]) for p in parameters if p.default is p.empty}
        for parameter in parameters:
            if kinds[parameter.name] not in (int, int | None):
                continue
            for number in ODD:
                arguments = required | {parameter.name: number}
                try:
                    result = getattr(target, method)(**arguments)
                except OSError as error:
                    assert error.errno in errno.errorcode
                except (ValueError, TypeError, OverflowError) as error:
                    assert str(error), arguments
                else:
                    if hasattr(result, "close") and result is not target:
                        result.close()
        assert kvm.get_api_version() == 12


def _value(kind: Any) -> Any:
    """A plain one of an argument's type."""
    if isinstance(kind, type) and issubclass(kind, ctypes.Structure | bytes | int | str):
        return kind()
    return (
        GuestMemory(PAGE) if "emory" in str(kind) else [] if "Sequence" in str(kind) or "Iterable" in str(kind) else b""
    )
