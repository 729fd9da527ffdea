"""Ctrl-C ends a KVM_RUN of the main thread, also when another thread takes the signal."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, signal, sys, threading, time
import anykvm
from anykvm import GuestMemory

with anykvm.open("soft") as kvm, kvm.create_vm() as vm, GuestMemory(0x4000) as memory:
    memory[0:6] = bytes.fromhex("ff060020 ebfa")  # 1: inc word [0x2000]; jmp 1b
    vm.map(memory, guest_phys_addr=0)
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(rip=0)
    done = threading.Event()

    def taker():
        if sys.argv[1] == "busy":
            while not done.is_set():
                pass
        done.wait()

    def sender():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        count = ctypes.c_uint16.from_address(memory.address + 0x2000)
        for _ in range(3):  # in the guest, and there for a while
            before = count.value
            while count.value == before:
                time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threads = [threading.Thread(target=body) for body in (taker, sender)]
    for thread in threads:
        thread.start()
    try:
        print(vcpu.run())
    except KeyboardInterrupt:
        print("interrupted, exit_reason", vcpu.kvm_run.exit_reason)
    try:
        time.sleep(0)
        done.set()
    except KeyboardInterrupt:
        print("interrupted again")
    for thread in threads:
        thread.join()
"""


@pytest.mark.parametrize("other", ["idle", "busy"])
def test_taken_by_another_thread(other: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, other], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "interrupted, exit_reason 10\n", done
