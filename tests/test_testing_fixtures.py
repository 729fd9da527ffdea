"""The fixtures ``inject`` and ``contract``, in a project of somebody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import anykvm, pytest
pytest_plugins = ["anykvm.testing.fixtures"]

def use(backend):
    with anykvm.open(backend) as kvm, kvm.create_vm() as vm:
        vm.create_vcpu().run()

def test_injected(inject):
    with pytest.raises(OSError):
        use(inject(anykvm.backend("soft"), "KVM_CREATE_VCPU:errno=ENOMEM"))

def test_idle(inject):
    use(inject(anykvm.backend("soft"), "KVM_CREATE_VCPU:errno=ENOMEM,nth=9"))

def test_kept(contract):
    use(contract(anykvm.backend("soft")))

def test_broken(contract, inject):
    backend = inject(anykvm.backend("soft"), "KVM_RUN:errno=0,reason=KVM_EXIT_INTR,unlawful")
    with pytest.raises(Exception):
        use(contract(backend))
        raise KeyError
"""


def test_they_fail_a_test_in_which_nothing_was_injected_or_a_rule_was_broken(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "4 passed, 2 errors" in ran.stdout, ran.stdout
    assert "nothing was injected: no call matched KVM_CREATE_VCPU:errno=ENOMEM,nth=9" in ran.stdout
    assert "kernel breaks success-with-intr on vCPU 0" in ran.stdout
