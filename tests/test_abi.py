"""anykvm.abi against the recorded kernel ABI: every number, every size, every offset."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anykvm import abi
from anykvm.abi import constants, ioctls, structures

ROOT = Path(__file__).resolve().parent.parent
DATA: dict[str, Any] = json.loads((Path(abi.__file__).parent / "kvm-abi-7.3-x86_64.json").read_text())


def public(module: object) -> dict[str, int]:
    """Integer names of a generated module."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int)}


def test_every_ioctl_number() -> None:
    assert public(ioctls) == DATA["ioctls"]


def test_every_constant() -> None:
    assert public(constants) == DATA["constants"]


def check_members(kind: Any, fields: list[dict[str, Any]], base: int, where: str) -> int:
    """Compare the members of one (possibly unnamed) structure; returns how many were compared."""
    seen = 0
    for field in fields:
        inner: Any = field.get("fields")
        if not field["name"]:  # an unnamed member: its members are ours
            seen += check_members(kind, inner, base + field["offset"], where)
            continue
        if field["name"].startswith("__empty_"):
            continue
        member = getattr(kind, field["name"])
        path = f"{where}.{field['name']}"
        assert member.offset == base + field["offset"], path
        assert member.size == max(field["size"], 0), path  # the recorder writes flexible arrays as a negative size
        seen += 1
        if inner is not None:
            own = dict((f[0], f[1]) for f in flatten(kind))[field["name"]]
            seen += check_members(own, inner, 0, path)
    return seen


def flatten(kind: Any) -> list[tuple[str, Any]]:
    """(name, type) of all members, unnamed ones replaced by theirs."""
    result: list[tuple[str, Any]] = []
    for name, own in kind._fields_:
        result += flatten(own) if name in getattr(kind, "_anonymous_", ()) else [(name, own)]
    return result


@pytest.mark.parametrize("name", sorted(DATA["structs"]))
def test_structure_layout(name: str) -> None:
    recorded = DATA["structs"][name]
    kind = structures.STRUCTURES[name]
    assert ctypes.sizeof(kind) == recorded["size"]
    assert ctypes.alignment(kind) == recorded["align"]
    assert check_members(kind, recorded["fields"], 0, name) > 0


def test_no_structure_is_missing() -> None:
    assert set(structures.STRUCTURES) == set(DATA["structs"])


def test_arguments_have_the_size_in_the_request_number() -> None:
    for request, kind in abi.ARGUMENTS.items():
        decoded = abi.decode_request(request)
        assert decoded.type == abi.KVMIO
        assert decoded.size == ctypes.sizeof(kind), decoded.name


def test_generated_modules_are_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "gen_abi.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generator_notices_an_edit(tmp_path: Path) -> None:
    tools, target = tmp_path / "tools", tmp_path / "src" / "anykvm" / "abi"
    tools.mkdir()
    target.mkdir(parents=True)
    (tools / "gen_abi.py").write_text((ROOT / "tools" / "gen_abi.py").read_text())
    source = Path(abi.__file__).parent
    for name in ("ioctls.py", "constants.py", "structures.py", "kvm-abi-7.3-x86_64.json"):
        (target / name).write_text((source / name).read_text())
    run = [sys.executable, str(tools / "gen_abi.py"), "--check"]
    assert subprocess.run(run).returncode == 0
    (target / "ioctls.py").write_text("KVM_RUN = 1\n")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ioctls.py" in done.stderr


def test_names() -> None:
    assert abi.ioctl_name(abi.KVM_GET_ONE_REG) == "KVM_GET_ONE_REG"  # not arm64's name for the same number
    assert abi.exit_name(abi.KVM_EXIT_EXCEPTION) == "KVM_EXIT_EXCEPTION"  # 1 is also KVM_EXIT_IO_OUT
    assert abi.exit_name(2) == "KVM_EXIT_IO"
    assert len(abi.EXIT_NAMES) == 44
    assert abi.cap_name(abi.KVM_CAP_GUEST_MEMFD) == "KVM_CAP_GUEST_MEMFD"
    assert abi.errno_name(133) == "EHWPOISON"
    assert abi.errno_name(99999) == "errno 99999"
    assert isinstance(abi.ioctl_error(11, abi.KVM_RUN), BlockingIOError)


@pytest.mark.parametrize("errno", [0, 4, 5, 11, 12, 14, 22, 133])
@pytest.mark.parametrize("reason", [0, 2, 6, 10, 39])
def test_memory_fault_validity(errno: int, reason: int) -> None:
    assert abi.memory_fault_valid(errno, reason) == (errno in (14, 133) and reason == 39)


def every_layout() -> list[type[ctypes.Structure | ctypes.Union]]:
    """Give all generated classes, those of unnamed members included."""
    found = [kind for kind in vars(structures).values() if isinstance(kind, type) and hasattr(kind, "_fields_")]
    assert len(found) > len(structures.STRUCTURES)
    return found


def test_a_name_that_is_no_member_is_refused_in_every_structure() -> None:
    for kind in every_layout():
        made: Any = kind()
        for name in ("rsi_", "no_such_member", *(f"{field[0]}_" for field in kind._fields_)):
            with pytest.raises(AttributeError, match=name):
                setattr(made, name, 1)
            with pytest.raises(AttributeError, match=name):
                kind(**{name: 1})
            assert not hasattr(made, name)


def test_every_structure_can_be_copied_and_pickled() -> None:
    for kind in every_layout():
        made = kind.from_buffer_copy(bytes(index % 251 for index in range(ctypes.sizeof(kind))))
        for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert type(twin) is kind and twin is not made and bytes(twin) == bytes(made)


def test_a_type_checker_sees_a_misspelt_member(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(
        "from anykvm.abi.structures import kvm_regs, kvm_userspace_memory_region2\n"
        "regs, region = kvm_regs(), kvm_userspace_memory_region2()\n"
        "regs.rsi = region.slot = 1\n"
        "regs.rsi_ = 1\n"
        "region.slots = 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "--config-file", "", str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
    )
    assert [line.split(":")[1] for line in done.stdout.splitlines() if line.startswith("program.py")] == ["4", "5"], (
        done.stdout + done.stderr
    )
