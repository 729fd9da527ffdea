"""Each resource limit against each ioctl: success or an errno that is documented, never a signal, an end or a hang.
When the limit is lifted: success."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PROGRAM = """
import ctypes, os, resource, signal, sys

from test_no_memory import NEEDS_PYTHONS, Bench
from test_resource_limits import LIMITS
import anykvm
from anykvm import abi

if sys.argv[1] == "nobody":
    os.setgid(65534)
    os.setuid(65534)
signal.alarm(60)  # a hang ends the process
bench = Bench("linux-7.3")
memory = bench.memory
memory[0:1] = b"\\xf4"

def vcpu_ioctl(request, size):
    data = ctypes.create_string_buffer(size)
    return lambda: bench.backend.ioctl(bench.vcpu, request, ctypes.addressof(data))

def set_regs():
    data = ctypes.create_string_buffer(ctypes.sizeof(abi.kvm_sregs))
    bench.backend.ioctl(bench.vcpu, abi.KVM_GET_SREGS, ctypes.addressof(data))
    bench.backend.ioctl(bench.vcpu, abi.KVM_SET_SREGS, ctypes.addressof(data))

def simple(do):
    return lambda: (do(), lambda: None)[1]

class Runner:
    kvm = anykvm.open("soft", "linux-7.3")
    vm = kvm.create_vm()
    vm.map(memory, guest_phys_addr=0)
    vcpu = vm.create_vcpu()

    def __call__(self):
        self.vcpu.set_real_mode(rip=0)
        assert type(self.vcpu.run()).__name__ == "Hlt"

ioctls = {name: getattr(bench, name) for name in NEEDS_PYTHONS}
ioctls["KVM_RUN"] = simple(Runner())
for name, size in {"REGS": 144, "FPU": 416, "VCPU_EVENTS": 64, "DEBUGREGS": 128, "MP_STATE": 4, "XCRS": 392}.items():
    ioctls[name] = simple(vcpu_ioctl(getattr(abi, "KVM_GET_" + name), size))
ioctls["SREGS"] = simple(set_regs)
ioctls["open"] = lambda: (lambda fd: lambda: bench.backend.close(fd))(bench.backend.open())
ioctls["KVM_CHECK_EXTENSION"] = simple(lambda: bench.backend.ioctl(bench.vm, abi.KVM_CHECK_EXTENSION, 3))
results = {}

def sweep(limit, low):
    number = getattr(resource, limit)
    soft, hard = resource.getrlimit(number)
    if limit in ("RLIMIT_AS", "RLIMIT_DATA"):
        low = 1 << 20  # what is used already is more
    if limit == "RLIMIT_NOFILE":
        low = len(os.listdir("/proc/self/fd")) if low else 0
    for name, do in ioctls.items():
        print(limit, low, name, file=sys.stderr)
        bench.fewer_vcpus()
        undo, code = None, 0
        resource.setrlimit(number, (low, hard))
        try:
            undo = do()
        except OSError as error:
            code = error.errno
        except MemoryError:
            code = 12  # not of the ioctl: of this program
        resource.setrlimit(number, (soft, hard))
        if undo:
            undo()
        bench.close_made()
        do()()
        results[limit, name] = results.get((limit, name)) or code

for limit, low in LIMITS:
    sweep(limit, low)
