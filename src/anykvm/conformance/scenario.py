"""What a scenario is: a function with a name, an area and needs; and the lab it is given, which keeps its records."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from anykvm.abi.names import errno_name
from anykvm.api.vm import Vm
from anykvm.backends.base import Backend
from anykvm.conformance.golden_file import Record
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome, attempt
from anykvm.conformance.signals import Signals

if TYPE_CHECKING:
    from anykvm.api.handle import Argument, Handle

Body: TypeAlias = Callable[["Lab"], None]

NEEDS: Final = frozenset(
    (
        "attributes",  # KVM_SET_MEMORY_ATTRIBUTES and KVM_X86_SW_PROTECTED_VM
        "coalesced_io",  # KVM_REGISTER_COALESCED_MMIO
        "device_memory",  # host mappings with VM_IO or VM_PFNMAP
        "dirty_log",
        "dirty_ring",
        "guest_memfd",
        "hugetlb",  # the right to change the number of huge pages
        "hypercalls",  # KVM_CAP_EXIT_HYPERCALL
        "ioeventfd",
        "irqchip",  # an in-kernel interrupt controller
        "paravirtual",  # KVM's own MSRs
        "poison",  # MADV_HWPOISON or UFFDIO_POISON
        "pre_fault",
        "quirks",  # KVM_CAP_DISABLE_QUIRKS2
        "smp",  # a second vCPU
        "user_space_msr",  # KVM_CAP_X86_USER_SPACE_MSR
        "userfaultfd",
    )
)
"""What a scenario may need beyond a VM with one vCPU and plain memory slots."""
INTRUSIVE: Final = frozenset(("device_memory", "hugetlb", "poison"))
"""Needs that reach beyond this process: into the machine's memory, its settings, its devices."""


class Scenario(NamedTuple):
    """A registered scenario."""

    name: str
    area: str
    """What it is about; scenarios of one area lie in one module."""
    needs: frozenset[str]
    """What it needs beyond a VM with one vCPU and plain memory slots: of ``NEEDS``."""
    timeout: float
    """Seconds after which it hangs."""
    run: Body

    @property
    def basic(self) -> bool:
        """Whether it needs nothing beyond a VM with one vCPU and plain memory slots."""
        return not self.needs

    @property
    def intrusive(self) -> bool:
        """Whether it changes the machine it runs on when it may (as root): run it in a virtual machine."""
        return bool(self.needs & INTRUSIVE)


SCENARIOS: Final[dict[str, Scenario]] = {}
"""Every scenario by name, in the order of their modules; filled by ``load``."""


def scenario(name: str, *, area: str, needs: tuple[str, ...] = (), timeout: float = 20.0) -> Callable[[Body], Body]:
    """Register a function as a scenario.

    Raises ValueError for a name that is taken, or a need that is not in ``NEEDS``.
    """

    def register(function: Body) -> Body:
        if name in SCENARIOS:
            raise ValueError(f"two scenarios are named {name}")
        if unknown := set(needs) - NEEDS:
            raise ValueError(f"{name}: unknown needs {sorted(unknown)}")
        SCENARIOS[name] = Scenario(name, area, frozenset(needs), timeout, function)
        return function

    return register


def load() -> dict[str, Scenario]:
    """Import every module of scenarios; returns ``SCENARIOS``.

    >>> load()["unmapped_read"].basic
    True
    """
    from anykvm.conformance import scenarios

    for module in sorted(entry.name for entry in pkgutil.iter_modules(scenarios.__path__)):
        importlib.import_module(f"{scenarios.__name__}.{module}")
    return SCENARIOS


class Lab:
    """What a scenario works in: it makes machines on the backend under test and keeps the records of its steps."""

    def __init__(self, scenario: str, backend: Backend, keep: Callable[[Record], None]) -> None:
        """Run ``scenario`` on ``backend``; ``keep`` is called with each record as it is made."""
        self.scenario = scenario
        self.backend = backend
        self.signals = Signals()
        self._keep = keep
        self._machines: list[Machine] = []  # all live until the scenario ends, as their host memory does

    def machine(self, type: int = 0, irqchip: bool = False, prepare: Callable[[Vm], None] | None = None) -> Machine:
        """Make a VM and vCPU in 64-bit mode, laid out as ``layout`` says. Raises OSError if there can be none.

        ``prepare`` is done to the VM before it has a vCPU.
        """
        made = Machine(self.backend, self.signals, self.record, type, irqchip, prepare)
        self._machines.append(made)
        return made

    def protected_machine(self) -> Machine | None:
        """Make a machine with private memory (KVM_X86_SW_PROTECTED_VM), or record the failure and return None."""
        try:
            return self.machine(type=1)
        except OSError as error:
            self.step("create_SW_PROTECTED_VM", Outcome(-1, error.errno or 0))
            return None

    def irqchip_machine(self) -> Machine | None:
        """Make a machine with an in-kernel interrupt controller, or record the failure and return None."""
        try:
            return self.machine(irqchip=True)
        except OSError as error:
            self.step("CREATE_IRQCHIP", Outcome(-1, error.errno or 0))
            return None

    def step(self, name: str, outcome: Outcome | Callable[[], int | None], **seen: Any) -> Outcome:
        """Record what a system call gave: an outcome, or a function to call for one."""
        result = outcome if isinstance(outcome, Outcome) else attempt(outcome)
        self.record(name, **result.fields(), **seen)
        return result

    def ioctl(self, name: str, handle: Handle, request: int, arg: Argument = 0, **seen: Any) -> Outcome:
        """Do an ioctl and record what it gave."""
        return self.step(name, attempt(lambda: handle.ioctl(request, arg)), **seen)

    def note(self, name: str, **seen: Any) -> None:
        """Record something seen between calls: memory, a file, a state."""
        self.record(name, **seen)

    def record(self, step: str, **fields: Any) -> None:
        """Keep a record."""
        self._keep({"n": self.scenario, "s": step, **fields})


def failure(scenario: str, error: BaseException) -> Record:
    """Make the record of a scenario that broke off with an exception: a fault of it, or of the backend."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
        trace = trace.tb_next
    errno = error.errno if isinstance(error, OSError) else None
    return {
        "n": scenario,
        "s": "<error>",
        "error": f"{type(error).__name__}: {error}",
        "at": place,
        "errname": errno_name(errno or 0),
    }
