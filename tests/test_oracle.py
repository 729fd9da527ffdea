"""The oracle: its first file system, command line, kernels and errors without QEMU; one run with it on request."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import vmm_helpers
from anykvm.conformance import bound
from anykvm.conformance.oracle import OracleError, Settings, apt, initramfs, kernels, machine, qemu
from vmm_helpers import anykvm, assert_one_line, command, environment

ENABLED = os.environ.get("ANYKVM_ORACLE") == "1"


def silent(text: str) -> None:
    pass


def module(depends: str) -> bytes:
    """Make an ELF file with nothing but a .modinfo."""
    names = b"\0.shstrtab\0.modinfo\0"
    info = b"license=GPL\0depends=" + depends.encode() + b"\0"
    head = 64 + len(names) + len(info)

    def section(name: int, type: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, type, 0, 0, offset, size, 0, 0, 1, 0)

    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, head, 0, 64, 0, 0, 64, 3, 1)
    sections = section(0, 0, 0, 0) + section(1, 3, 64, len(names)) + section(11, 1, 64 + len(names), len(info))
    return header + names + info + sections


def read(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Read an archive as the kernel's init/initramfs.c does."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        data_at = -(-(at + 110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[data_at : data_at + size])
        at = -(-(data_at + size) // 4) * 4


def test_an_archive_reads_back() -> None:
    entries = [
        initramfs.Entry("d", 0o040755),
        initramfs.Entry("d/odd", 0o100644, b"abc"),
        initramfs.Entry("longer.name", 0o100755, b"12345678"),
    ]
    assert read(initramfs.cpio(entries)) == {e.name: (e.mode, e.data) for e in entries}


def test_the_first_file_system_has_what_init_needs(tmp_path: Path) -> None:
    busybox, modules = tmp_path / "busybox", tmp_path / "modules"
    busybox.write_bytes(b"BUSYBOX")
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/kvm-amd.ko.xz").write_bytes(lzma.compress(module("kvm,ccp")))
    (modules / "kernel/kvm.ko").write_bytes(module("irqbypass"))
    (modules / "kernel/irqbypass.ko").write_bytes(module(""))
    (modules / "kernel/unrelated.ko").write_bytes(module(""))
    found = read(initramfs.build(busybox, modules))
    assert found["bin/busybox"] == (0o100755, b"BUSYBOX")
    assert found["init"][1].startswith(b"#!/bin/busybox sh\n")
    # ccp is built into this kernel; each module comes behind those it depends on
    assert found["modules/order"][1] == b"irqbypass\nkvm\nkvm_amd\n"
    assert found["modules/kvm_amd.ko"][1] == module("kvm,ccp")
    assert "modules/unrelated.ko" not in found
    for folder in ("proc", "sys", "dev", "control", "lower", "newroot", "over"):
        assert found[folder][0] == 0o040755


def test_init_is_a_shell_script() -> None:
    text = Path(initramfs.__file__).with_name("init.sh")
    subprocess.run(["sh", "-n", str(text)], check=True)


def test_a_module_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OracleError, match="cannot be read"):
        initramfs.depends(b"not an ELF file")
    (tmp_path / "9p.ko.zst").write_bytes(b"")
    with pytest.raises(OracleError, match=r"9p\.ko\.zst: modules compressed"):
        initramfs.load_order(tmp_path)


def test_the_command_line() -> None:
    shares = [qemu.Share("host", Path("/"), False), qemu.Share("output", Path("/a,b"), True)]
    line = qemu.command_line(Path("/k"), Path("/i"), shares, 2, 1024)
    text = " ".join(line)
    assert line[0] == "qemu-system-x86_64" and "-accel tcg,thread=multi -machine q35 -cpu max" in text
    assert "-smp 2 -m 1024" in text and "-kernel /k -initrd /i -append console=ttyS0 " in text
    assert "id=host,path=/,security_model=none,readonly=on," in text
    assert "id=output,path=/a,,b,security_model=none,readonly=off," in text
    with pytest.raises(OracleError, match="line break"):
        qemu.command_line(Path("/k"), Path("/i"), [qemu.Share("x", Path("/a\nb"), True)], 1, 1024)


@pytest.mark.parametrize(("text", "version"), [("QEMU emulator version 7.2.1 (x)", (7, 2)), ("nonsense", None)])
def test_the_version_of_qemu(text: str, version: tuple[int, int] | None) -> None:
    assert qemu.parse_version(text) == version


def test_an_old_qemu_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-system-x86_64"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for version, usable in (("7.2.22", False), ("10.0.2", True)):
        program.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\n")
        program.chmod(0o755)
        assert qemu.usable() is usable


def test_the_script_passes_on_little_of_the_environment() -> None:
    environment = {"PATH": "/bin", "ANYKVM_X": "it's", "TOKEN": "secret"}
    text = machine.script(["echo", "$HOME; false"], environment, "/a b")
    assert "secret" not in text and "TOKEN" not in text
    done = subprocess.run(["sh", "-c", text.replace("'/a b'", "/")], capture_output=True, text=True, check=True)
    assert done.stdout == "$HOME; false\n"
    assert "export ANYKVM_X='it'\"'\"'s'" in text


def test_output_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    path, sink = tmp_path / "stdout", io.BytesIO()
    tail = machine._Tail(path, sink)
    tail.pass_on()
    path.write_bytes(b"one")
    tail.pass_on()
    with path.open("ab") as file:
        file.write(b"\xff two")
    tail.pass_on()
    assert sink.getvalue() == b"one\xff two"


def test_why_a_machine_ended() -> None:
    assert machine.reason(b"x\r\noracle: no 9p: cannot mount host\r\n[ 1.0] reboot: Power down\r\n").endswith(
        "mount host"
    )
    assert machine.reason(b"only this\r\n\r\n") == "only this"
    assert machine.reason(b"") == ""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program in QEMU's place, and a kernel and busybox in the cache."""
    cache = tmp_path / "cache/anykvm/oracle"
    (cache / "kernels/7.3.4-test/modules").mkdir(parents=True)
    (cache / "kernels/7.3.4-test/vmlinuz").write_bytes(b"")
    (cache / "busybox").write_bytes(b"")
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(
        f'#!{sys.executable}\nimport sys\nif "--version" in sys.argv:\n    sys.exit(print("version 10.0"))\n'
    )
    with program.open("a") as file:
        file.write(
            "control = next(a for a in sys.argv if 'id=control' in a).split('path=')[1].split(',')[0]\n" + script
        )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(**files: str) -> str:
    return "".join(f"open(control + '/{name}', 'w').write({text!r})\n" for name, text in files.items())


