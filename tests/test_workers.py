"""The threads on which calls are done: fork, the end of the process, no thread to be had, and how many are kept."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anykvm.host import atomic

COMMON = """
import atexit, ctypes, errno, gc, os, resource, sys, threading, time
import anykvm
from anykvm import abi
from anykvm.backends.soft import SoftBackend
from anykvm.host import atomic

backend = SoftBackend()


def slots(vm):
    region = abi.kvm_userspace_memory_region(slot=1, guest_phys_addr=0, memory_size=4096, userspace_addr=4096)
    for size in (4096, 0):
        region.memory_size = size
        backend.ioctl(vm, abi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region))
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stderr, done.returncode) == ("", 0), done
    return done.stdout


def test_fork_beside_a_busy_worker() -> None:
    """The child has no workers and none of their locks; its parent's VM is EIO."""
    assert run("""
from anykvm.backends.soft.files import FILES
kvm = backend.open()
vm = backend.ioctl(kvm, abi.KVM_CREATE_VM)
slots(vm)
inside, over = threading.Event(), threading.Event()
def hold():
    with FILES.get(vm).vm.lock:
        inside.set()
        over.wait()
thresholds = gc.get_threshold()
thread = threading.Thread(target=atomic.atomically, args=(hold,))
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    try:
        slots(vm)
    except OSError as error:
        print(error.errno == errno.EIO)
    own = backend.ioctl(kvm, abi.KVM_CREATE_VM)
    slots(own)
    backend.close(own)
    backend.close(vm)
    print(gc.get_threshold() == thresholds, flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
over.set()
thread.join()
slots(vm)
print(gc.get_threshold() == thresholds)
""").split() == ["True", "True", "0", "True"]


ENDINGS = {
    "an object is left": "kvm = anykvm.open(backend); vm = kvm.create_vm(); vm.create_vcpu()\nimport warnings\n"
    "warnings.simplefilter('ignore')",
    "a call that waits": "import threading\n"
    "threading.Thread(target=atomic.atomically, args=(threading.Event().wait,), daemon=True).start()\ntime.sleep(0.05)",
    "calls under way": "def on():\n    vm = backend.ioctl(backend.open(), abi.KVM_CREATE_VM)\n"
    "    while True: slots(vm)\n"
    "for _ in range(2): threading.Thread(target=on, daemon=True).start()\ntime.sleep(0.05)",
    "at exit": "kvm = anykvm.open(backend)\natexit.register(lambda: (kvm.create_vm().create_vcpu(), kvm.close()))",
    "in a finalizer": "class Late:\n    def __del__(self, backend=backend, new=abi.KVM_CREATE_VM):\n"
    "        kvm = backend.open(); backend.close(backend.ioctl(kvm, new)); backend.close(kvm); print('late')\n"
    "sys.late = Late()",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=list(ENDINGS))
def test_the_interpreter_ends(ending: str) -> None:
    for _ in range(2):
        out = run(ending + "\nprint('end', flush=True)")
        assert out.split()[0] == "end"


def test_no_thread_is_an_errno_and_nothing_is_done() -> None:
    assert (
        run("""
kvm = backend.open()
vm = backend.ioctl(kvm, abi.KVM_CREATE_VM)
over = threading.Event()
started = threading.Semaphore(0)
def hold():
    started.release()
    over.wait()
threads = [threading.Thread(target=atomic.atomically, args=(hold,)) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in threads:
    started.acquire()  # no worker is idle
used = int(open("/proc/self/statm").read().split()[0]) * 4096
before = resource.getrlimit(resource.RLIMIT_AS)
fds = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))
for call in (lambda: backend.ioctl(kvm, abi.KVM_CREATE_VM), lambda: anykvm.open(backend), lambda: slots(vm)):
    try:
        call()
    except OSError as error:
        print(error.errno in (errno.EAGAIN, errno.ENOMEM))
print(len(os.listdir("/proc/self/fd")) == fds)
backend.close(vm)  # closing needs none
print(len(os.listdir("/proc/self/fd")) == fds - 1)
resource.setrlimit(resource.RLIMIT_AS, before)
slots(backend.ioctl(kvm, abi.KVM_CREATE_VM))
over.set()
for thread in threads:
    thread.join()
""").split()
        == ["True"] * 5
    )


def workers() -> int:
    return sum(
        (task / "comm").read_text() == "anykvm-worker\n" for task in Path("/proc/self/task").iterdir() if task.exists()
    )


def test_few_idle_workers_are_kept() -> None:
    barrier = threading.Barrier(12)
    threads = [threading.Thread(target=atomic.atomically, args=(barrier.wait, 20)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = time.monotonic() + 10
    while workers() > 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert 1 <= workers() <= 2


def test_a_busy_interpreter_does_not_lose_a_wakeup() -> None:
    """Many threads, more than processors, hand over and sleep in all orders."""
    done = []

    def body() -> None:
        for number in range(300):
            done.append(atomic.atomically(divmod, number, 7))

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2400


def test_the_c_librarys_own_signals_reach_every_thread_of_ours() -> None:
    """setuid() stops all threads by a signal of its own: a thread that blocks it hangs the program."""
    program = (
        "import os, anykvm; kvm = anykvm.open('soft'); vm = kvm.create_vm(); vcpu = vm.create_vcpu();"
        "os.setgid(os.getgid()); os.setuid(os.getuid()); vm.close(); kvm.close()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
