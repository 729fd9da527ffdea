"""``anykvm postcopy``: a guest computes the CRC of a file whose pages arrive as it touches them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TextIO

import typer

from anykvm.backends import Backend, Selection
from anykvm.backends.probe import emulated
from anykvm.backends.soft.profiles import PROFILES
from anykvm.cli.common import (
    BackendOption,
    ExitCode,
    Fail,
    JsonOption,
    ProfileOption,
    choose_for_faults,
    opened,
)
from anykvm.cli.output import Output, line, print_json, shown, styled
from anykvm.vmm.postcopy import FileError, Result, Source, run
from anykvm.vmm.resolvers import Unresolvable

HELP = """Run a guest that computes the CRC-32 of FILE in its memory, where at first no page is.

Each first touch of a page ends KVM_RUN with a memory fault; the page is then brought from FILE, and the guest goes on.
At the end its CRC must equal zlib's. The guest computes each page's CRC when it visits the page, in random or
ascending order, and joins them at the end. A report with a heat map of the faults is written as one HTML page.

A fault's latency is the VMM's part of it: from KVM_RUN's return with the fault until it is ready to run again.

The backend is the kernel's KVM if that works and can report faults, else the soft one. No kernel up to 7.3 reports a
fault on ordinary memory as a memory fault: there, and with profile linux-7.3, KVM_RUN gives a bare EFAULT, and the
Annotate layer works out which page it was; that is not in the latencies.

The report replaces an older one only when it is complete. PATH may be a device, a FIFO, or - for standard output; what
else is printed then goes to stderr.

Exit codes: 0 the CRCs are equal; 1 they are not; 2 wrong usage, FILE cannot be used, or PATH cannot be written to; 3 no
usable backend; 5 a fault could not be resolved, or KVM did not report it as one; 7 KVM or writing the output failed
with an errno; 9 FILE changed while the guest ran; 70 a bug of anykvm; 129 hung up; 130 interrupted; 143 terminated."""


def postcopy(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where the guest's memory comes from.")],
    order: Annotated[
        Literal["random", "sequential"], typer.Option(help="The order in which the guest visits the pages.")
    ] = "random",
    prefetch: Annotated[
        int, typer.Option(min=0, max=1 << 20, metavar="N", help="Bring N more pages behind each missing one.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random order.")] = 0,
    backend: BackendOption = "auto",
    profile: ProfileOption = None,
    html: Annotated[str, typer.Option(metavar="PATH", help="Where the report goes.")] = "postcopy.html",
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no report.")] = False,
    json: JsonOption = False,
) -> None:
    """Run the guest, print the result, write the report."""
    with contextlib.ExitStack() as stack:
        out = None if no_html else stack.enter_context(Output("--html", html, file))
        if json and out and out.is_stdout:
            raise Fail(ExitCode.USAGE, "--json and --html - cannot both go to stdout")
        chosen = choose_for_faults(backend, profile)
        selection = _annotated(chosen)
        with _one_line(selection.backend), Source(file) as source:
            with opened(selection) as kvm, _progress(source, quiet=json) as progress:
                result = run(kvm, source, order, prefetch, seed, progress)
            changed = source.changed
        unwritten = _write(out, file, result)
        report = None if out is None or unwritten else html
        if json:
            print_json(_plain(file, result, report, chosen.reason))
        else:
            _show(file, result, report, chosen, out.others if out else None)
        if unwritten:
            raise unwritten
    if not result.correct:
        if changed:
            raise Fail(ExitCode.FILE, f"{shown(file)}: it changed while the guest ran, and the CRCs differ")
        raise Fail(ExitCode.FAILED, f"the guest's CRC {result.crc_guest:08x} is not zlib's {result.crc_zlib:08x}")


def _write(out: Output | None, file: str, result: Result) -> Fail | None:
    """Write the report; give the failure back, for the result is to be shown even so."""
    if out is None:
        return None
    # Only here: the template engine is large, and most commands need none.
    from anykvm.vmm.report import render

    try:
        out.write(render(shown(file.rpartition("/")[2]), result))
    except Fail as failure:
        return failure
    return None


def _annotated(selection: Selection) -> Selection:
    """Put the Annotate layer on a backend whose KVM does not name the page of a fault on ordinary memory."""
    profile = PROFILES.get(selection.backend.profile)
    if profile is not None and profile.annotate_unresolved:
        return selection
    # Only here: the disassembler is large, and by default none is needed.
    from anykvm.layers.annotate import Annotate

    return selection._replace(backend=Annotate(selection.backend, "fill"))


@contextlib.contextmanager
def _one_line(backend: Backend) -> Iterator[None]:
    """Fail in one line, which names the backend if it is about that."""
    where = f"backend {backend.name}, profile {backend.profile}"
    try:
        yield
    except FileError as error:
        raise Fail(ExitCode.FILE if error.while_running else ExitCode.USAGE, str(error)) from None
    except Unresolvable as error:
        why = "".join(f"; {note}" for note in (emulated() if backend.name == "device" else ()))
        raise Fail(ExitCode.MEMORY_FAULT, f"{where}: {error}{why}") from None
    except OSError as error:
        raise Fail(ExitCode.ERRNO, f"{where}: {error.strerror or error}") from None


@contextlib.contextmanager
def _progress(source: Source, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal, drawn only when the run calls for it: a thread that draws would delay faults."""
    if quiet or not sys.stderr.isatty():
        yield lambda present: None
        return
    # Only here: it is large, and in a pipe there is no bar.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("post-copy"), BarColumn(), TaskProgressColumn(), TextColumn("{task.completed:,} pages"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=-(-source.size // 4096))
        yield lambda present: bar.update(task, completed=present, refresh=True)


