"""The command line: from its arguments to an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import anykvm
from anykvm.cli import caps, conformance, doctor, execute, explain, explore, oracle, postcopy
from anykvm.cli.common import ExitCode, Fail
from anykvm.cli.output import prepare_streams, shown
from anykvm.vmm.interrupts import Terminated, TimeLimit, orderly

_DEBUG: Final = "ANYKVM_DEBUG"
"""Set in the environment, it has a bug of anykvm show its traceback."""


class WholeSummaries(TyperGroup):
    """Lists its commands with their whole first sentence, wrapped; typer cuts it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_sentence(command.help or "")) for name, command in commands if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    """Give the first sentence of a help text.

    >>> _first_sentence("Do this, or\\nthat. More.")
    'Do this, or that.'
    """
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, end, _ = paragraph.partition(". ")
    return sentence + end.strip()


app = typer.Typer(
    cls=WholeSummaries,
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
app.add_typer(conformance.app, name="conformance", cls=WholeSummaries)

# The base of all that is wrong with a command line. It is click's. Typer has click as a dependency, or as a part.
_CommandLineError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


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
    prepare_streams()
    code, told = _guarded(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _broken_pipe()
    except OSError as error:
        _to_nowhere()
        if not told:
            code = _complain(ExitCode.ERRNO, f"standard output: {error.strerror}")
    return code


def _guarded(arguments: list[str]) -> tuple[int, bool]:
    """Run; returns the code, and whether a line on stderr told it.

    What a user or the machine can cause is one line. Anything else is a bug, and is one line that says so.
    """
    try:
        with orderly():
            _run(arguments)
    except typer.Exit as end:
        return end.exit_code, False
    except _CommandLineError as error:
        return _complain(ExitCode.USAGE, _of_command_line(error)), True
    except Fail as error:
        return _complain(error.code, str(error)), True
    except (KeyboardInterrupt, typer.Abort):
        return _complain(ExitCode.INTERRUPTED, "interrupted"), True
    except Terminated as end:
        # As a shell says it: 128 and the signal's number.
        text = "hung up" if end.number == signal.SIGHUP else "terminated"
        return _complain(ExitCode(128 + end.number), text), True
    except TimeLimit:
        return _complain(ExitCode.TIMEOUT, "the time limit is over"), True
    except BrokenPipeError:
        return _broken_pipe(), True
    except OSError as error:
        _show_traceback(error)
        return _complain(ExitCode.ERRNO, _of_stdout(error) or _of_errno(error)), True
    except MemoryError:
        return _complain(ExitCode.ERRNO, "out of memory"), True
    except Exception as error:
        return _bug(error), True
    return ExitCode.OK, False


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
    return f"{os.fsdecode(error.filename)}: {text}" if isinstance(error.filename, str | bytes) else text


def _of_stdout(error: OSError) -> str:
    """Say so if it was stdout that could not be written to, by the help for example: then it still cannot be."""
    try:
        sys.stdout.flush()
    except OSError as again:
        if again.errno == error.errno:
            return f"standard output: {again.strerror}"
    return ""


def _bug(error: Exception) -> int:
    shown_already = _show_traceback(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    how = "" if shown_already else f"; {_DEBUG}=1 in the environment shows the traceback"
    return _complain(ExitCode.BUG, f"a bug of anykvm: {type(error).__name__}: {error} ({where}){how}")


def _show_traceback(error: Exception) -> bool:
    wanted = bool(os.environ.get(_DEBUG))
    if wanted:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    return wanted


def _complain(code: ExitCode, text: str) -> int:
    with contextlib.suppress(OSError):
        print("anykvm: " + shown(" ".join(text.split())), file=sys.stderr)
    return code


def _broken_pipe() -> int:
    _to_nowhere()
    return ExitCode.FAILED


def _to_nowhere() -> None:
    # Nobody can be written to any more; the interpreter's own flush at exit must not complain about that.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
