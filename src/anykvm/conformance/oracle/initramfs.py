"""The oracle's first file system: busybox, the modules needed until the host's files are there, and ``init.sh``."""

from __future__ import annotations

import gzip
import io
import lzma
import stat
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from anykvm.conformance.oracle.errors import OracleError

MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")
"""What the machine needs and Debian's kernels have as modules; what a kernel has not as a module is built in."""
_FOLDERS: Final = ("bin", "control", "dev", "lower", "modules", "newroot", "over", "proc", "sys")


class Entry(NamedTuple):
    """A file, folder or device of an archive."""

    name: str
    mode: int
    """As in ``st_mode``: type and permissions."""
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device."""


def cpio(entries: Iterable[Entry]) -> bytes:
    """Write an archive in the kernel's format (newc; Documentation/driver-api/early-userspace/buffer-format.rst).

    >>> archive = cpio([Entry("init", 0o100755, b"#!")])
    >>> archive[:6], len(archive) % 512
    (b'070701', 0)
    """
    written = io.BytesIO()
    for number, entry in enumerate((*entries, Entry("TRAILER!!!", 0)), 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        written.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        _pad(written, 4)
        written.write(entry.data)
        _pad(written, 4)
    _pad(written, 512)
    return written.getvalue()


def build(busybox: Path, modules: Path | None) -> bytes:
    """Make the archive. Raises OracleError for a module that cannot be read, OSError for a file."""
    loaded = load_order(modules) if modules else {}
    files = [Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, data) for name, data in loaded.items()]
    order = "".join(f"{name}\n" for name in loaded).encode()
    return cpio(
        (
            *(Entry(name, stat.S_IFDIR | 0o755) for name in _FOLDERS),
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
            Entry("init", stat.S_IFREG | 0o755, (resources.files(__package__) / "init.sh").read_bytes()),
            Entry("modules/order", stat.S_IFREG | 0o644, order),
            *files,
        )
    )


def load_order(folder: Path) -> dict[str, bytes]:
    """Give the modules needed, each behind those it depends on, uncompressed.

    Debian's packages have no ``modules.dep`` (it is made when they are installed), so each module is asked.
    """
    paths = {_name(path): path for path in folder.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in loaded or name not in paths:
            return
        data = _uncompressed(paths[name])
        for needed in depends(data):
            add(needed)
        loaded[name] = data

    for name in MODULES:
        add(name)
    return loaded


def depends(module: bytes) -> list[str]:
    """Name the modules that a module depends on, from its ``.modinfo``. Raises OracleError if it has none."""
    try:
        section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    except ELFError as error:
        raise OracleError(f"a kernel module cannot be read: {error}") from None
    if section is None:
        raise OracleError("a kernel module has no .modinfo")
    found = [field[len(b"depends=") :] for field in section.data().split(b"\0") if field.startswith(b"depends=")]
    return [name.replace("-", "_") for field in found for name in field.decode().split(",") if name]


def _name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".ko":
        return data
    raise OracleError(f"{path}: modules compressed in this way cannot be read here; use a kernel with .ko or .ko.xz")


def _pad(written: io.BytesIO, unit: int) -> None:
    written.write(bytes(-written.tell() % unit))
