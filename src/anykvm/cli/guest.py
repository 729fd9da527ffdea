"""What ``exec`` and ``explain`` share: their options, loading an image, the machine it runs on, and its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any, Final, Literal, NamedTuple

import typer

from anykvm.api import Exit, GuestMemory, Hlt, Kvm, MemoryFault, Shutdown, SystemEvent, Vcpu
from anykvm.backends import Selection
from anykvm.cli import output
from anykvm.cli.common import ExitCode, Fail, choose, choose_for_faults, seconds
from anykvm.cli.output import shown
from anykvm.vmm import formats, loaders, modes
from anykvm.vmm.interrupts import TimeLimit, watched
from anykvm.vmm.loop import TooManyExits, describe, drive
from anykvm.vmm.serial import Console

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_IMAGE: Final = 1 << 30
_LARGEST_MEMORY: Final = 3 << 30  # above it real machines have devices, and KVM its own pages
_LOAD: Final[dict[loaders.Mode, int]] = {"real": 0x7C00, "protected": 0x100000, "long": 0x100000}
_STACK: Final = 0x80000
_PAGE: Final = 4096
# Far below where the kernel puts mappings by itself: nothing of this process lands where memory was unmapped.
_HVA: Final = 1 << 44


class Range(NamedTuple):
    """Whole pages of guest memory."""

    start: int
    length: int


def number(text: str) -> int:
    """Read a number with an optional unit. Raises typer.BadParameter."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        value = int(text[:-1] if unit > 1 else text, 0) * unit
    except ValueError:
        value = -1
    if value < 0:
        raise typer.BadParameter(f"{text!r} is not a number such as 4096, 0x1000, 4K, 64M or 1G")
    return value


def page_range(text: str) -> Range:
    """Read GPA or GPA:LENGTH; one page without a length. Raises typer.BadParameter."""
    start, colon, length = text.partition(":")
    found = Range(number(start), number(length) if colon else _PAGE)
    if found.start % _PAGE or found.length % _PAGE or not found.length:
        raise typer.BadParameter(f"{text!r} is not a range of whole pages")
    return found


def _ranges(*names: str, help: str) -> Any:
    return typer.Option(*names, parser=page_range, metavar="GPA[:LENGTH]", help=help)


ImageArgument = Annotated[str, typer.Argument(metavar="IMAGE", help="The file.")]
ModeOption = Annotated[
    Literal["auto", "real", "protected", "long"], typer.Option("--mode", help="The mode the guest starts in.")
]
FormatOption = Annotated[
    Literal["auto", "flat", "elf"],
    typer.Option("--format", help="What IMAGE is. If given, it is run even if it looks like something else."),
]
LoadOption = Annotated[
    int | None,
    typer.Option(
        "--load", parser=number, metavar="GPA", help="Where a flat binary goes [0x7C00; 1M if not real mode]."
    ),
]
EntryOption = Annotated[
    int | None, typer.Option("--entry", parser=number, metavar="GPA", help="The first instruction [the image's own].")
]
MemoryOption = Annotated[int, typer.Option("--memory", parser=number, metavar="SIZE", help="Guest memory, from 0 on.")]
NoAccessOption = Annotated[
    list[Range] | None, _ranges("--no-access", "--hole", help="Map these pages PROT_NONE: no access is possible.")
]
ReadOnlyOption = Annotated[
    list[Range] | None, _ranges("--read-only", help="Map these pages PROT_READ: a write is not possible.")
]
UnmapOption = Annotated[list[Range] | None, _ranges("--unmap", help="Unmap these pages: the host has nothing there.")]
BeyondFileOption = Annotated[
    int | None,
    typer.Option(
        "--beyond-file", parser=number, metavar="GPA", help="The memory is a file, cut off there when the guest starts."
    ),
]
MaxExitsOption = Annotated[
    int | None, typer.Option("--max-exits", min=1, metavar="N", help="Stop after so many exits.")
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", parser=seconds, metavar="SECONDS", help="Stop the guest then.")
]
MEMORY: Final[Any] = "16M"
"""Default of MemoryOption, as on the command line: its parser reads it."""


class Accidents(NamedTuple):
    """What happens to the host's side of guest memory between loading the image and running it."""

    no_access: list[Range]
    read_only: list[Range]
    unmap: list[Range]
    beyond_file: int | None

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.no_access or self.read_only or self.unmap or self.beyond_file is not None)

    def check(self, size: int) -> None:
        """Fail in one line if one is not within memory of ``size`` bytes."""
        for name in ("no_access", "read_only", "unmap"):
            for start, length in getattr(self, name):
                if start + length > size:
                    option = f"--{name.replace('_', '-')} {start:#x}:{length:#x}"
                    raise Fail(ExitCode.USAGE, f"{option} is not within the memory of {size:#x}")
        end = self.beyond_file
        if end is not None and (end % _PAGE or end >= size):
            raise Fail(ExitCode.USAGE, f"--beyond-file {end:#x} is not a page within the memory of {size:#x}")

    def happen(self, ram: GuestMemory, file: int | None) -> None:
        """Do all of it."""
        if file is not None and self.beyond_file is not None:
            os.ftruncate(file, self.beyond_file)
        for start, length in self.read_only:
            ram.protect(start, length, 1)
        for start, length in self.no_access:
            ram.protect(start, length, 0)
        for start, length in self.unmap:
            ram.unmap(start, length)


