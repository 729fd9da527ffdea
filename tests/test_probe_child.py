"""Trying /dev/kvm where the kernel kills, hangs or deceives whoever asks: a child takes the blow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anykvm.backends import child, probe_device

STEPS = {
    "open": "open()",
    "ae00": "KVM_GET_API_VERSION",
    "ae04": "KVM_GET_VCPU_MMAP_SIZE",
    "ae01": "KVM_CREATE_VM",
    "ae46": "KVM_SET_USER_MEMORY_REGION",
    "ae41": "KVM_CREATE_VCPU",
    "ae83": "KVM_GET_SREGS",
    "ae84": "KVM_SET_SREGS",
    "ae82": "KVM_SET_REGS",
    "ae80": "KVM_RUN",
}
FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGKILL, signal.SIGFPE, signal.SIGSYS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("broken") / "broken.so"
    source = Path(__file__).parent / "data" / "broken_kvm.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture
def broken(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    device = tmp_path / "broken-kvm"
    device.write_text("")

    def attempt(at: str, how: str, seconds: float = child.SECONDS) -> str | None:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("FAIL_AT", at)
        monkeypatch.setenv("HOW", how)
        found = probe_device(str(device), seconds=seconds)
        assert not found.usable
        return found.reason

    return attempt


@pytest.mark.parametrize("at", STEPS)
def test_a_kernel_that_kills_its_caller_at_any_step(broken: Callable[..., str], at: str) -> None:
    assert broken(at, f"signal {int(signal.SIGSEGV)}") == f"self-test failed: killed by SIGSEGV in {STEPS[at]}"


@pytest.mark.parametrize("number", FATAL)
def test_a_kernel_that_kills_by_any_signal(broken: Callable[..., str], number: signal.Signals) -> None:
    assert broken("ae01", f"signal {int(number)}") == f"self-test failed: killed by {number.name} in KVM_CREATE_VM"


@pytest.mark.parametrize("at", ("open", "ae80"))
def test_a_kernel_that_hangs_its_caller(broken: Callable[..., str], at: str) -> None:
    """SIGTERM would not end it."""
    before = children()
    assert broken(at, "hang", 3.0) == f"self-test failed: no answer within 3 s in {STEPS[at]}"
    assert children() == before


@pytest.mark.parametrize("at", STEPS)
def test_a_kernel_that_refuses_at_any_step(broken: Callable[..., str], at: str) -> None:
    reason = broken(at, "errno 5")
    assert reason.startswith("self-test failed: ") and "Input/output error" in reason
    assert at == "open" or STEPS[at] in reason


@pytest.mark.parametrize(
    ("at", "how", "words"),
    [
        ("ae00", "value 11", "KVM_GET_API_VERSION is 11, not 12"),
        ("ae00", "value 99999", "KVM_GET_API_VERSION is 99999"),
        ("ae04", "value 0", "Invalid argument"),
        ("ae80", "value 0", "a guest's OUT gave KVM_EXIT_UNKNOWN"),
    ],
)
def test_a_kernel_that_answers_nonsense(broken: Callable[..., str], at: str, how: str, words: str) -> None:
    assert words in broken(at, how)


def children() -> set[str]:
    """This process's children, zombies too."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_program_that_ignores_its_children_is_not_deceived(broken: Callable[..., str]) -> None:
    """With SIGCHLD ignored nobody learns how a child ended, so only what it said counts."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert "the child that tried it ended in KVM_CREATE_VM" in broken("ae01", f"signal {int(signal.SIGSEGV)}")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_process_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert child.try_device("/dev/kvm") == "not tried: no process for it: No such file or directory"
    monkeypatch.setattr(sys, "executable", "")
    assert (child.try_device("/dev/kvm") or "").startswith("not tried: sys.executable")


def test_an_interpreter_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with an interpreter inside may have its own name there."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert child.try_device("/dev/kvm") == "the child that tried it ended with exit code 1"


def test_a_ctrl_c_meanwhile_leaves_no_child(broken: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    real = child._listen

    def interrupted(process: subprocess.Popen[bytes], deadline: float) -> tuple[list[str], bool]:
        assert process.stdout is not None
        process.stdout.read(1)  # it has begun
        signal.raise_signal(signal.SIGINT)
        return real(process, deadline)

    monkeypatch.setattr(child, "_listen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken("open", "hang")
    assert children() == before


def test_doctor_and_auto_say_it(library: Path, tmp_path: Path) -> None:
    """On a machine whose /dev/kvm kills: doctor answers, exit code 0, and auto takes the soft backend, and says so."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/kvm that could be opened, so nothing tries it")
    environment = os.environ | {"LD_PRELOAD": str(library), "FAIL_AT": "ae41", "HOW": f"signal {int(signal.SIGSEGV)}"}
    command = [sys.executable, "-m", "anykvm", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["auto"]) == (0, "soft")
    assert answer["backends"][0]["reason"] == "self-test failed: killed by SIGSEGV in KVM_CREATE_VCPU"
    program = "import anykvm; anykvm.open().close(); anykvm.open().close(); anykvm.open('soft').close()"
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert told.stderr.splitlines() == [
        "anykvm: backend soft (device: self-test failed: killed by SIGSEGV in KVM_CREATE_VCPU)"
    ]


def test_who_names_the_backend_is_told_nothing() -> None:
    program = "import anykvm; anykvm.open('soft').close(); anykvm.open(profile='linux-7.3').close()"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stderr == ""