def _plain(file: str, result: Result, report: str | None, reason: str) -> dict[str, Any]:
    return {
        "file": file,
        "bytes": result.size,
        "pages": result.pages,
        "faults": len(result.faults.page),
        "order": result.order,
        "prefetch": result.prefetch,
        "seed": result.seed,
        "backend": result.backend,
        "profile": result.profile,
        "reason": reason,
        "layers": list(result.layers),
        "seconds": result.wall_ns / 1e9,
        "seconds_handling_faults": result.handling_ns / 1e9,
        "faults_per_second": result.faults_per_second,
        "latency_us": {"p50": result.latency_us(0.5), "p99": result.latency_us(0.99), "max": result.latency_us(1)},
        "crc_guest": f"{result.crc_guest:08x}",
        "crc_zlib": f"{result.crc_zlib:08x}",
        "correct": result.correct,
        "report": report,
    }


def _show(file: str, result: Result, report: str | None, chosen: Selection, to: TextIO | None) -> None:
    faults = len(result.faults.page)
    seed = f" (seed {result.seed})" if result.order == "random" else ""
    why = f" ({chosen.reason})" if chosen.probes else ""
    verdict = styled("equal", "green", to) if result.correct else styled("different", "red", to)
    rows = [
        ("file", f"{shown(file)}, {result.size:,} bytes"),
        ("backend", f"{result.backend}, profile {result.profile}{_layers(result)}{why}"),
        ("pages", f"{result.pages:,}, visited in {result.order} order{seed}"),
        ("faults", f"{faults:,}" + (f", prefetching {result.prefetch}" if result.prefetch else "")),
        ("time", f"{result.wall_ns / 1e9:.3f} s, of which {result.handling_ns / 1e9:.3f} s bringing pages"),
        ("faults/s", f"{result.faults_per_second:,.0f}"),
        ("latency", _latency(result)),
        ("CRC-32", f"guest {result.crc_guest:08x}, zlib {result.crc_zlib:08x}: {verdict}"),
    ]
    if report is not None:
        rows.append(("report", shown(report)))
    for label, text in rows:
        line(f"{styled(f'{label:9}', 'bold', to)} {text}", to)


def _layers(result: Result) -> str:
    return ", the Annotate layer finds the pages" if "Annotate" in result.layers else ""


def _latency(result: Result) -> str:
    p50, p99, longest = (result.latency_us(quantile) for quantile in (0.5, 0.99, 1))
    if p50 is None:
        return "no fault"
    return f"p50 {p50:.1f} us, p99 {p99:.1f} us, longest {longest:.1f} us"
