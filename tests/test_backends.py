"""Choosing a backend, and the device backend where there is no device."""

from __future__ import annotations

import ast
import grp
import os
import pwd
from pathlib import Path

import pytest

import anykvm
from anykvm import backends
from anykvm.backends import Probe, probe, selftest
from anykvm.backends.device import DeviceBackend
from anykvm.backends.probe import Kernel

BELOW = {
    "abi": {"abi"},
    "host": {"host"},
    "backends": {"abi", "host", "backends"},
    "api": {"abi", "host", "backends", "api"},
}


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_what_is_below_it_alone(package: str) -> None:
    """A backend does without the API, and what both need knows neither."""
    files = list((Path(anykvm.__file__).parent / package).rglob("*.py"))
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{name.name}" for name in node.names]
            else:
                whole = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.split(".")[1] for name in whole if name.startswith("anykvm.")}
    assert files and imported <= BELOW[package]


def test_names() -> None:
    assert anykvm.backend("device").name == "device"
    assert anykvm.backend("device", "kernel").profile == "kernel"
    with pytest.raises(ValueError, match="no backend named 'xen'; there are auto, soft, device"):
        anykvm.backend("xen")
    with pytest.raises(ValueError, match="needs the soft backend"):
        anykvm.backend("device", "documented")
    with pytest.raises(ValueError, match="profile is chosen when a backend is made"):
        anykvm.open(anykvm.backend("device"), "documented")


def test_backends_fit_the_protocol(backend: anykvm.Backend) -> None:
    assert isinstance(backend, anykvm.Backend)
    assert backend.name in ("soft", "device")
    assert (backend.profile == "kernel") == (backend.name == "device")
    assert selftest.self_test(backend) is None


def test_auto_takes_the_device_only_if_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = DeviceBackend("/nonexistent")
    monkeypatch.setattr(backends, "soft_backend", lambda profile=None: chosen)
    monkeypatch.setattr(backends, "_probed", lambda: Probe("device", False, "self-test failed: x"))
    selection = backends.select("auto")
    assert selection.backend is chosen
    assert selection.reason == "device: self-test failed: x"
    monkeypatch.setattr(backends, "_probed", lambda: Probe("device", True, "/dev/kvm runs guests"))
    assert isinstance(backends.select("auto").backend, DeviceBackend)
    assert backends.select("auto", "linux-7.3").backend is chosen  # only soft has profiles


def test_probe_says_why_not(tmp_path: Path) -> None:
    assert "does not exist" in backends.probe_device(str(tmp_path / "kvm")).reason
    plain = tmp_path / "file"
    plain.write_text("")
    found = backends.probe_device(str(plain))
    assert not found.usable
    assert "KVM_GET_API_VERSION" in found.reason  # a file that is no KVM: ENOTTY
    (tmp_path / "kvm_pvm").mkdir()
    assert any("no hardware virtualization" in note for note in probe.device_notes(Kernel(str(tmp_path))))
    assert "none of" in probe.device_notes(Kernel(str(tmp_path / "nothing")))[0]


def test_a_missing_file_of_a_kvm_that_is_loaded(tmp_path: Path) -> None:
    """A container without the device: the modules and the device's number are the host kernel's."""
    path, misc = str(tmp_path / "kvm"), tmp_path / "misc"
    modules = tmp_path / "modules"
    kernel = Kernel(str(modules), str(misc))
    (modules / "kvm").mkdir(parents=True)
    assert "module kvm is loaded, but none for this processor" in backends.probe_device(path, kernel).reason
    (modules / "kvm_amd").mkdir()
    misc.write_text("229 fuse\n237 kvm\n183 hw_random\n")
    found = backends.probe_device(path, kernel)
    assert not found.usable and "the kernel has kvm_amd, only the file is missing" in found.reason
    assert f"--device {path}" in found.reason and f"mknod {path} c 10 237" in found.reason
    assert "modules: kvm_amd" in found.notes[0]
    misc.write_text("229 fuse\n")
    for name in ("kvm", "kvm_amd"):
        (modules / name).rmdir()
    assert backends.probe_device(path, kernel).reason.endswith("no KVM in this kernel, or its module is not loaded")


def test_a_file_that_may_not_be_opened_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kvm"
    path.write_text("")
    path.chmod(0o640)
    os.chown(path, os.geteuid(), os.getegid())
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)  # root may open anything
    monkeypatch.setattr(os, "getgroups", lambda: [4242])
    reason = backends.probe_device(str(path)).reason
    owner, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    assert f"owner {owner} ({os.geteuid()}), group {group} ({os.getegid()}), mode 0640" in reason
    groups = " ".join(map(str, sorted({os.getegid(), 4242})))
    assert reason.endswith(f"this process is uid {os.geteuid()}, groups {groups}")


def test_device_errors_have_the_kernels_errno(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DeviceBackend(str(tmp_path / "kvm")).open()
    backend = DeviceBackend("/dev/null")
    fd = backend.open()
    try:
        with pytest.raises(OSError, match="KVM_CREATE_VM: ") as caught:
            backend.ioctl(fd, anykvm.abi.KVM_CREATE_VM)
        assert caught.value.errno == 25
        with pytest.raises(OSError, match="mmap"):
            backend.mmap(fd, 4096, 0)
        with pytest.raises(OSError, match="munmap"):
            backend.munmap(1, 4096)
    finally:
        backend.close(fd)
