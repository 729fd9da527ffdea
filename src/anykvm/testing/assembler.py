"""Guest code from assembler text, by GNU as and ld, which come with the compiler."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def assemble(source: str, org: int = 0x1000, bits: int = 64) -> bytes:
    """Assemble AT&T ``source`` for ``bits`` (16, 32, 64) at the linear address ``org``.

    Raises ValueError with the assembler's message for text it refuses; FileNotFoundError where there is no ``as``.

    >>> assemble("mov $1, %al; hlt").hex()
    'b001f4'
    """
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "a.s").write_text(f".code{bits}\n.globl _start\n_start:\n{source}\n")
        _run("as", "--64", "-o", str(at / "a.o"), str(at / "a.s"))
        _run("ld", "-Ttext", hex(org), "--oformat", "binary", "-o", str(at / "a.bin"), str(at / "a.o"))
        return (at / "a.bin").read_bytes()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]}: {done.stderr.strip()}")
