"""``anykvm explain``: the sentence, what it rests on, the comparison with KVM's own annotation, and the exit codes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from anykvm.abi import constants as c
from anykvm.api import MemoryFault
from anykvm.cli import explain as command_module
from anykvm.cli.common import ExitCode, Fail
from anykvm.cli.explanation import Report, text
from fakes import FakeBackend
from vmm_helpers import HELLO, anykvm, assert_one_line, elf64, require_soft, without_backend

# mov rdi,0x7008; mov [rdi],rax; hlt
STORE = elf64(bytes.fromhex("48c7c708700000 488907 f4"))
# mov rsi,0x7008; mov rdi,0x9010; cmpsq; hlt
COMPARE = elf64(bytes.fromhex("48c7c608700000 48c7c710900000 48a7 f4"))


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require_soft()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def image(code: bytes | str, name: str = "image") -> str:
    Path(name).write_bytes(bytes.fromhex(code) if isinstance(code, str) else code)
    return name


def explain(code: bytes | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return anykvm("explain", image(code), *arguments, "--backend", "soft")


def found(code: bytes | str, *arguments: object) -> dict[str, Any]:
    done = explain(code, *arguments, "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def block(output: str, label: str) -> list[str]:
    """Give the lines of a labelled block."""
    lines = output.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{label} "))
    block = [lines[at][13:]]
    for line in lines[at + 1 :]:
        if not line.startswith(" " * 13):
            break
        block.append(line[13:])
    return block


def test_the_whole_explanation() -> None:
    done = explain(STORE, "--read-only", "0x7000")
    assert done.returncode == 0
    assert done.stderr == "backend soft, profile linux-7.3: asked for\n"
    hva = int(block(done.stdout, "vma")[0].split()[1].rstrip(":"), 16)
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"write to gpa 0x7008: memslot 0 maps it to {hva:#x}, which is mapped read-only (anonymous memory)"
    )
    assert block(done.stdout, "KVM") == [
        "backend soft, profile linux-7.3",
        "KVM_RUN failed with EFAULT, exit_reason KVM_EXIT_UNKNOWN: memory_fault is not valid",
    ]
    assert block(done.stdout, "vCPU") == ["64-bit code in long mode, ring 0, 4 levels of page tables"]
    registers = "\n".join(block(done.stdout, "registers"))
    for word in (
        "rdi=0000000000007008",
        "rip=0000000000200007",
        "cr3=2000",
        "cs 0008 base 0",
        "gdt base 1000 limit 17",
    ):
        assert word in registers
    assert block(done.stdout, "instruction") == ["48 89 07  mov qword ptr [rdi], rax"]
    assert [line.split() for line in block(done.stdout, "accesses")] == [
        ["instruction", "exec", "3", "bytes", "at", "0x200007", "gpa", "0x200007", "granted"],
        ["operand", "write", "8", "bytes", "at", "0x7008", "gpa", "0x7008", "refused"],
    ]
    walk = block(done.stdout, "page walk")
    assert walk[0] == "of linear 0x7008, cr3 0x2000"
    assert [line.split()[:4] for line in walk[1:]] == [
        ["PML4E", "at", "gpa", "0x2000"],
        ["PDPTE", "at", "gpa", "0x3000"],
        ["PDE", "at", "gpa", "0x4000"],
    ]
    assert "present, writable" in walk[1] and "large page" in walk[3]
    base = hva - 0x7008
    assert block(done.stdout, "memslot") == [f"0: gpa 0x0, size 0x1000000, userspace_addr {base:#x}, flags 0"]
    assert f"{hva - 8:x}-{hva - 8 + 0x1000:x} r--p" in block(done.stdout, "vma")[0]
    assert re.fullmatch(r"MADV_POPULATE_WRITE: E[A-Z]+", block(done.stdout, "touch")[0])


@pytest.mark.parametrize(
    ("arguments", "words", "vma"),
    [
        (("--unmap", "0x7000"), "where nothing is mapped", "nothing mapped"),
        (("--no-access", "0x7000"), "PROT_NONE (anonymous memory)", "---p"),
        (("--hole", "0x7000"), "PROT_NONE (anonymous memory)", "---p"),
        (("--no-access", "0x6000:8K"), "PROT_NONE (anonymous memory)", "---p"),
    ],
)
def test_accidents(arguments: tuple[str, ...], words: str, vma: str) -> None:
    done = explain(STORE, *arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("write to gpa 0x7008: memslot 0 maps it to 0x")
    assert words in done.stdout.splitlines()[0] and vma in block(done.stdout, "vma")[0]


def test_memory_beyond_the_end_of_its_file() -> None:
    done = explain("a20050 f4", "--load", "0x1000", "--beyond-file", "0x5000")  # mov [0x5000],al
    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert first.startswith("write to gpa 0x5000") and "beyond the end of the file" in first and "memfd:ram" in first
    assert block(done.stdout, "touch") == ["MADV_POPULATE_WRITE: EFAULT"]
    assert block(done.stdout, "page walk") == ["no paging: linear 0x5000 is gpa 0x5000"]


def test_a_page_table() -> None:
    done = explain(STORE, "--unmap", "0x3000")
    assert done.returncode == 0
    assert done.stdout.startswith("write to gpa 0x3000 (page table of 0x200000): memslot 0 maps it to ")
    assert block(done.stdout, "instruction") == ["cannot be read"]
    assert block(done.stdout, "page walk")[-1] == "PDPTE  at gpa 0x3000  cannot be read  <- the access that was refused"


def test_delivery_of_an_exception() -> None:
    answer = found("0f0b", "--load", "0x1000", "--no-access", "0")  # ud2 in real mode: the IDT is at 0
    assert answer["cause"]["instruction"] == "delivery of exception 6"
    assert answer["cause"]["candidates"][0]["role"] == "idt" and answer["cause"]["candidates"][0]["gpa"] == 4 * 6


def test_several_causes() -> None:
    done = explain(COMPARE, "--no-access", "0x7000", "--unmap", "0x9000")
    assert done.returncode == 10 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ambiguous: one of 2")
    assert "1. read from gpa 0x7008" in lines[1] and "2. read from gpa 0x9010" in lines[2]
    assert lines.count("candidate 1") == lines.count("candidate 2") == 1


def test_json_has_all_of_it() -> None:
    answer = found(STORE, "--read-only", "0x7000")
    assert (answer["backend"], answer["profile"], answer["errno"]) == ("soft", "linux-7.3", "EFAULT")
    assert (answer["exit_reason"], answer["memory_fault"], answer["agrees"]) == ("KVM_EXIT_UNKNOWN", None, None)
    cause = answer["cause"]
    assert (cause["rip"], cause["code"], cause["ambiguous"]) == (0x200007, "488907", False)
    (suspect,) = cause["candidates"]
    assert (suspect["gpa"], suspect["size"], suspect["access"], suspect["role"]) == (0x7008, 8, "write", "operand")
    assert [entry["level"] for entry in suspect["walk"]] == ["PML4E", "PDPTE", "PDE"]
    assert suspect["memslot"]["hva"] + 0x7008 == suspect["hva"]
    assert suspect["vma"]["perms"] == "r--p"
    assert [(access["role"], access["outcome"]) for access in cause["accesses"]] == [
        ("instruction", "granted"),
        ("operand", "refused"),
    ]
    assert cause["vcpu"]["rdi"] == 0x7008 and cause["vcpu"]["cs"]["selector"] == 8


def test_kvm_annotated_it_and_the_explanation_agrees() -> None:
    done = explain(STORE, "--read-only", "0x7000", "--profile", "documented")
    assert done.returncode == 0
    assert block(done.stdout, "KVM") == [
        "backend soft, profile documented",
        "KVM_RUN failed with EFAULT, exit_reason KVM_EXIT_MEMORY_FAULT",
        "KVM annotated it: memory fault gpa=0x7000 size=0x1000 flags=0 errno=EFAULT: the same page",
    ]
    answer = found(STORE, "--read-only", "0x7000", "--profile", "documented")
    assert answer["agrees"] is True and answer["memory_fault"] == {"gpa": 0x7000, "size": 0x1000, "flags": 0}


def test_an_explanation_that_kvm_contradicts_fails() -> None:
    fault = MemoryFault(0x8000, 0x1000, 0, 14)
    answer = found(STORE, "--read-only", "0x7000")
    cause: Any = type("Cause", (), {"candidates": [type("Suspect", (), {"page": 0x7000})], "ambiguous": False})()
    report = Report(FakeBackend(), 14, c.KVM_EXIT_MEMORY_FAULT, fault, cause, "")
    assert answer["cause"]["candidates"][0]["gpa"] & -0x1000 == 0x7000 and report.agrees is False
    with pytest.raises(Fail) as failed:
        command_module._finish(report)
    assert failed.value.code == ExitCode.FAILED


def test_no_cause_found_is_said_and_fails() -> None:
    report = Report(FakeBackend(), 14, c.KVM_EXIT_UNKNOWN, None, None, "it could not be decoded")
    assert "memory_fault is not valid" in text(report) and report.plain()["cause"] is None
    assert text(report).endswith("no cause     it could not be decoded")
    with pytest.raises(Fail, match="no cause was found: it could not be decoded") as failed:
        command_module._finish(report)
    assert failed.value.code == ExitCode.FAILED


def test_nothing_to_explain() -> None:
    done = explain(HELLO, "-q")
    assert_one_line(done, 11, "nothing to explain")
    assert done.stdout == "" and len(without_backend(done.stderr)) == 1


def test_exits_and_output_before_the_failure_are_listed() -> None:
    # out 0xe9 'H'; out 0x80; out 0xe9 newline; out 0xe9 'i'; mov al,[0x5000]
    done = explain("b048 e6e9 e680 b00a e6e9 b069 e6e9 a00050", "--unmap", "0x5000")
    assert done.returncode == 0 and done.stdout.startswith("read from gpa 0x5000")
    assert done.stderr.splitlines()[1:] == ["io out port=0x80 size=1 data=48", r"output 'H\n'", "output 'i'"]


def test_other_ends_have_the_codes_of_exec() -> None:
    assert_one_line(explain("0f0b", "--mode", "long"), 4, "shutdown (triple fault)", "nothing to explain")
    assert_one_line(explain("ebfe", "--timeout", "0.2"), 124, "stopped after 0.2 seconds")
    assert_one_line(explain("e680 ebfc", "--max-exits", 3), 8, "stopped after 3 exits")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), ("missing: No such file",)),
        (("image", "--unmap", "0x10"), ("whole pages",)),
        (("image", "--unmap", "16M"), ("--unmap", "not within the memory")),
        (("image", "--no-access", "0x1000:x"), ("'x' is not a number",)),
        (("image", "--beyond-file", "0x1000001"), ("--beyond-file",)),
        (("image", "--profile", "linux-1.0"), ("linux-1.0",)),
        (("image", "--backend", "device", "--profile", "linux-7.3"), ("needs the soft backend",)),
        ((), ("IMAGE", "explain --help")),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    image(HELLO)
    done = anykvm("explain", "-q", *arguments)
    assert_one_line(done, 2, *words)
    assert done.stdout == "" and len(without_backend(done.stderr)) == 1


def test_the_page_in_docs_shows_what_is_printed() -> None:
    page = (Path(__file__).parent.parent / "docs/explain.md").read_text()
    printf, arguments = re.findall(r"^    printf '(.*)' >guest\n    anykvm (.*)$", page, re.MULTILINE)[0]
    image(bytes.fromhex(printf.replace("\\x", "")), "guest")
    done = anykvm(*arguments.split())
    assert done.returncode == 0

    def plain(text: str) -> str:
        return re.sub(r"(touch +MADV_POPULATE_WRITE: )E[A-Z]+", r"\1", text)  # which errno is the host kernel's matter

    shown = "".join(f"    {line}" if line.strip() else line for line in done.stdout.splitlines(True))
    assert plain(shown) in plain(page)
