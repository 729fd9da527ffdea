"""The command line: from its arguments to an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated, Any

import typer

import anykvm
from anykvm.cli import caps, conformance, doctor, execute, explain, explore, oracle, postcopy
from anykvm.cli.common import ExitCode, Fail
from anykvm.vmm.interrupts import Terminated, TimeLimit, orderly

app = typer.Typer(
    help="KVM's API, anywhere: on /dev/kvm, or on a KVM in user space.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("postcopy", help=postcopy.HELP)(postcopy.postcopy)
app.command("exec", help=execute.HELP)(execute.execute)
app.command("explain", help=explain.HELP)(explain.explain)
app.command("explore", help=explore.HELP)(explore.explore)
app.command("doctor", help=doctor.HELP)(doctor.doctor)
app.command("caps", help=caps.HELP)(caps.caps)
# No options behind the command that is run: those are its own.
app.command("oracle", help=oracle.HELP, context_settings={"allow_interspersed_args": False})(oracle.oracle)
app.add_typer(conformance.app, name="conformance")

# The base of all that is wrong with a command line. It is click's, which typer has as a dependency or as a part.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"anykvm {anykvm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run a command line; returns the ``ExitCode``."""
    code = _guarded(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _broken_pipe()
    except OSError as error:
        _to_nowhere()
        code = code or _complain(ExitCode.ERRNO, f"standard output: {error.strerror}")
    return code


def _guarded(arguments: list[str]) -> int:
    """Run, turning what a user can cause into one line and a code. Anything else is a bug, and shows its traceback."""
    try:
        with orderly():
            _run(arguments)
    except typer.Exit as end:
        return end.exit_code
    except _CommandLineError as error:
        return _complain(ExitCode.USAGE, _of_command_line(error))
    except Fail as error:
        return _complain(error.code, str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _complain(ExitCode.INTERRUPTED, "interrupted")
    except Terminated as end:
        # As a shell says it: 128 and the signal's number.
        return _complain(ExitCode(128 + end.number), "hung up" if end.number == signal.SIGHUP else "terminated")
    except TimeLimit:
        return _complain(ExitCode.TIMEOUT, "the time limit is over")
    except BrokenPipeError:
        return _broken_pipe()
    except OSError as error:
        return _complain(ExitCode.ERRNO, _of_errno(error))
    except MemoryError:
        return _complain(ExitCode.ERRNO, "out of memory")
    return ExitCode.OK


def _run(arguments: list[str]) -> None:
    # Not command.main(): that answers for itself, in several lines and with its own idea of Ctrl-C.
    command = typer.main.get_command(app)
    if not arguments:
        arguments = ["--help"]
    with command.make_context("anykvm", arguments) as context:
        command.invoke(context)


def _of_command_line(error: Any) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "anykvm"
    return f"{error.format_message().rstrip('.')} (see {path} --help)"


def _of_errno(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


def _complain(code: ExitCode, text: str) -> int:
    with contextlib.suppress(OSError):
        print("anykvm: " + " ".join(text.split()), file=sys.stderr)
    return code


def _broken_pipe() -> int:
    _to_nowhere()
    return ExitCode.FAILED


def _to_nowhere() -> None:
    # Nobody can be written to any more; the interpreter's own flush at exit must not complain about that.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
