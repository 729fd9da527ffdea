"""A process that has run guests forks, and its child runs guests of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, select, signal, sys, time
from pathlib import Path

import anykvm
from anykvm import GuestMemory

FUTEX = "202"


def run_and_let_the_ticker_sleep():
    # The engine's thread, which wakes vCPUs, sleeps when none has run for a while.
    with anykvm.open("soft") as kvm, kvm.create_vm() as vm, GuestMemory(0x4000) as memory:
        memory[0:1] = b"\\xf4"  # hlt
        vm.map(memory, guest_phys_addr=0)
        vcpu = vm.create_vcpu()
        for _ in range(3):
            vcpu.set_real_mode(rip=0)
            print(type(vcpu.run()).__name__, flush=True)
            tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
            tickers = [task for task in tasks if (task / "comm").read_text() == "anykvm-ticker\\n"]
            assert len(tickers) == 1
            while (tickers[0] / "syscall").read_text().split()[0] != FUTEX:
                time.sleep(0.001)


run_and_let_the_ticker_sleep()
child = os.fork()
if child == 0:
    run_and_let_the_ticker_sleep()
    os._exit(0)
ended = select.select([os.pidfd_open(child)], [], [], 20)[0]
if not ended:
    os.kill(child, signal.SIGKILL)  # it has every signal blocked
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_runs_guests_while_the_parents_ticker_slept() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("Hlt\n" * 6, "", 0)
