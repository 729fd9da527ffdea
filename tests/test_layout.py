"""What C and Python both describe agrees, and a difference of any kind ends the import."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from anykvm.abi import structures
from anykvm.backends.soft import native, vcpu
from anykvm.backends.soft.engine import library as engine
from anykvm.backends.soft.engine import values
from anykvm.backends.soft.engine.layout import Layout, mirrored, types_of
from anykvm.backends.soft.profiles import Purge
from anykvm.host import libc

LIBRARY = engine.library()
LAYOUT = Layout(LIBRARY)
VALUES = mirrored(vars(values))
MIRRORS: list[tuple[str, type[ctypes.Structure], bool]] = [
    ("ak_slot", engine.AkSlot, False),
    ("ak_exit", native.Exit, False),
    ("ak_vcpu", native.Vcpu, True),
]


def structure(fields: list[Any]) -> type[ctypes.Structure]:
    return type("Doctored", (ctypes.Structure,), {"_fields_": fields})


def test_all_agrees() -> None:
    engine.check_layout(LAYOUT)
    native.check_layout(LAYOUT)
    assert len(VALUES) > 30 and set(VALUES) <= set(LAYOUT.rows)


@pytest.mark.parametrize(("name", "mirror", "head"), MIRRORS)
def test_a_field_that_differs(name: str, mirror: type[ctypes.Structure], head: bool) -> None:
    """Each field missing, narrower, wider or elsewhere."""
    fields: list[Any] = list(mirror._fields_)
    other = {ctypes.c_uint32: ctypes.c_uint64, ctypes.c_int32: ctypes.c_uint16}
    for at, (field, kind) in enumerate(fields):
        changed = other.get(kind, ctypes.c_uint8 * (ctypes.sizeof(kind) // 2))
        assert ctypes.sizeof(changed) != ctypes.sizeof(kind)
        for doctored in (
            fields[:at] + fields[at + 1 :],
            [*fields[:at], (field, changed), *fields[at + 1 :]],
            [*fields[:at], ("new", ctypes.c_uint64), *fields[at:]],
        ):
            with pytest.raises(ImportError, match=rf"struct {name}"):
                LAYOUT.check_structure(name, structure(doctored), head=head)


def test_a_structure_whose_size_differs() -> None:
    """A field that neither the table of C nor Python names."""
    for kernel in engine.STRUCTURES:
        LAYOUT.check_size(kernel.__name__, kernel)
        bigger = structure([("it", kernel), ("new", ctypes.c_uint64)])
        with pytest.raises(ImportError, match=f"struct {kernel.__name__} is {ctypes.sizeof(kernel)} bytes in C"):
            LAYOUT.check_size(kernel.__name__, bigger)
    with pytest.raises(ImportError, match="struct nobody is unknown in C"):
        LAYOUT.check_size("nobody", engine.AkSlot)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_value_that_differs(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} is {VALUES[name]} in C, {VALUES[name] + 1} in Python"):
        LAYOUT.check_values(VALUES | {name: VALUES[name] + 1})


def test_a_value_that_c_does_not_have() -> None:
    with pytest.raises(ImportError, match="AK_EXIT_NEW is unknown in C"):
        LAYOUT.check_values({"AK_EXIT_NEW": 99})


_OTHER_WIDTH: dict[int, Any] = {1: ctypes.c_int32, 4: ctypes.c_uint64, 8: ctypes.c_uint32}


@pytest.mark.parametrize("name", sorted(engine.SIGNATURES))
def test_a_function_whose_type_differs(name: str) -> None:
    result, arguments = engine.SIGNATURES[name]

    def refused(other_result: Any, other_arguments: tuple[Any, ...], match: str) -> None:
        with pytest.raises(ImportError, match=match) as caught:
            LAYOUT.check_signatures({name: (other_result, other_arguments)})
        assert f"{name}(" in str(caught.value)

    refused(result, (*arguments, ctypes.c_uint64), f"{len(arguments) + 1} arguments in Python")
    for index, argument in enumerate(arguments):
        refused(result, arguments[:index] + arguments[index + 1 :], f"{len(arguments) - 1} arguments in Python")
        wrong = _OTHER_WIDTH[ctypes.sizeof(argument)]
        refused(
            result, (*arguments[:index], wrong, *arguments[index + 1 :]), f"argument {index + 1} is {wrong.__name__}"
        )
    wrong = ctypes.c_int16
    refused(wrong, arguments, "the result is c_short")
    refused(None if result else ctypes.c_int, arguments, "the result is")


def test_signedness_counts() -> None:
    with pytest.raises(ImportError, match="the result is c_ulong"):
        LAYOUT.check_signatures({"ak_file_find": (ctypes.c_uint64, (ctypes.c_int64,))})
    with pytest.raises(ImportError, match="argument 1 is c_uint"):
        LAYOUT.check_signatures({"ak_gmem_mmap": (ctypes.c_int64, (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64))})


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="ak_nothing is in library.py, and not in exports.h"):
        LAYOUT.check_signatures({"ak_nothing": (None, ())})
    with pytest.raises(AttributeError, match="ak_nothing"):
        LAYOUT.signature("ak_nothing")


def test_every_exported_function_has_types() -> None:
    """What exports.h says of each can be made into ctypes types."""
    for name, text in LAYOUT.functions.items():
        assert hasattr(LIBRARY, name), text
        assert len(LAYOUT.signature(name)[1]) == len(types_of(text)[1])


def test_loading_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that this is for: a mirror with nine of eleven fields."""
    short = structure(list(engine.AkSlot._fields_)[:9])
    monkeypatch.setattr(engine, "AkSlot", short)
    with pytest.raises(ImportError, match=r"struct ak_slot: (mapped|any_mapped) is \d bytes at \d+ in C, not there"):
        engine.load(engine.PATH)


def test_a_request_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM_PRE_FAULT_MEMORY copies all of its structure back."""
    monkeypatch.setattr(structures, "kvm_pre_fault_memory", structure([("gpa", ctypes.c_uint64)]))
    with pytest.raises(ImportError, match="struct ak_pre_fault_memory is 64 bytes in C, 8 bytes in Python"):
        engine.load(engine.PATH)


def test_every_purge_has_its_value() -> None:
    assert set(vcpu._PURGES) == set(Purge)
    assert sorted(vcpu._PURGES.values()) == sorted(VALUES[name] for name in VALUES if name.startswith("AK_PURGE_"))


def test_importing_refuses() -> None:
    """In a process of its own: the package does not come up, and says why."""
    doctored = (
        "from anykvm.backends.soft.engine import values; values.AK_EXIT_IO = 77; import anykvm; anykvm.open('soft')"
    )
    ran = subprocess.run([sys.executable, "-c", doctored], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "AK_EXIT_IO is 2 in C, 77 in Python" in ran.stderr


def test_nothing_is_read_behind_a_slot() -> None:
    """An AkSlot that ends where its page does."""
    two = libc.mmap(0, 8192, libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    libc.mprotect(two + 4096, 4096, libc.PROT_NONE)
    slot = engine.AkSlot.from_address(two + 4096 - ctypes.sizeof(engine.AkSlot))
    slot.base_gfn, slot.npages, slot.hva, slot.id = 16, 1, two, 1
    pid = os.fork()  # where reading on would be the end
    if not pid:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        vm = LIBRARY.ak_vm_create()
        os._exit(LIBRARY.ak_set_memslot(vm, None, ctypes.byref(slot)) != 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    libc.munmap(two, 8192)
