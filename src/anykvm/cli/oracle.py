"""``anykvm oracle``: run a command on a real Linux with a real /dev/kvm, which needs no KVM here."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from anykvm.cli.common import ExitCode, Fail, seconds
from anykvm.cli.output import LiveFile, shown
from anykvm.cli.progress import Progress
from anykvm.conformance.oracle import OracleError, Settings, run
from anykvm.conformance.oracle.kernels import DEFAULT

HELP = """Run COMMAND on a real Linux with a real /dev/kvm (kvm_amd), in a virtual machine that needs no KVM here.

COMMAND sees this machine's files, in the same working directory; what it writes is lost, except to --output. Its output
and exit code are this command's. Debian's kernel is downloaded when first used; QEMU is installed with apt if run as
root. Without a machine the exit code is 3; with --timeout over 124; 129 hung up; 130 interrupted; 143 terminated."""


def oracle(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run, with its arguments.")],
    kernel: Annotated[
        str, typer.Option(metavar="VERSION|PATH", help="The newest of Debian's that begins so, or an image's path.")
    ] = DEFAULT,
    timeout: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="SECONDS", help="Booting included; then exit code 124."),
    ] = None,
    smp: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="CPUs.")] = 1,
    memory: Annotated[int, typer.Option(min=512, max=1 << 20, metavar="MIB", help="Of memory.")] = 4096,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder COMMAND may write to; made if missing.")
    ] = None,
    console: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what the machine's console says.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Run the machine, and end as the command did."""
    if output and os.path.exists(output) and not output.is_dir():
        raise Fail(ExitCode.USAGE, f"--output {shown(output)}: not a folder")
    with contextlib.ExitStack() as stack:
        said: Any = stack.enter_context(LiveFile("--console", console)) if console else None
        raise typer.Exit(run_oracle(command, Settings(kernel, smp, memory, timeout, output, said), quiet))


def run_oracle(command: list[str], settings: Settings, quiet: bool = False) -> int:
    """Run a command in the oracle's machine, saying on stderr how it gets on; returns its exit code.

    Fails in one line if there is no machine, or its time is over.
    """
    progress = Progress(quiet)
    try:
        return run(command, settings, progress.say, booting=progress.booting)
    except OracleError as error:
        raise Fail(ExitCode.BACKEND, str(error)) from None
    except TimeoutError as error:
        raise Fail(ExitCode.TIMEOUT, str(error)) from None
    finally:
        progress.end()
