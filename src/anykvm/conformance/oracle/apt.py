"""Debian packages for the oracle: QEMU is installed, kernels are only downloaded; from the mirror apt is set up with.

Downloads use lists of packages of their own, in the cache directory, so they need no root and change nothing of the
machine's configuration.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from anykvm.conformance.oracle.errors import OracleError

Say = Callable[[str], None]

KERNEL_SUITES: Final = ("bookworm-backports", "trixie-backports")
"""Where Debian has kernels newer than a release's own."""
QEMU_PACKAGE: Final = "qemu-system-x86"
BACKPORTS_FILE: Final = Path("/etc/apt/sources.list.d/anykvm-backports.sources")
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_FORMAT: Final = "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(CODENAME)"


class Mirror(NamedTuple):
    """Where apt gets Debian from, and which suites it knows."""

    uri: str
    codename: str
    """The release's own suite, such as bookworm."""
    suites: tuple[str, ...]


def parse_targets(text: str) -> Mirror:
    """Find Debian's mirror in the output of ``apt-get indextargets`` (in this module's format).

    Raises OracleError if there is none: apt's sources are another distribution's.

    >>> parse_targets("Debian|Debian|http://deb.example/debian/|trixie")
    Mirror(uri='http://deb.example/debian/', codename='trixie', suites=('trixie',))
    """
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    releases = [row for row in rows if row[:2] == ["Debian", "Debian"] and "-" not in row[3]]
    if not releases:
        raise OracleError("apt knows no Debian mirror; give a kernel with --kernel PATH")
    _, _, uri, codename = releases[0]
    return Mirror(uri, codename, tuple(dict.fromkeys(row[3] for row in rows if row[2] == uri)))


def sources(uri: str, suites: Iterable[str]) -> str:
    """Write a deb822 source of apt for suites of a Debian mirror.

    >>> print(sources("http://deb.example/debian/", ["trixie-backports"]).splitlines()[2])
    Suites: trixie-backports
    """
    signed = f"Signed-By: {_KEYRING}\n" if _KEYRING.exists() else ""
    return f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: main\n{signed}"


def mirror(say: Say) -> Mirror:
    """Ask apt for its Debian mirror; where apt has no lists of packages yet, root gets them first.

    Raises OracleError if there is no apt, or no mirror.
    """
    targets = _targets()
    if not targets.strip():
        if os.geteuid() != 0:
            raise OracleError("apt has no lists of packages: run apt-get update as root, or give --kernel PATH")
        say("apt has no lists of packages; apt-get update")
        failed = _update([])
        targets = _targets()
        if failed and not targets.strip():
            raise OracleError(f"apt-get update: {failed[0]}")
    return parse_targets(targets)


def _targets() -> str:
    return _run(["apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages"])


def failed_fetches(said: str) -> list[str]:
    """Find in what apt-get said which files it could not get, and why: it warns of them, and goes on with what it has.

    >>> failed_fetches("W: Failed to fetch http://deb.example/InRelease  Could not connect\\nW: Some index files")
    ['Failed to fetch http://deb.example/InRelease Could not connect']
    """
    lines = [" ".join(line.split()) for line in said.splitlines() if re.match(r"[WE]: Failed to fetch ", line)]
    return [line[len("W: ") :] for line in lines]


def _update(options: list[str]) -> list[str]:
    """Get lists of packages; returns what could not be downloaded, as ``failed_fetches``."""
    return failed_fetches(_ran(["apt-get", *options, "-q", "update"]).stderr)


class Downloads:
    """apt with lists of packages of its own below a directory."""

    def __init__(self, folder: Path, say: Say) -> None:
        """Keep lists below ``folder``, made if missing; ``say`` is told of each download."""
        self._say = say
        self._folder = folder
        self.failed: list[str] = []
        """What the last ``update`` could not download; see ``failed_fetches``."""
        for part in ("lists/partial", "cache/archives/partial", "packages"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._options = [
            f"-oDir::Etc::sourcelist={folder / 'debian.sources'}",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={folder / 'lists'}",
            f"-oDir::Cache={folder / 'cache'}",
            f"-oAPT::Sandbox::User={_user()}",
        ]

    def update(self) -> None:
        """Get the lists of packages. Raises OracleError as the methods below, and if not one suite's could be had."""
        found = mirror(self._say)
        suites = dict.fromkeys((found.codename, *KERNEL_SUITES))
        (self._folder / "debian.sources").write_text(sources(found.uri, suites))
        self._say(f"reading Debian's lists of packages from {found.uri}")
        self.failed = _update(self._options)
        if all(any(f"/dists/{suite}/" in line for line in self.failed) for suite in suites):
            raise OracleError(f"the download of Debian's lists of packages failed: {self.failed[0]}")

    def names(self, pattern: str) -> list[str]:
        """Find packages whose name matches a regular expression."""
        lines = _run(["apt-cache", *self._options, "search", "--names-only", pattern]).splitlines()
        return [line.partition(" ")[0] for line in lines]

    def depends(self, package: str) -> list[str]:
        """Name what a package depends on."""
        lines = _run(["apt-cache", *self._options, "depends", "--important", package]).splitlines()
        return [line.partition("Depends: ")[2] for line in lines if "Depends: " in line]

    @contextlib.contextmanager
    def unpacked(self, packages: list[str], target: Path) -> Iterator[Path]:
        """Download packages and unpack them into ``target`` beside each other, without installing them."""
        folder = self._folder / "packages"
        self._say(f"downloading {', '.join(packages)}; unpacked to {target.parent}, not installed")
        _run(["apt-get", *self._options, "-q", "download", *packages], cwd=folder)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in packages:
            for archive in folder.glob(f"{name}_*.deb"):
                _run(["dpkg-deb", "-x", str(archive), str(target)])
                archive.unlink()
        try:
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)


def install_qemu(say: Say) -> None:
    """Install QEMU: as root through apt, with a backports source if the release's own is too old; else say how.

    Raises OracleError where that cannot be done.
    """
    if shutil.which("apt-get") is None:
        raise OracleError("qemu-system-x86_64 8 or newer is missing; install it (there is no apt here)")
    found = mirror(say)
    suite = f"{found.codename}-backports"
    command = ["apt-get", "install", "-y", "--no-install-recommends", "-t", suite, QEMU_PACKAGE]
    source = "" if suite in found.suites else f" (with a source for {suite} of {found.uri})"
    if os.geteuid() != 0:
        raise OracleError(f"qemu-system-x86_64 8 or newer is missing; as root{source}: {' '.join(command)}")
    if source:
        say(f"adding {BACKPORTS_FILE}: {suite} from {found.uri}")
        BACKPORTS_FILE.write_text(sources(found.uri, [suite]))
        if failed := [line for line in _update([]) if f"/dists/{suite}/" in line]:
            raise OracleError(f"the download of {suite}'s list of packages failed: {failed[0]}")
    say(f"installing with apt: {QEMU_PACKAGE} from {suite}")
    _run(["env", "DEBIAN_FRONTEND=noninteractive", *command])


def _user() -> str:
    # apt as root would download as a user who cannot write to the cache directory.
    return "root" if os.geteuid() == 0 else ""


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Run a program of Debian's and give its output, failing in one line."""
    return _ran(command, cwd).stdout


def _ran(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # In English, to be read here.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL, env=environment
        )
    except FileNotFoundError:
        raise OracleError(f"{command[0]} is missing: this is not a Debian; give a kernel with --kernel PATH") from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
        raise OracleError(f"{command[0]} failed: {told[0] if told else done.stderr.strip() or done.returncode}")
    return done
