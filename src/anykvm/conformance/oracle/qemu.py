"""QEMU: which one, and its command line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from anykvm.conformance.oracle.errors import OracleError

PROGRAM: Final = "qemu-system-x86_64"
OLDEST: Final = (8, 0)
"""Older ones hang when Linux boots on their emulated processor (7.2 was seen to)."""
KERNEL_ARGUMENTS: Final = "console=ttyS0 panic=-1 mitigations=off nokaslr quiet anykvm_oracle"
"""mitigations=off: the emulated processor does not get through some of them. anykvm_oracle: for who must know."""


class Share(NamedTuple):
    """A folder of this machine's that the virtual one mounts by 9p."""

    tag: str
    folder: Path
    writable: bool


def parse_version(text: str) -> tuple[int, int] | None:
    """Read the version from what ``--version`` prints.

    >>> parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)")
    (10, 0)
    """
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def usable() -> bool:
    """Say whether QEMU is here and new enough."""
    if shutil.which(PROGRAM) is None:
        return False
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=False)
    version = parse_version(done.stdout)
    return version is not None and version >= OLDEST


def command_line(kernel: Path, initrd: Path, shares: list[Share], smp: int, memory: int) -> list[str]:
    """Write QEMU's command line; ``memory`` is in MiB. Raises OracleError for a path QEMU cannot be told."""
    line = [PROGRAM, "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max"]
    line += ["-smp", str(smp), "-m", str(memory), "-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"]
    for tag, folder, writable in shares:
        if "\n" in str(folder):
            raise OracleError(f"{folder!r}: a path with a line break cannot be shared")
        path = str(folder).replace(",", ",,")
        readonly = "off" if writable else "on"
        fsdev = f"local,id={tag},path={path},security_model=none,readonly={readonly},multidevs=remap"
        line += ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return [*line, "-kernel", str(kernel), "-initrd", str(initrd), "-append", KERNEL_ARGUMENTS]