print(results)
"""

MAY_BE = {
    "RLIMIT_AS": {errno.ENOMEM, errno.EAGAIN},
    "RLIMIT_DATA": {errno.ENOMEM, errno.EAGAIN},
    "RLIMIT_NOFILE": {errno.EMFILE},
    "RLIMIT_NPROC": {errno.EAGAIN},
    "RLIMIT_FSIZE": set(),  # the kernel's KVM files have no such limit
}
LIMITS = [
    *[("RLIMIT_AS", 0), ("RLIMIT_DATA", 0), ("RLIMIT_NOFILE", 1), ("RLIMIT_NOFILE", 0), ("RLIMIT_NPROC", 0)],
    *[("RLIMIT_FSIZE", 0), ("RLIMIT_FSIZE", 4096), ("RLIMIT_STACK", 1 << 20), ("RLIMIT_MEMLOCK", 0)],
    *[("RLIMIT_SIGPENDING", 0), ("RLIMIT_MSGQUEUE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_RTPRIO", 0), ("RLIMIT_NICE", 0)],
]


def child(*arguments: object, program: str = PROGRAM) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{arguments}: {done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_each_ioctl_under_each_limit(user: str) -> None:
    if user == "nobody" and os.getuid():
        pytest.skip("NOT TESTED: only root can become another user; this one is tested as it is")
    results: dict[tuple[str, str], int] = eval(child(user))  # its own output
    assert len(results) > 15 * len({limit for limit, _ in LIMITS})
    wrong = {key: code for key, code in results.items() if code and code not in MAY_BE.get(key[0], set())}
    assert not wrong
    assert not any(code for (_, name), code in results.items() if name == "KVM_RUN"), "it needs nothing but its vCPU"


def may_raise_limits() -> bool:
    """CAP_SYS_RESOURCE, which root in a container may lack."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return bool(effective >> 24 & 1)


FILES_TOO_LARGE = """
import ctypes, os, resource, signal, sys
from test_no_memory import Bench
signal.signal(signal.SIGXFSZ, lambda *_: print("SIGXFSZ"))
bench = Bench("linux-7.3")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
if sys.argv[1] == "nobody" and not os.getuid():
    os.setgid(65534)
    os.setuid(65534)
for do in (bench.create_vcpu, bench.guest_memfd):
    try:
        do()()
        print("made")
    except OSError as error:
        print(error.errno, error.strerror)
print(resource.getrlimit(resource.RLIMIT_FSIZE))
"""


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_hard_limit_of_file_sizes(user: str) -> None:
    """Who may raise it needs not; who may not is told what it is."""
    if user == "root" and not may_raise_limits():
        pytest.skip("NOT TESTED: this user may not exceed a hard limit (CAP_SYS_RESOURCE)")
    if user == "nobody" and may_raise_limits() and os.getuid():
        pytest.skip("NOT TESTED: this user may exceed a hard limit, and cannot become another")
    lines = child(user, program=FILES_TOO_LARGE).splitlines()
    if user == "root":
        assert lines == ["made", "made", "(4096, 4096)"]
        return
    reason = "RLIMIT_FSIZE allows files of 4096 bytes, and {} are needed"
    assert lines == [
        f"{errno.ENOMEM} KVM_CREATE_VCPU: {reason.format(3 * 4096)}",
        f"{errno.ENOMEM} KVM_CREATE_GUEST_MEMFD: {reason.format(16 * 4096)}",
        "(4096, 4096)",
    ]


SMALL = """
import resource, sys
import anykvm
from anykvm.abi import ioctls as n
backend = anykvm.backend("soft")
kvm = backend.open()
made = backend.ioctl(kvm, n.KVM_CREATE_VM)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
outcomes = []
for more in range(0, 100 << 20, int(sys.argv[1])):
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        backend.ioctl(made, n.KVM_CREATE_VCPU, len(outcomes))
        outcomes.append("made")
        break
    except OSError as error:
        outcomes.append(error.errno)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(outcomes)
"""


def test_a_vcpu_at_each_size_of_the_address_space() -> None:
    """ENOMEM (EAGAIN while not even the ticker's stack fits), until there is room for all of it."""
    outcomes = eval(child(1 << 20, program=SMALL))
    assert outcomes[-1] == "made" and len(outcomes) > 60
    assert set(outcomes[:-1]) <= {errno.ENOMEM, errno.EAGAIN} and outcomes[-2] == errno.ENOMEM


def test_limits_are_there() -> None:
    """Every limit of the system's is swept, but for CPU time, which ends a process by design, and aliases."""
    swept = {name for name, _ in LIMITS}
    left = {"RLIMIT_CPU", "RLIMIT_RSS", "RLIMIT_OFILE", "RLIMIT_RTTIME", "RLIMIT_LOCKS"}
    assert {name for name in dir(resource) if name.startswith("RLIMIT_")} <= swept | left
