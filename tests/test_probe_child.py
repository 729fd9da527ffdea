"""Trying /dev/kvm where the kernel kills, hangs or deceives whoever asks: a child takes the blow."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anykvm import backends
from anykvm.backends import Probe, child, probe_device

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
def broken(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    device = tmp_path / "broken-kvm"
    device.write_text("")

    def attempt(at: str, how: str, seconds: float = child.SECONDS) -> str:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("FAIL_AT", at)
        monkeypatch.setenv("HOW", how)
        found = probe_device(str(device), seconds=seconds)
        assert not found.usable and found.tried
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
    assert broken(at, "hang", 0.3) == f"self-test failed: did not answer within 0.3 s in {STEPS[at]}"
    assert children() == before


@pytest.mark.parametrize(
    ("at", "code"),
    [*((at, errno.EIO) for at in STEPS), ("open", errno.EBUSY), ("ae01", errno.ENOSYS), ("ae41", errno.EINVAL)],
)
def test_a_kernel_that_refuses_at_any_step(broken: Callable[..., str], at: str, code: int) -> None:
    reason = broken(at, f"errno {code}")
    assert reason.startswith("self-test failed: ") and os.strerror(code) in reason
    assert at == "open" or STEPS[at] in reason


@pytest.mark.parametrize(
    ("at", "how", "words"),
    [
        ("ae00", "value 11", "KVM_GET_API_VERSION is 11, not 12"),
        ("ae00", "value 99999", "KVM_GET_API_VERSION is 99999"),
        ("ae04", "value 0", "KVM_GET_VCPU_MMAP_SIZE is 0, less than kvm_run's"),
        ("ae04", "value 16", "KVM_GET_VCPU_MMAP_SIZE is 16, less than kvm_run's"),
        ("ae01", "value 2000000000", "Bad file descriptor"),
        ("ae41", "value 2000000000", "Bad file descriptor"),
        ("ae80", "value 0", "a guest's OUT gave KVM_EXIT_UNKNOWN"),
    ],
)
def test_a_kernel_that_answers_nonsense(broken: Callable[..., str], at: str, how: str, words: str) -> None:
    assert words in broken(at, how)


def test_a_kernel_that_maps_less_than_it_said(broken: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCPU_BYTES", "0")
    assert broken("none", "") == "self-test failed: killed by SIGBUS in KVM_RUN"


def children() -> set[str]:
    """This process's children, zombies too."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_program_that_ignores_its_children_is_told_no_less(broken: Callable[..., str]) -> None:
    """With SIGCHLD ignored this process does not learn how its child ended."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert "killed by SIGSEGV in KVM_CREATE_VM" in broken("ae01", f"signal {int(signal.SIGSEGV)}")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_program_that_waits_for_any_child_is_told_no_less(broken: Callable[..., str]) -> None:
    """Its handler takes the child's status away, as some supervisors' do."""

    def take(number: int, frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    before = signal.signal(signal.SIGCHLD, take)
    try:
        assert "killed by SIGSEGV in KVM_CREATE_VM" in broken("ae01", f"signal {int(signal.SIGSEGV)}")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_program_with_signals_blocked_and_ignored(broken: Callable[..., str]) -> None:
    """The child inherits both, and neither delays the end of the test."""
    ignored = signal.signal(signal.SIGABRT, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        assert "killed by SIGABRT in KVM_CREATE_VM" in broken("ae01", f"signal {int(signal.SIGABRT)}")
        assert "killed by SIGSEGV in KVM_CREATE_VM" in broken("ae01", f"signal {int(signal.SIGSEGV)}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGABRT, ignored)


def test_threads_that_ask_at_once(broken: Callable[..., str]) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(broken("ae80", "errno 5"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and "KVM_RUN" in found[0]


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_standard_descriptors_that_are_closed(library: Path, tmp_path: Path, closed: tuple[int, ...]) -> None:
    """The child's pipe may then have one of their numbers."""
    device, output = tmp_path / "broken-kvm", tmp_path / "output"
    device.write_text("")
    program = f"""
import os
from anykvm import probe_device
for fd in {closed}:
    os.close(fd)
reason = probe_device({str(device)!r}).reason
open({str(output)!r}, "w").write(reason)
"""
    environment = os.environ | {"LD_PRELOAD": str(library), "FAIL_AT": "ae41", "HOW": f"signal {int(signal.SIGBUS)}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert output.read_text() == "self-test failed: killed by SIGBUS in KVM_CREATE_VCPU"


def test_a_process_that_cannot_be_killed_is_not_waited_for() -> None:
    """One that sleeps in the kernel does not end by SIGKILL; to whoever waits it is one that goes on."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        assert child.reap(sleeper.pid, 0.0) is None
        sleeper.kill()
    verdict = child._judge(["KVM_RUN"], None, False, 10)
    assert verdict == "failed: did not answer within 10 s in KVM_RUN; it cannot even be killed"


def test_no_such_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "interpreter", lambda: "/nonexistent/python")
    with pytest.raises(child.NotTried, match="no process for it: No such file or directory"):
        child.try_device("/dev/kvm")


NO_PROCESS = """
import os, resource, sys
from anykvm.backends import child
child.interpreter = lambda: sys.executable
if not os.geteuid():
    os.setresuid(65534, 65534, 65534)  # root may have any number
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    child.try_device("/dev/null")
except child.NotTried as error:
    print(error)
"""


def test_no_process_because_of_a_limit() -> None:
    done = subprocess.run([sys.executable, "-c", NO_PROCESS], capture_output=True, text=True, check=True)
    assert done.stdout == "no process for it: Resource temporarily unavailable\n"


@pytest.mark.parametrize("name", ("", "/bin/false", "/usr/bin/qemu-system-x86_64", "/opt/game/bin/pythoness"))
def test_a_program_with_python_inside_is_not_started_in_pythons_place(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for attribute, value in (("executable", name), ("_base_executable", name)):
        monkeypatch.setattr(sys, attribute, value)
    assert "python" in os.path.basename(child.interpreter())  # the one of its prefix
    for attribute in ("exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, attribute, str(tmp_path))
    device = tmp_path / "kvm"
    device.write_text("")
    found = probe_device(str(device))
    assert not found.usable and not found.tried
    assert f"was not tried: no Python to do it in a process of its own (sys.executable is {name!r})" in found.reason


def test_an_interpreter_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for code, words in (("exit 1", "ended with exit code 1"), ("kill -SEGV $$", "was killed by SIGSEGV")):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{code}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        with pytest.raises(child.NotTried, match=words):
            child.try_device("/dev/kvm")


def test_a_process_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what may be another answer soon, it asks again."""
    answers = [Probe("device", False, "was not tried"), Probe("device", False, "self-test failed", tried=True)]
    monkeypatch.setattr(backends, "_tried", [])
    monkeypatch.setattr(backends, "probe_device", lambda: answers.pop(0))
    assert [backends.select().reason for _ in range(3)] == [
        "device: was not tried",
        "device: self-test failed",
        "device: self-test failed",
    ]


def test_a_ctrl_c_meanwhile_leaves_no_child(broken: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    real = child._listen

    def interrupted(fd: int, deadline: float) -> tuple[list[str], bool]:
        assert real(fd, time.monotonic() + 0.2) == ([], False)
        signal.raise_signal(signal.SIGINT)
        return real(fd, deadline)

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