class Format(NamedTuple):
    """What the command line says of the image."""

    format: Literal["auto", "flat", "elf"]
    mode: Literal["auto"] | loaders.Mode
    load: int | None
    entry: int | None


class Settings(NamedTuple):
    """A guest as the command line describes it."""

    path: str
    image: loaders.Image
    memory: int
    accidents: Accidents
    max_exits: int | None
    timeout: float | None


def settings(
    path: str,
    how: Format,
    memory: int,
    accidents: Accidents,
    limits: tuple[int | None, float | None],
) -> Settings:
    """Check the options and read the image. Fails in one line."""
    if not 0 < memory <= _LARGEST_MEMORY or memory % _PAGE:
        raise Fail(ExitCode.USAGE, f"--memory {memory:#x} is not a number of whole pages up to 3 GiB")
    accidents.check(memory)
    return Settings(path, _image(path, how), memory, accidents, *limits)


def _image(path: str, how: Format) -> loaders.Image:
    try:
        data = _read(path)
        is_elf = loaders.detect(data) if how.format == "auto" else how.format == "elf"
        if is_elf and how.load is not None:
            raise Fail(ExitCode.USAGE, "--load is for flat binaries; an ELF file says itself where it goes")
        if how.format == "auto" and (foreign := formats.recognise(data)):
            raise loaders.ImageError(f"{foreign.what}; {foreign.runs}{_insist(data, is_elf)}")
        if is_elf:
            image = loaders.elf(data, how.entry)
            return image if how.mode == "auto" else image._replace(mode=how.mode)
        chosen = "real" if how.mode == "auto" else how.mode
        return loaders.flat(data, _LOAD[chosen] if how.load is None else how.load, chosen, how.entry)
    except loaders.ImageError as error:
        raise Fail(ExitCode.USAGE, f"{shown(path)}: {error}") from None


def _insist(data: bytes, is_elf: bool) -> str:
    """Say how to run it nevertheless, where that is possible."""
    if is_elf:
        try:
            loaders.elf(data)
        except loaders.ImageError:
            return ""
    return f"; --format {'elf' if is_elf else 'flat'} runs it here nevertheless"


def _read(path: str) -> bytes:
    """Read a file. Raises ImageError; fails in one line if it cannot be read."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"{shown(path)}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise loaders.ImageError(f"not a regular file: {formats.kind_of_file(status.st_mode)}")
        with open(fd, "rb", closefd=False) as file:
            if status.st_size > _LARGEST_IMAGE:
                foreign = formats.recognise(file.read(formats.ENOUGH), _tail(fd, status.st_size))
                raise loaders.ImageError(f"larger than 1 GiB{f': {foreign.what}; {foreign.runs}' if foreign else ''}")
            return file.read()
    except OSError as error:
        raise Fail(ExitCode.USAGE, f"{shown(path)}: {error.strerror}") from None
    finally:
        os.close(fd)


def _tail(fd: int, size: int) -> bytes:
    return os.pread(fd, _PAGE, size - _PAGE)


def choose_backend(name: str, profile: str | None, accidents: Accidents) -> Selection:
    """Choose a backend; one that can report faults, if host memory is to be taken away."""
    return choose_for_faults(name, profile) if accidents else choose(name, profile)


def machine(stack: ExitStack, kvm: Kvm, wanted: Settings) -> Vcpu:
    """Make the VM, its memory and its vCPU, ready to run the image; they go with ``stack``."""
    vm = stack.enter_context(kvm.create_vm())
    file = None
    if wanted.accidents.beyond_file is not None:
        file = os.memfd_create("ram")
        stack.callback(os.close, file)
        os.ftruncate(file, wanted.memory)
    ram = stack.enter_context(GuestMemory(wanted.memory, fd=file, shared=file is not None, hint=_HVA))
    vm.map(ram, 0)
    vcpu = vm.create_vcpu()
    try:
        _start(vcpu, ram, wanted.image)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"{shown(wanted.path)}: {error}") from None
    stack.enter_context(watched(vcpu, wanted.timeout))
    wanted.accidents.happen(ram, file)
    return vcpu


def _start(vcpu: Vcpu, ram: GuestMemory, image: loaders.Image) -> None:
    """Load the image, and stand at its entry."""
    reserved = {"real": 0, "protected": modes.TABLES, "long": modes.tables_end(((0, 4 << 30),))}[image.mode]
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


def run(vcpu: Vcpu, wanted: Settings, emit: Callable[[bytes], object], quiet: bool) -> Exit:
    """Run to an exit that ends the guest; list the others on stderr unless ``quiet``. Fails in one line at a limit."""
    try:
        return drive(vcpu, Console(emit), (lambda exit: None) if quiet else _list, wanted.max_exits)
    except TooManyExits as error:
        raise Fail(ExitCode.LIMIT, str(error)) from None
    except TimeLimit:
        stopped = f"stopped after {wanted.timeout:g} seconds, at rip {vcpu.get_regs().rip:#x}"
        raise Fail(ExitCode.TIMEOUT, stopped) from None


def finish(end: Exit) -> None:
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


def _list(exit: Exit) -> None:
    say(describe(exit))


def say_backend(selection: Selection) -> None:
    """Print to stderr whose KVM runs the guest, and why."""
    say(f"backend {selection.backend.name}, profile {selection.backend.profile}: {selection.reason}")


def say(text: str) -> None:
    """Print a line to stderr."""
    output.say(text)
