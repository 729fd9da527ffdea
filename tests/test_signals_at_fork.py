"""A signal that comes while a process forks is not lost: Python drops exceptions of the functions it calls then."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from vmm_helpers import environment, require_soft

SCRIPT = """
import os, signal, sys
from anykvm.conformance.bound import fork
from anykvm.conformance.record import record
from anykvm.conformance.sequences.batch import record_batch
from anykvm.backends import soft_backend

what, when, number = sys.argv[1], sys.argv[2], signal.Signals(int(sys.argv[3]))

class Ended(BaseException):
    pass

def end(number, frame):
    raise Ended

due = [True]
def send():
    if due:
        due.pop()
        os.kill(os.getpid(), number)

signal.signal(number, end)
os.register_at_fork(after_in_child=lambda: signal.signal(number, signal.SIG_DFL))  # a pool ends its workers by SIGTERM
mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
os.register_at_fork(**{when: send})
try:
    if what == "fork":
        if fork() == 0:
            os._exit(0)
    elif what == "record":
        list(record(["caps"], soft_backend))
    else:
        list(record_batch([1], "soft"))
except Ended:
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
@pytest.mark.parametrize("what", ["fork", "record", "record_batch"])
def test_its_handler_s_exception_arrives(what: str, when: str, number: signal.Signals) -> None:
    require_soft()
    line = [sys.executable, "-c", SCRIPT, what, when, str(int(number))]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


CHILD = """
import os, signal
from anykvm.conformance.bound import fork

signal.signal(signal.SIGTERM, signal.SIG_DFL)
child = fork()
if child == 0:
    signal.pause()
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_takes_signals() -> None:
    line = [sys.executable, "-c", CHILD]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")
