"""``anykvm exec``: run an image, and print what the guest does."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import ExitStack
from typing import Annotated, Final, Literal, NamedTuple

import typer

from anykvm.api import Exit, GuestMemory, Hlt, MemoryFault, Shutdown, SystemEvent, Vcpu, Vm
from anykvm.cli.common import BackendOption, ExitCode, Fail, ProfileOption, choose, opened
from anykvm.vmm import loaders, modes
from anykvm.vmm.interrupts import TimeLimit, watched
from anykvm.vmm.loop import TooManyExits, describe, drive
from anykvm.vmm.serial import Console

HELP = """Run IMAGE, a flat binary or a static ELF executable, and print its exits to stderr, one a line.

What the guest writes to port 0xE9 or to a serial line at 0x3F8 goes to stdout, and is not listed. Other ports and
addresses have nothing behind them: a read gives all ones. Memory begins at 0. ELF32 runs in 32-bit protected mode,
ELF64 in long mode (one-to-one page tables up to 4 GiB), a flat binary in real mode, unless told otherwise. In
protected and long mode the first pages hold the mode's tables.

Exit codes: 0 the guest halted; 2 wrong usage or image; 3 no usable backend; 4 shutdown (triple fault); 5 memory fault;
6 internal error or an exit not served here; 7 KVM_RUN failed with an errno; 8 --max-exits reached; 124 --timeout over;
130 interrupted; 143 terminated."""

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_IMAGE: Final = 1 << 30
_LARGEST_MEMORY: Final = 3 << 30  # above it real machines have devices, and KVM its own pages
_LOAD: Final[dict[loaders.Mode, int]] = {"real": 0x7C00, "protected": 0x100000, "long": 0x100000}
_STACK: Final = 0x80000
_PAGE: Final = 4096


class _Range(NamedTuple):
    start: int
    length: int


def _number(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        value = int(text[:-1] if unit > 1 else text, 0) * unit
    except ValueError:
        value = -1
    if value < 0:
        raise typer.BadParameter(f"{text!r} is not a number such as 4096, 0x1000, 4K, 64M or 1G")
    return value


def _range(text: str) -> _Range:
    start, colon, length = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not START:LENGTH")
    found = _Range(_number(start), _number(length))
    if found.start % _PAGE or found.length % _PAGE or not found.length:
        raise typer.BadParameter(f"{text!r} is not a range of whole pages")
    return found


def execute(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The file.")],
    mode: Annotated[
        Literal["auto", "real", "protected", "long"], typer.Option(help="The mode the guest starts in.")
    ] = "auto",
    load: Annotated[
        int | None,
        typer.Option(parser=_number, metavar="GPA", help="Where a flat binary goes [0x7C00; 1M if not real mode]."),
    ] = None,
    entry: Annotated[
        int | None, typer.Option(parser=_number, metavar="GPA", help="The first instruction [the image's own].")
    ] = None,
    memory: Annotated[int, typer.Option(parser=_number, metavar="SIZE", help="Guest memory, from 0 on.")] = "16M",  # type: ignore[assignment]
    hole: Annotated[
        list[_Range] | None,
        typer.Option(
            parser=_range, metavar="GPA:LENGTH", help="Take the host memory away there: touching it is a memory fault."
        ),
    ] = None,
    max_exits: Annotated[int | None, typer.Option(min=1, help="Stop behind so many exits.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Stop the guest then.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the guest's output, no exits.")] = False,
    backend: BackendOption = "auto",
    profile: ProfileOption = None,
) -> None:
    """Run an image to its end."""
    if not 0 < memory <= _LARGEST_MEMORY or memory % _PAGE:
        raise Fail(ExitCode.USAGE, f"--memory {memory:#x} is not a number of whole pages up to 3 GiB")
    loaded = _image(image, mode, load, entry)
    selection = choose(backend, profile)
    if not quiet:
        _say(f"backend {selection.backend.name}, profile {selection.backend.profile}: {selection.reason}")
    with ExitStack() as stack:
        kvm = stack.enter_context(opened(selection))
        vm = stack.enter_context(kvm.create_vm())
        ram = stack.enter_context(GuestMemory(memory, shared=False))
        vcpu = _machine(vm, ram, loaded, image, hole or [])
        stack.enter_context(watched(vcpu, timeout))
        _finish(_drive(vcpu, quiet, max_exits, timeout))


def _image(path: str, mode: Literal["auto"] | loaders.Mode, load: int | None, entry: int | None) -> loaders.Image:
    data = _read(path)
    try:
        if loaders.detect(data):
            if load is not None:
                raise Fail(ExitCode.USAGE, "--load is for flat binaries; an ELF file says itself where it goes")
            image = loaders.elf(data, entry)
            return image if mode == "auto" else image._replace(mode=mode)
        chosen = "real" if mode == "auto" else mode
        return loaders.flat(data, _LOAD[chosen] if load is None else load, chosen, entry)
    except loaders.ImageError as error:
        raise Fail(ExitCode.USAGE, f"{path}: {error}") from None


def _read(path: str) -> bytes:
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Fail(ExitCode.USAGE, f"{path}: not a regular file")
        if status.st_size > _LARGEST_IMAGE:
            raise Fail(ExitCode.USAGE, f"{path}: larger than 1 GiB")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _machine(vm: Vm, ram: GuestMemory, image: loaders.Image, path: str, holes: list[_Range]) -> Vcpu:
    """Make the VM's memory and its vCPU, ready to run the image."""
    vm.map(ram, 0)
    vcpu = vm.create_vcpu()
    reserved = {"real": 0, "protected": modes.TABLES, "long": modes.tables_end(((0, 4 << 30),))}[image.mode]
    try:
        image.load(ram, reserved)
        if ram.size < reserved:
            raise loaders.ImageError(f"memory ends at {ram.size:#x}, the tables of {image.mode} mode at {reserved:#x}")
        stack = min(_STACK, ram.size)
        if image.mode == "real":
            modes.real_mode(vcpu, image.entry)
        elif image.mode == "protected":
            modes.protected_mode(vcpu, ram, image.entry, stack)
        else:
            modes.long_mode(vcpu, ram, image.entry, stack)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"{path}: {error}") from None
    for start, length in holes:
        if start + length > ram.size:
            raise Fail(ExitCode.USAGE, f"--hole {start:#x}:{length:#x} is not within the memory of {ram.size:#x}")
        ram.protect(start, length, 0)
    return vcpu


def _drive(vcpu: Vcpu, quiet: bool, max_exits: int | None, timeout: float | None) -> Exit:
    try:
        return drive(vcpu, Console(_emit), (lambda exit: None) if quiet else _list, max_exits)
    except TooManyExits as error:
        raise Fail(ExitCode.LIMIT, str(error)) from None
    except TimeLimit:
        raise Fail(ExitCode.TIMEOUT, f"stopped after {timeout:g} seconds, at rip {vcpu.get_regs().rip:#x}") from None


def _finish(end: Exit) -> None:
    """Fail as the exit that ended the guest asks for."""
    match end:
        case Hlt():
            return
        case Shutdown() | SystemEvent():
            code = ExitCode.SHUTDOWN
        case MemoryFault():
            code = ExitCode.MEMORY_FAULT
        case _:
            code = ExitCode.INTERNAL
    raise Fail(code, f"the guest ended with {describe(end)}")


def _emit(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _list(exit: Exit) -> None:
    _say(describe(exit))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
