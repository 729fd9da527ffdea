"""A signal that comes while a process forks is not lost: Python drops exceptions of the functions it calls then."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from vmm_helpers import environment, require_soft

SCRIPT = """
import os, signal, sys
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
    if what == "record":
        list(record(["caps"], soft_backend))
    else:
        list(record_batch([1], "soft"))
except Ended:
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
@pytest.mark.parametrize("what", ["record", "record_batch"])
def test_its_handler_s_exception_arrives(what: str, when: str, number: signal.Signals) -> None:
    require_soft()
    line = [sys.executable, "-c", SCRIPT, what, when, str(int(number))]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


CHILD = """
import os, signal, sys
from anykvm.conformance.record import CHILD, record_scenario
from anykvm.conformance.scenario import Scenario
from anykvm.backends import soft_backend

when, number = sys.argv[1], signal.Signals(int(sys.argv[2]))
own = os.getpid()
if when == "at once":
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), number))

def body(lab):
    if when == "later":
        os.kill(os.getpid(), number)
    lab.note("not killed")

try:
    last = record_scenario(Scenario("own", "own", frozenset(), 20.0, body), soft_backend)[-1]
    print(last["s"], last.get("status"))
except BaseException as error:
    print(type(error).__name__, "in", "the parent" if os.getpid() == own else "a child that returned")
"""


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_takes_its_own_and_does_not_return(when: str, number: signal.Signals) -> None:
    """SIGINT is KeyboardInterrupt, and ends the scenario; the others kill the process."""
    require_soft()
    line = [sys.executable, "-c", CHILD, when, str(int(number))]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    status = "0x100" if number == signal.SIGINT else hex(number)
    assert (done.stdout, done.stderr) == (f"<child> {status}\n", "")
