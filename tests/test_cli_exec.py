"""``anykvm exec``: what is listed, where the guest's output goes, and the exit code of each end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vmm_helpers import (
    FOREVER,
    HELLO,
    anykvm,
    assert_one_line,
    command,
    elf32,
    elf64,
    environment,
    require_soft,
    without_backend,
)

BACKEND = "backend soft, profile documented: asked for\n"


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require_soft()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def soft(*arguments: object) -> subprocess.CompletedProcess[str]:
    return anykvm("exec", *arguments, "--backend", "soft")


def image(code: bytes | str, name: str = "image") -> str:
    Path(name).write_bytes(bytes.fromhex(code) if isinstance(code, str) else code)
    return name


def test_output_to_stdout_and_exits_to_stderr() -> None:
    done = soft(image(HELLO))
    assert done.returncode == 0
    assert done.stdout == "Hi"
    assert done.stderr.splitlines() == [
        "backend soft, profile documented: asked for",
        "io out port=0x80 size=1 data=69",
        "hlt",
    ]


def test_quiet() -> None:
    done = soft(image(HELLO), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hi", BACKEND)


def test_bytes_that_are_not_text_come_out_as_they_are() -> None:
    argv = command("exec", image("b0ff e6e9 b00a e6e9 f4"), "-q", "--backend", "soft")
    assert subprocess.check_output(argv, env=environment()) == b"\xff\n"


def test_input_from_nothing_is_all_ones() -> None:
    # in al,0x60; out 0x80,al; in ax,0x60; out 0x80,ax; hlt
    done = soft(image("e460 e680 e560 e780 f4"))
    assert "io in port=0x60 size=1 data=ff" in done.stderr
    assert "io out port=0x80 size=1 data=ff" in done.stderr
    assert "io out port=0x80 size=2 data=ffff" in done.stderr


def test_mmio_is_listed_and_reads_all_ones() -> None:
    # mov eax,[0x20000000]; out 0x80,eax; mov byte [0x20000000],7; hlt   (32-bit)
    done = soft(image("a100000020 e780 c6050000002007 f4"), "--mode", "protected")
    assert done.stderr.splitlines()[1:] == [
        "mmio read gpa=0x20000000 size=4 data=ffffffff",
        "io out port=0x80 size=4 data=ffffffff",
        "mmio write gpa=0x20000000 size=1 data=07",
        "hlt",
    ]


def test_elf64_in_long_mode() -> None:
    # mov rax,0x1122334455667788; shr rax,32; out 0x80,eax; hlt
    done = soft(image(elf64(bytes.fromhex("48b88877665544332211 48c1e820 e780 f4"))))
    assert done.returncode == 0 and "io out port=0x80 size=4 data=44332211" in done.stderr


def test_elf32_in_protected_mode() -> None:
    # dec eax (a REX prefix in 64-bit code); mov eax,0x11223344; out 0x80,eax; hlt
    done = soft(image(elf32(bytes.fromhex("48 b844332211 e780 f4"))))
    assert done.returncode == 0 and "io out port=0x80 size=4 data=44332211" in done.stderr


def test_load_and_entry() -> None:
    # nothing before the entry may run: ud2; then mov al,cs:[0x1003] (moffs), out 0x80,al; hlt
    done = soft(image("0f0b 90 5a 2ea00310 e680 f4"), "--load", "4K", "--entry", "0x1004")
    assert done.returncode == 0 and "data=5a" in done.stderr


def test_memory_fault_has_its_code_and_says_where() -> None:
    done = soft(image("a00050 f4"), "--hole", "0x5000:4K")  # mov al,[0x5000]; hlt
    assert_one_line(done, 5, "memory fault gpa=0x5000 size=0x1000 flags=0 errno=EFAULT")
    assert done.stderr.count("memory fault gpa=0x5000 size=0x1000 flags=0 errno=EFAULT") == 2


@pytest.mark.parametrize(
    "accident",
    [("--unmap", "0x5000"), ("--no-access", "0x5000"), ("--read-only", "0x5000"), ("--beyond-file", "0x5000")],
)
def test_host_memory_taken_away(accident: tuple[str, str]) -> None:
    done = soft(image("a20050 f4"), "--load", "0x1000", *accident)  # mov [0x5000],al; hlt
    assert_one_line(done, 5, "memory fault gpa=0x5000 size=0x1000 flags=0 errno=EFAULT")


def test_read_only_host_memory_can_be_read() -> None:
    assert soft(image("a00050 f4"), "--read-only", "0x5000").returncode == 0


def test_a_bare_efault_has_its_code() -> None:
    done = soft(image("a00050 f4"), "--hole", "0x5000:4K", "--profile", "linux-7.3")
    assert_one_line(done, 7, "KVM_RUN", "does not say which")


def test_triple_fault() -> None:
    assert_one_line(soft(image("0f0b"), "--mode", "long"), 4, "shutdown (triple fault)")


def test_max_exits() -> None:
    done = soft(image("e680 ebfc"), "--max-exits", 3)  # out 0x80,al; jmp
    assert_one_line(done, 8, "stopped after 3 exits")
    assert done.stderr.count("io out") == 3


def test_timeout_of_a_guest_that_makes_no_exits() -> None:
    start = time.monotonic()
    done = soft(image(FOREVER), "--timeout", "0.3")
    assert_one_line(done, 124, "stopped after 0.3 seconds, at rip 0x7c00")
    assert time.monotonic() - start < 10


def test_timeout_of_a_guest_that_makes_exits() -> None:
    assert_one_line(soft(image("e680 ebfc"), "-q", "--timeout", "0.2"), 124, "stopped after 0.2 seconds")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "anykvm: interrupted\n"),
        (signal.SIGTERM, 143, "anykvm: terminated\n"),
        (signal.SIGHUP, 129, "anykvm: hung up\n"),
    ],
)
@pytest.mark.parametrize("guest", [FOREVER, bytes.fromhex("e680ebfc")], ids=["no exits", "exits"])
def test_signals(number: signal.Signals, code: int, line: str, guest: bytes) -> None:
    argv = command("exec", image(b"\xb0\x2e\xe6\xe9" + guest), "-q", "--backend", "soft")
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."  # the guest runs
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.decode()) == (code, BACKEND + line)


def test_an_ignored_hangup_does_not_end_the_guest() -> None:
    # mov al,'.'; out 0xe9,al; in al,0x60; jmp: exits for ever
    argv = ["nohup", *command("exec", image("b02e e6e9 e460 ebf8"), "-q", "--backend", "soft", "--max-exits", 100_000)]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."  # the guest runs
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode().splitlines()[-1]) == (8, "anykvm: stopped after 100000 exits")


def test_a_reader_that_goes_away() -> None:
    # mov al,'.'; out 0xe9,al; jmp
    argv = command("exec", image("b02e e6e9 ebfa"), "-q", "--backend", "soft", "--max-exits", 1_000_000)
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read().decode() == BACKEND
        assert process.wait(20) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), ("missing: No such file",)),
        ((".",), ("not a regular file",)),
        (("/dev/zero",), ("not a regular file",)),
        (("fifo",), ("not a regular file",)),
        (("empty",), ("the image is empty",)),
        (("image", "--memory", "28K"), ("memory ends at 0x7000",)),
        (("image", "--load", "0x7fffffff"), ("memory ends at 0x1000000",)),
        (("image", "--load", "0x100000"), ("below 1 MiB",)),
        (("image", "--entry", "0x1000"), ("entry 0x1000 is not in the image",)),
        (("image", "--mode", "long", "--load", "0x2000"), ("tables of long mode",)),
        (("image", "--mode", "compat"), ("compat", "exec --help")),
        (("image", "--memory", "1000"), ("--memory", "whole pages")),
        (("image", "--memory", "much"), ("'much' is not a number",)),
        (("image", "--memory", "64G"), ("--memory",)),
        (("image", "--hole", "0x1000:"), ("'' is not a number",)),
        (("image", "--unmap", "0x1000:0"), ("whole pages",)),
        (("image", "--read-only", "16M"), ("--read-only 0x1000000:0x1000", "not within the memory")),
        (("image", "--beyond-file", "0x1800"), ("--beyond-file 0x1800", "not a page")),
        (("image", "--beyond-file", "16M"), ("--beyond-file 0x1000000", "within the memory")),
        (("image", "--hole", "0x10:4K"), ("whole pages",)),
        (("image", "--hole", "16M:4K"), ("not within the memory",)),
        (("image", "--timeout", "-1"), ("timeout",)),
        (("image", "--backend", "xen"), ("no backend named 'xen'",)),
        (("image", "--profile", "linux-1.0"), ("linux-1.0",)),
        (("pie",), ("position-independent",)),
        (("elf", "--load", "0"), ("--load is for flat binaries",)),
        (("damaged",), ("damaged ELF file",)),
        (("image", "--frobnicate"), ("--frobnicate", "exec --help")),
        ((), ("IMAGE",)),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    image(HELLO)
    image(b"", "empty")
    image(elf64(b"\xf4", type=3), "pie")
    image(elf64(b"\xf4"), "elf")
    image(elf64(b"\xf4")[:70], "damaged")
    os.mkfifo("fifo")
    done = anykvm("exec", "-q", *arguments)
    assert_one_line(done, 2, *words)
    assert done.stdout == "" and len(without_backend(done.stderr)) == 1
