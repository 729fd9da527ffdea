"""A signal ends KVM_RUN, whatever the process has run out of. Each case is a process of its own: it changes its user or
its limits, or would never end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_userfaultfd import WHY_NOT

ROOT = pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED: only root can become a user that RLIMIT_NPROC limits")
UFFD = pytest.mark.skipif(WHY_NOT is not None, reason=f"NOT TESTED: {WHY_NOT}")

START = """
import ctypes, os, resource, signal, sys, threading, time
import anykvm
from anykvm import GuestMemory, Hlt, Intr
from anykvm.backends.soft.engine.library import library

signal.signal(signal.SIGALRM, lambda *_: None)

def looping(kvm):
    vm = kvm.create_vm()
    memory = GuestMemory(0x4000)
    memory[0:2] = b"\\xeb\\xfe"
    vm.map(memory, guest_phys_addr=0)
    return vm, memory

def run(vcpu, delay=0.02):
    vcpu.set_real_mode(rip=0)
    signal.setitimer(signal.ITIMER_REAL, delay, 0.05)  # again and again: the first may come before the guest runs
    assert isinstance(vcpu.run(), Intr)
    signal.setitimer(signal.ITIMER_REAL, 0)

def nobody():
    os.setgid(65534)
    os.setuid(65534)

def use_up_descriptors():
    try:
        while True:
            os.open("/dev/null", os.O_RDONLY)
    except OSError:
        pass

kvm = anykvm.open("soft")
vm, memory = looping(kvm)
"""


def process(body: str) -> None:
    """Run it: it ends by itself, and well."""
    here = str(Path(__file__).parent)
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {here!r})\n{START}{body}\nprint('done', flush=True)\nos._exit(0)",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = child.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
        pytest.fail(f"nothing ends it but SIGKILL: {child.communicate()[0]}")
    assert output.endswith("done\n") and child.returncode == 0, output


@ROOT
def test_without_a_thread_there_is_no_vcpu() -> None:
    process("""
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
nobody()
for _ in range(2):
    try:
        vm.create_vcpu()
    except BlockingIOError as error:
        assert "KVM_CREATE_VCPU" in str(error) and "no thread" in str(error), error
    else:
        raise AssertionError
resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
run(vm.create_vcpu())
""")


@ROOT
def test_with_a_vcpu_no_thread_is_needed() -> None:
    process("""
vcpu = vm.create_vcpu()
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
nobody()
run(vcpu)
""")


@pytest.mark.parametrize("when", ["before the vCPU's first run", "after it"])
def test_without_descriptors(when: str) -> None:
    first = "run(vcpu)" if when == "after it" else ""
    process(f"""
vcpu = vm.create_vcpu()
{first}
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
use_up_descriptors()
run(vcpu)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 256))
run(vcpu)
""")


SLEEPING = """
from anykvm.conformance.host import anonymous
from anykvm.conformance.uffd import Userfaultfd
host = anonymous(4096)
vm.set_user_memory_region(5, 0x8000, host.size, host.address)
vcpu = vm.create_vcpu()
memory[0:4] = b"\\xa0\\x00\\x80\\xf4"  # mov 0x8000, %al; hlt
faults = Userfaultfd(host)
vcpu.set_real_mode(rip=0)
"""

LIMITS = {
    "none": "",
    "no descriptor": "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); use_up_descriptors()",
    "no descriptor for anybody": "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
    "another user": "nobody()",
    "another user, no descriptor for anybody": "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0)); nobody()",
    "no pending signals": "resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0)); nobody()",
    "no memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))",
}


@UFFD
@pytest.mark.parametrize("limit", [pytest.param(k, marks=ROOT if "nobody" in v else ()) for k, v in LIMITS.items()])
@pytest.mark.parametrize("to", ["the process", "the thread"])
def test_asleep_in_a_page_fault(limit: str, to: str) -> None:
    send = "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)"
    if to == "the thread":
        send = "threading.Thread(target=again_and_again, daemon=True).start()"
    process(f"""{SLEEPING}
main = threading.main_thread().ident
def again_and_again():
    while True:
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGALRM)
{send}
{LIMITS[limit]}
assert isinstance(vcpu.run(), Intr)
""")


def test_one_that_enters_while_the_ticker_falls_asleep() -> None:
    """The ticker dawdles 30 ms between its last look at the vCPUs and its sleep; meanwhile vCPUs enter all the time."""
    process("""
vcpu = vm.create_vcpu()
library().ak_ticker_tune(1, 30000)
for i in range(25):
    time.sleep(0.003 * (i % 12))
    run(vcpu, 0.001)
""")


def test_many_sleeps_of_the_ticker() -> None:
    process("""
vcpus = [vm.create_vcpu(i) for i in range(3)]
library().ak_ticker_tune(1, 0)
for i in range(200):
    time.sleep(0.0001 * (i % 40))
    run(vcpus[i % 3], 0.0005)
""")


def test_a_child_of_fork_has_a_ticker_of_its_own() -> None:
    process("""
run(vm.create_vcpu())
child = os.fork()
kvm = anykvm.open("soft")
vm, memory = looping(kvm)
library().ak_ticker_tune(1, 20000)
vcpu = vm.create_vcpu()
for _ in range(5):
    time.sleep(0.004)
    run(vcpu)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""")
