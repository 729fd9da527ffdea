"""A signal that another thread of Python takes while the main thread is in KVM_RUN ends that KVM_RUN, as any does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from anykvm.backends.soft import upcall
from test_userfaultfd import WHY_NOT

START = """
import ctypes, os, signal, sys, threading, time
import anykvm
from anykvm import GuestMemory, Hlt, Intr

signal.alarm(40)  # SIG_DFL: what only a signal can end, this ends
taken = []
kvm = anykvm.open("soft")
vm = kvm.create_vm()
memory = GuestMemory(0x4000)
memory[0:6] = bytes.fromhex("ff060020 ebfa")  # 1: inc word [0x2000]; jmp 1b
vm.map(memory, guest_phys_addr=0)
count = ctypes.c_uint16.from_address(memory.address + 0x2000)
vcpu = vm.create_vcpu()
vcpu.set_real_mode(rip=0)

def handler(number, frame):
    taken.append(number)

def in_guest():
    before = count.value
    while count.value == before:
        time.sleep(0.0005)

def ends(what, number, send):
    done = threading.Event()
    def sender():
        in_guest()
        send()
        done.wait()  # so it is there to take the signal
    thread = threading.Thread(target=sender)
    old = signal.signal(number, handler)
    thread.start()
    result = vcpu.run()
    assert isinstance(result, Intr), (what, result)
    assert taken == [number], (what, taken)
    taken.clear()
    done.set()
    thread.join()
    signal.signal(number, old)
"""

ALL_SIGNALS = """
left = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
left.add(signal.SIGALRM)  # next
swept = [number for number in signal.valid_signals() if number not in left]
for number in swept:
    ends(number, number, lambda: os.kill(os.getpid(), number))
    ends(number, number, lambda: signal.pthread_kill(threading.get_ident(), number))
print(len(swept))
"""

TIMERS = """
signal.alarm(0)
for timer, number in (
    (signal.ITIMER_REAL, signal.SIGALRM),
    (signal.ITIMER_VIRTUAL, signal.SIGVTALRM),
    (signal.ITIMER_PROF, signal.SIGPROF),
):
    ends(number, number, lambda: signal.setitimer(timer, 0.005))
    signal.setitimer(timer, 0)
print("done")
"""

ASLEEP = """
from anykvm.conformance.host import anonymous
from anykvm.conformance.uffd import Userfaultfd
host = anonymous(4096)
vm.set_user_memory_region(5, 0x8000, host.size, host.address)
memory[0:4] = bytes.fromhex("a00080f4")  # mov 0x8000, %al; hlt
faults = Userfaultfd(host)
in_guest = lambda: time.sleep(0.05)  # the page is nobody's to give: it sleeps until the signal
ends("asleep", signal.SIGUSR1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
print("done")
"""

OTHERS_GO_ON = """
ran = []
threading.Thread(target=lambda: ran.append(vcpu.run())).start()
signal.signal(signal.SIGUSR1, handler)
for n in range(20):
    in_guest()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert taken == [signal.SIGUSR1] * (n + 1) and not ran
memory[4:6] = bytes.fromhex("f4f4")  # hlt
while not ran:
    time.sleep(0.001)
assert isinstance(ran[0], Hlt), ran
print("done")
"""

A_HANDLER_THAT_RAISES = """
class Stop(BaseException):
    pass

def handler(number, frame):
    taken.append(number)
    raise Stop

for _ in range(20):
    try:
        ends("raises", signal.SIGTERM, lambda: os.kill(os.getpid(), signal.SIGTERM))
    except Stop:
        pass
    assert taken == [signal.SIGTERM]
    taken.clear()
print("done", flush=True)
os._exit(0)  # its senders wait
"""


def process(body: str) -> str:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{START}{body}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_interpreters_flag_is_known() -> None:
    """On each CPython that has its internal headers, as those that anykvm is tested with do."""
    assert upcall.python_signals_address()


def test_every_signal() -> None:
    assert int(process(ALL_SIGNALS)) > 40


def test_every_timer() -> None:
    assert process(TIMERS) == "done\n"


@pytest.mark.skipif(WHY_NOT is not None, reason=f"NOT TESTED: {WHY_NOT}")
def test_asleep_in_a_page_fault() -> None:
    assert process(ASLEEP) == "done\n"


def test_vcpus_of_other_threads_go_on() -> None:
    assert process(OTHERS_GO_ON) == "done\n"


def test_a_handler_that_raises() -> None:
    assert process(A_HANDLER_THAT_RAISES) == "done\n"
