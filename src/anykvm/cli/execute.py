"""``anykvm exec``: run an image, and print what the guest does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from anykvm.cli import guest
from anykvm.cli.common import BackendOption, ProfileOption, opened
from anykvm.cli.injection import InjectOption, injecting
from anykvm.cli.output import write

HELP = """Run IMAGE, a flat binary or a static ELF executable, and print its exits to stderr, one a line.

What the guest writes to port 0xE9 or to a serial line at 0x3F8 goes to stdout, and is not listed. Other ports and
addresses have nothing behind them: a read gives all ones. Memory begins at 0. ELF32 runs in 32-bit protected mode,
ELF64 in long mode (one-to-one page tables up to 4 GiB), a flat binary in real mode, unless told otherwise. In
protected and long mode the first pages hold the mode's tables.

What is recognised as something else (a kernel for a boot loader, a program for an operating system, a disk image, a
compressed file, text) is not run: the error says what it is and what would run it. --format insists.

Host memory can be taken away before the guest runs: touching it is a memory fault; `anykvm explain` says why. Any
call of KVM can be made to fail with --inject; what was injected is said on stderr, with the rule that replays it.

Exit codes: 0 the guest halted; 2 wrong usage or image; 3 no usable backend; 4 shutdown (triple fault); 5 memory fault;
6 internal error or an exit not served here; 7 KVM_RUN failed with an errno, or the output could not be written; 8
--max-exits reached; 70 a bug of anykvm; 124 --timeout over; 129 hung up; 130 interrupted; 143 terminated."""


def execute(
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No exits; only output, and which backend.")] = False,
    backend: BackendOption = "auto",
    profile: ProfileOption = None,
    inject: InjectOption = None,
) -> None:
    """Run an image to its end."""
    accidents = guest.Accidents(no_access or [], read_only or [], unmap or [], beyond_file)
    wanted = guest.settings(image, guest.Format(format, mode, load, entry), memory, accidents, (max_exits, timeout))
    selection = guest.choose_backend(backend, profile, accidents)
    guest.say_backend(selection)
    with ExitStack() as stack:
        kvm = stack.enter_context(opened(stack.enter_context(injecting(selection, inject))))
        vcpu = guest.machine(stack, kvm, wanted)
        guest.finish(guest.run(vcpu, wanted, _emit, quiet))


def _emit(data: bytes) -> None:
    write(data)
