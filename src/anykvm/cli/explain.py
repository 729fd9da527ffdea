"""``anykvm explain``: run an image into a KVM_RUN that fails with EFAULT, and say which access it was, and why."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from anykvm.api import Exit, Hlt, MemoryFault, Vcpu
from anykvm.backends import Selection
from anykvm.cli import guest
from anykvm.cli.common import (
    BackendOption,
    ExitCode,
    Fail,
    JsonOption,
    ProfileOption,
    choose,
    choose_for_faults,
    opened,
)
from anykvm.cli.injection import InjectOption, injecting
from anykvm.cli.output import line, print_json

if TYPE_CHECKING:
    from anykvm.cli.explanation import Report
    from anykvm.layers.annotate import Annotate

HELP = """Run IMAGE until KVM_RUN fails with EFAULT; explain which guest access it was and why the host refused it.

IMAGE and its machine are as in `anykvm exec`. The options that take host memory away make the failure. The explanation
goes to stdout, the guest's exits and output to stderr. It is worked out from the registers, the instruction, the
guest's page tables, the memslots and the host's mappings, and takes no help from the backend; where KVM itself
annotates the failure (kvm_run.memory_fault), the two are compared.

The backend is the kernel's KVM if that works and can report faults, else the soft one, with profile linux-7.3, which
fails as that kernel: a bare EFAULT. Profile documented annotates.

Exit codes: 0 one cause was found, and KVM's own annotation, if there is one, agrees; 1 none was found, or it is not
the page that KVM names; 2 wrong usage or image; 3 no usable backend; 4 shutdown; 6 internal error or an exit not
served here; 7 KVM_RUN failed with another errno, or the output could not be written; 8 --max-exits reached; 10 several
causes are possible, all are listed; 11 the guest halted, there is nothing to explain; 70 a bug of anykvm; 124 --timeout
over; 129 hung up; 130 interrupted; 143 terminated."""

_PROFILE = "linux-7.3"


def explain(
    image: guest.ImageArgument,
    format: guest.FormatOption = "auto",
    mode: guest.ModeOption = "auto",
    load: guest.LoadOption = None,
    entry: guest.EntryOption = None,
    memory: guest.MemoryOption = guest.MEMORY,
    no_access: guest.NoAccessOption = None,
    read_only: guest.ReadOnlyOption = None,
    unmap: guest.UnmapOption = None,
    beyond_file: guest.BeyondFileOption = None,
    max_exits: guest.MaxExitsOption = None,
    timeout: guest.TimeoutOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No exits, no output; only which backend.")] = False,
    json: JsonOption = False,
    backend: BackendOption = "auto",
    profile: ProfileOption = None,
    inject: InjectOption = None,
) -> None:
    """Run an image into a failure, and explain that."""
    # Only here: the disassembler is large, and other commands need none.
    from anykvm.cli.explanation import text
    from anykvm.layers.annotate import Annotate

    accidents = guest.Accidents(no_access or [], read_only or [], unmap or [], beyond_file)
    wanted = guest.settings(image, guest.Format(format, mode, load, entry), memory, accidents, (max_exits, timeout))
    selection = _choose(backend, profile)
    guest.say_backend(selection)
    with ExitStack() as stack:
        layer = Annotate(stack.enter_context(injecting(selection, inject)).backend)
        kvm = stack.enter_context(opened(selection._replace(backend=layer)))
        vcpu = guest.machine(stack, kvm, wanted)
        report = _run(layer, vcpu, wanted, quiet)
    if json:
        print_json(report.plain())
    else:
        line(text(report))
    _finish(report)


def _choose(backend: str, profile: str | None) -> Selection:
    """Choose a backend; the soft one fails as a kernel unless its profile is asked for."""
    selection = choose_for_faults(backend, profile)
    if selection.backend.name == "soft" and profile is None:
        selection = selection._replace(backend=choose("soft", _PROFILE).backend)
    return selection


def _run(layer: Annotate, vcpu: Vcpu, wanted: guest.Settings, quiet: bool) -> Report:
    """Run to the failure. Fails in one line if the guest ends otherwise."""
    from anykvm.cli.explanation import Report

    output = _Output(quiet)
    try:
        end = guest.run(vcpu, wanted, output.emit, quiet)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        why = layer.last_unexplained(vcpu.fileno())
        return Report(layer, errno.EFAULT, vcpu.kvm_run.exit_reason, None, getattr(error, "cause", None), why)
    finally:
        output.flush()
    if isinstance(end, MemoryFault):
        cause = layer.explain(vcpu.fileno())
        why = layer.last_unexplained(vcpu.fileno())
        return Report(layer, end.errno, vcpu.kvm_run.exit_reason, end, cause, why)
    raise _nothing(end)


def _nothing(end: Exit) -> Fail:
    if isinstance(end, Hlt):
        return Fail(ExitCode.NOTHING, "the guest halted, and no KVM_RUN failed: there is nothing to explain")
    try:
        guest.finish(end)
    except Fail as failure:
        return Fail(failure.code, f"{failure}: there is nothing to explain")
    raise AssertionError(end)


def _finish(report: Report) -> None:
    if report.cause is None:
        why = f": {report.unexplained}" if report.unexplained else ""
        raise Fail(ExitCode.FAILED, f"KVM_RUN failed with EFAULT, and no cause was found{why}")
    if report.agrees is False:
        raise Fail(ExitCode.FAILED, "the explanation is not the page that KVM names")
    if report.cause.ambiguous:
        raise typer.Exit(ExitCode.AMBIGUOUS)


class _Output:
    """The guest's output, a line of stderr for each of its lines: stdout is for the explanation."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._held = b""

    def emit(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\n")) >= 0:
            self._show(self._held[: end + 1])
            self._held = self._held[end + 1 :]

    def flush(self) -> None:
        if self._held:
            self._show(self._held)
            self._held = b""

    def _show(self, line: bytes) -> None:
        if not self._quiet:
            guest.say(f"output {line.decode('utf-8', 'backslashreplace')!r}")
