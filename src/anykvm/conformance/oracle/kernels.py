"""Which kernel the oracle runs: one of Debian's by its version, kept unpacked in the cache; or a file."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from anykvm.conformance.oracle.apt import Downloads, Say
from anykvm.conformance.oracle.errors import OracleError

DEFAULT: Final = "7.3"
"""The kernel of the profile ``linux-7.3``."""
_MAGIC_AT, _VERSION_AT, _VERSION_BASE = 0x202, 0x20E, 0x200
_PARTS: Final = ("binary", "modules")
"""Packages that newer kernels are split into: ``linux-binary-VERSION`` has the image."""


class Kernel(NamedTuple):
    """A kernel to boot."""

    version: str
    """As ``uname -r`` will say."""
    image: Path
    modules: Path | None
    """The folder with its modules, or None if all it needs is built in."""


def cache_folder() -> Path:
    """Name the folder in which the oracle keeps what it downloads: below XDG_CACHE_HOME, or ~/.cache.

    Raises OracleError if there is no home.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise OracleError("no home directory to keep kernels in: set HOME or XDG_CACHE_HOME") from None
    return Path(base) / "anykvm" / "oracle"


def find(spec: str, cache: Path, say: Say) -> Kernel:
    """Find a kernel by version (``7.3``, ``6.12``, ``7.3.4+deb13-amd64``), or by the path of its image.

    A version means the newest that begins with it: in the cache, else from Debian.
    Raises OracleError if there is none, or the file is no kernel.
    """
    if "/" in spec:
        return _from_file(Path(spec))
    if not re.fullmatch(r"\d[\w.+~-]*", spec):
        raise OracleError(f"--kernel {spec}: neither a version such as {DEFAULT} nor a path (with a /)")
    kept = _matching(spec, [path.name for path in (cache / "kernels").glob("*") if (path / "vmlinuz").exists()])
    version = kept or _download(spec, cache, say)
    folder = cache / "kernels" / version
    return Kernel(version, folder / "vmlinuz", folder / "modules")


def image_version(image: bytes) -> str:
    """Read a kernel's version from its image (the x86 boot protocol's setup header). Raises ValueError if not one."""
    if image[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise ValueError("no x86 Linux kernel image (bzImage)")
    at = int.from_bytes(image[_VERSION_AT : _VERSION_AT + 2], "little") + _VERSION_BASE
    return image[at : at + 256].split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")


def _from_file(path: Path) -> Kernel:
    try:
        version = image_version(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OracleError(f"--kernel {path}: {getattr(error, 'strerror', None) or error}") from None
    folders = (path.parent / "modules", Path("/lib/modules") / version)
    return Kernel(version, path, next((folder for folder in folders if folder.is_dir()), None))


def _matching(spec: str, versions: list[str]) -> str | None:
    """Choose the newest of the versions that begin with ``spec``.

    >>> _matching("6.12", ["6.12.9+deb12-amd64", "6.12.43+deb12-amd64", "6.1.0-amd64"])
    '6.12.43+deb12-amd64'
    """
    fit = [version for version in versions if version == spec or re.match(re.escape(spec) + r"[.+-]", version)]
    return max(fit, key=lambda version: [int(part) for part in re.findall(r"\d+", version)], default=None)


def _download(spec: str, cache: Path, say: Say) -> str:
    downloads = Downloads(cache / "apt", say)
    downloads.update()
    names = downloads.names("^linux-image-[0-9].*-amd64$")
    known = [name.removeprefix("linux-image-") for name in names]
    plain = [version for version in known if not re.search(r"-(cloud|rt)-", version)]
    version = _matching(spec, plain)
    if version is None and downloads.failed:
        raise OracleError(f"--kernel {spec}: not in the lists of packages that could be had; {downloads.failed[0]}")
    if version is None:
        newest = sorted({".".join(v.split(".")[:2]) for v in plain}, key=lambda v: [int(p) for p in v.split(".")])
        raise OracleError(f"--kernel {spec}: Debian has no such kernel; it has {', '.join(newest) or 'none'}")
    package = f"linux-image-{version}"
    packages = [package, *(name for name in downloads.depends(package) if name in _split(version))]
    target = cache / "kernels" / version
    with downloads.unpacked(packages, target.parent / f".{version}") as unpacked:
        _keep(unpacked, version, target)
    return version


def _split(version: str) -> set[str]:
    return {f"linux-{part}-{version}" for part in _PARTS}


def _keep(unpacked: Path, version: str, target: Path) -> None:
    """Keep the image and the modules of an unpacked package; the image last: with it the kernel is complete."""
    image = next((p for p in (*unpacked.rglob("vmlinuz"), *unpacked.rglob(f"vmlinuz-{version}"))), None)
    modules = next((p for p in unpacked.rglob(version) if p.parent.name == "modules"), None)
    if image is None or modules is None:
        raise OracleError(f"linux-image-{version}: an image or modules are missing in the package")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    image.rename(target / "image")
    modules.rename(target / "modules")
    (target / "image").rename(target / "vmlinuz")


def find_busybox(cache: Path, say: Say) -> Path:
    """Find a statically linked busybox: in the cache, else from Debian's busybox-static. Raises OracleError."""
    kept = cache / "busybox"
    if not kept.exists():
        downloads = Downloads(cache / "apt", say)
        downloads.update()
        with downloads.unpacked(["busybox-static"], cache / ".busybox") as unpacked:
            found = next((path for path in unpacked.rglob("busybox") if path.parent.name == "bin"), None)
            if found is None:
                raise OracleError("busybox-static: there is no busybox in the package")
            found.rename(kept)
    return kept