def test_a_run_brings_back_output_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, put(kernel="7.3.4", stdout="out", stderr="err", status="7\n"))
    out, err = io.BytesIO(), io.BytesIO()
    said: list[str] = []
    settings = Settings(output=tmp_path / "results")
    assert machine.run(["true"], settings, said.append, out, err) == 7
    assert (out.getvalue(), err.getvalue()) == (b"out", b"err")
    assert (tmp_path / "results").is_dir()
    assert said[0].startswith("booting Linux 7.3.4-test") and "code 7" in said[-1]


def test_a_machine_that_ends_without_a_result_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "print('[ 1.0] Kernel panic - not syncing: no init')\n")
    assert_one_line(anykvm("oracle", "--", "true"), 3, "before the command did", "Kernel panic")


def test_a_machine_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "import time\ntime.sleep(100)\n")
    assert_one_line(anykvm("oracle", "--timeout", "0.5", "--", "true"), 124, "longer than 0.5 s")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_a_signal_ends_the_machine_and_leaves_nothing(
    number: signal.Signals, code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    text = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n{put(kernel='7.3.4')}time.sleep(1000)\n"
    fake(tmp_path, monkeypatch, text)
    (tmp_path / "tmp").mkdir()
    env = {**environment(), "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command("oracle", "--", "true"), env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "booted" not in process.stderr.readline():
            assert process.poll() is None
        assert os.listdir(tmp_path / "tmp")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, f"anykvm: {line}\n")
    assert not os.listdir(tmp_path / "tmp")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def on_a_terminal(go: Path, text: bytes, *arguments: str) -> str:
    """Run an anykvm command with a terminal as its stderr; returns what it wrote there. ``text`` makes the file go."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
        while data := os.read(ours, 4096):
            said += data
            if text in said:
                go.touch()
    os.close(ours)
    assert process.wait(20) == 0
    return said.decode()


def test_booting_shows_on_a_terminal_that_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds of the machine's boot, without waiting for them.
    clock = tmp_path / "sitecustomize.py"
    clock.write_text("import itertools, time\nticks = itertools.count()\ntime.monotonic = lambda: next(ticks) * 0.5\n")
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    fake(tmp_path, monkeypatch, wait + put(kernel="7.3.4", status="0"))
    monkeypatch.setattr(vmm_helpers, "SRC", f"{vmm_helpers.SRC}:{tmp_path}")
    said = on_a_terminal(go, b"booting, 2 s", "oracle", "--", "true")
    assert "\r\x1b[Koracle: booting, 1 s\r\x1b[Koracle: booting, 2 s" in said
    assert re.search(r"s\r\x1b\[Koracle: (booted in|the command ended)", said)
    assert "booting, " not in on_a_terminal(go, b"", "oracle", "-q", "--", "true")
    assert "booting, " not in anykvm("oracle", "--", "true").stderr  # not a terminal


@pytest.mark.parametrize(
    ("kernel", "words"),
    [("seven", "neither a version"), ("/nonexistent/vmlinuz", "No such file"), ("/dev/null", "no x86 Linux kernel")],
)
def test_a_wrong_kernel_is_one_line(kernel: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "")
    assert_one_line(anykvm("oracle", "--kernel", kernel, "--", "true"), 3, words)


def test_without_a_command_it_says_so() -> None:
    assert_one_line(anykvm("oracle"), 2, "COMMAND")


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_one_line(anykvm("oracle", "--", "true"), 3, "Not a directory")


def test_the_version_in_a_kernel_image() -> None:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    image[0x600:0x60F] = b"7.3.4 (builder)"
    assert kernels.image_version(bytes(image)) == "7.3.4"
    with pytest.raises(ValueError, match="no x86"):
        kernels.image_version(b"MZ")


def test_a_version_means_the_newest_that_begins_so() -> None:
    versions = ["7.3.4+deb13-amd64", "7.3.10+deb13-amd64", "7.30.1+deb13-amd64"]
    assert kernels._matching("7.3", versions) == "7.3.10+deb13-amd64"
    assert kernels._matching("7.3.4+deb13-amd64", versions) == "7.3.4+deb13-amd64"
    assert kernels._matching("7.4", versions) is None


TARGETS = """\
Debian|Debian|http://mirror.example/debian/|bookworm
Debian|Debian|http://mirror.example/debian/|bookworm-updates
Debian|Debian-Security|http://mirror.example/debian-security/|bookworm-security
Other|Other|http://other.example/apt/|stable
"""


def test_the_mirror_is_apt_s_own() -> None:
    found = apt.parse_targets(TARGETS)
    assert found == apt.Mirror("http://mirror.example/debian/", "bookworm", ("bookworm", "bookworm-updates"))
    assert "URIs: http://mirror.example/debian/\n" in apt.sources(found.uri, ["x"])
    with pytest.raises(OracleError, match="no Debian mirror"):
        apt.parse_targets("Ubuntu|Ubuntu|http://mirror.example/ubuntu/|noble\n")


def test_qemu_is_installed_by_root_only_and_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    said: list[str] = []

    def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, TARGETS, "")

    monkeypatch.setattr(apt, "_ran", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(apt, "BACKPORTS_FILE", tmp_path / "backports.sources")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OracleError, match="as root .*apt-get install .*-t bookworm-backports qemu-system-x86"):
        apt.install_qemu(said.append)
    assert not said and not (tmp_path / "backports.sources").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    apt.install_qemu(said.append)
    assert "Suites: bookworm-backports\n" in (tmp_path / "backports.sources").read_text()
    assert len(said) == 2 and "adding" in said[0] and "installing" in said[1]
    assert ran[-1][-2:] == ["bookworm-backports", "qemu-system-x86"]


def test_apt_s_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho 'W: a warning' >&2\necho 'E: no such package' >&2\nexit 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(OracleError, match=r"^apt-get failed: E: no such package$"):
        apt.mirror(silent)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(OracleError, match="apt-get is missing"):
        apt.mirror(silent)


STARTER = """
import sys
from anykvm.conformance.oracle import machine

with machine._started(["sh", "-c", "echo $$; exec sleep 1000"], sys.stdout.buffer) as process:
    process.wait()
"""


def test_the_machine_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        machine_fd = os.pidfd_open(int(starter.stdout.readline()))
        try:
            assert not select.select([machine_fd], [], [], 0)[0]
            starter.kill()
            assert select.select([machine_fd], [], [], 20)[0], "it is still there"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(machine_fd, signal.SIGKILL)
            os.close(machine_fd)


@pytest.mark.parametrize(
    ("parent", "line", "said"),
    [
        (os.getpid(), ["echo", "ran"], "ran\n"),
        (-1, ["echo", "ran"], ""),  # who started it had ended before it was bound
        (os.getpid(), ["/nonexistent/qemu"], "/nonexistent/qemu: No such file or directory\n"),
    ],
    ids=["there", "gone", "no such program"],
)
def test_a_program_is_run_if_its_starter_is_there(parent: int, line: list[str], said: str) -> None:
    whole = bound.command(line)
    whole[-len(line) - 1] = str(parent)
    done = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert (done.stdout, done.returncode) == (said, 0 if said == "ran\n" else 127)


def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str) -> None:
    """Put a program in apt-get's place: what its update does; it knows targets once there is a file ``lists``."""
    (tmp_path / "targets").write_text(TARGETS)
    program = tmp_path / "apt-get"
    program.write_text(
        f"""#!/bin/sh
cd {tmp_path}
case "$*" in
    *indextargets*) [ ! -e lists ] || cat targets ;;
    *update) {update} ;;
    *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
    )
    program.chmod(0o755)
    (tmp_path / "apt-cache").write_text("#!/bin/sh\n")
    (tmp_path / "apt-cache").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")


def refused(*suites: str) -> str:
    lines = "".join(f"W: Failed to fetch http://x/dists/{suite}/InRelease  refused {suite}\n" for suite in suites)
    return f"printf '{lines}' >&2".replace("\n", "\\n")


def test_root_gets_the_lists_that_apt_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    fake_apt(tmp_path, monkeypatch, "touch lists")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OracleError, match="no lists of packages: run apt-get update as root"):
        apt.mirror(said.append)
    assert said == [] and not (tmp_path / "lists").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert apt.mirror(said.append).codename == "bookworm"
    assert said == ["apt has no lists of packages; apt-get update"]


def test_lists_that_cannot_be_had_are_not_a_debian_without_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt(tmp_path, monkeypatch, refused("bookworm"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(OracleError, match=r"^apt-get update: Failed to fetch http://x/dists/bookworm/InRel.* refused"):
        apt.mirror(silent)


def test_a_download_that_fails_is_not_a_missing_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get update ends with code 0, and warnings, when nothing could be downloaded."""
    (tmp_path / "lists").touch()
    fake_apt(tmp_path, monkeypatch, refused("bookworm", *apt.KERNEL_SUITES))
    with pytest.raises(OracleError, match=r"the download of Debian's lists .* failed: Failed to fetch .* refused book"):
        kernels.find("7.3", tmp_path / "cache", silent)
    with pytest.raises(OracleError, match=r"the download of Debian's lists"):
        kernels.find_busybox(tmp_path / "cache", silent)
    # One suite that is no more does not keep the others' kernels away; but what is not found may have been there.
    fake_apt(tmp_path, monkeypatch, refused(apt.KERNEL_SUITES[-1]))
    with pytest.raises(OracleError, match=r"--kernel 7.3: not in the lists .* refused trixie-backports"):
        kernels.find("7.3", tmp_path / "cache", silent)
    fake_apt(tmp_path, monkeypatch, "true")
    with pytest.raises(OracleError, match=r"--kernel 7.3: Debian has no such kernel; it has none"):
        kernels.find("7.3", tmp_path / "cache", silent)


def test_qemu_s_download_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").touch()
    fake_apt(tmp_path, monkeypatch, refused("bookworm-backports"))
    monkeypatch.setattr(apt, "BACKPORTS_FILE", tmp_path / "backports.sources")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(OracleError, match="the download of bookworm-backports's list .* refused bookworm-backports"):
        apt.install_qemu(silent)


def oracle(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = command("oracle", "--timeout", "500", *arguments)
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment())


IN_QEMU = pytest.mark.skipif(not ENABLED, reason="NOT TESTED: the oracle in QEMU (takes a minute; set ANYKVM_ORACLE=1)")


@IN_QEMU
@pytest.mark.timeout(600)
def test_standard_files_by_name_and_what_is_left_running() -> None:
    shell = "sleep 1000 & echo 1; echo 2 >/dev/stdout; echo a >&2; echo b >/dev/stderr; cat /dev/stdin\n"
    shell += "cat /dev/fd/3 3<<E\n3\nE\n"
    done = oracle("-q", "--", "sh", "-c", shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n2\n3\n", "a\nb\n")


@IN_QEMU
@pytest.mark.timeout(600)
def test_postcopy_on_a_real_kvm_and_doctor_without_its_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 200)
    run = f"{sys.executable} -m anykvm"
    shell = f"{run} postcopy {file} --backend device --no-html; echo $?; rm /dev/kvm; {run} doctor"
    done = oracle("-q", "--", "sh", "-c", shell)
    crc = f"{zlib.crc32(file.read_bytes()):08x}"
    assert f"guest {crc}, zlib {crc}: equal\n0\n" in done.stdout, done.stdout + done.stderr
    assert "device, profile kernel, the Annotate layer finds the pages" in done.stdout
    assert "the kernel has kvm_amd, only the file is missing" in done.stdout and "mknod /dev/kvm c 10 " in done.stdout


@IN_QEMU
@pytest.mark.timeout(600)
def test_a_command_on_a_real_kvm(tmp_path: Path) -> None:
    output = tmp_path / "output"
    shell = (
        'test -c /dev/kvm && echo "kernel $(uname -r)" && echo err >&2 && "$0" -m anykvm doctor >"$1/doctor"; exit 9'
    )
    done = oracle("--output", str(output), "--", "sh", "-c", shell, sys.executable, str(output))
    assert done.returncode == 9, done.stderr
    assert done.stdout.startswith("kernel 7.3.") and "\nerr\n" in done.stderr
    assert "/dev/kvm runs guests" in (output / "doctor").read_text()
