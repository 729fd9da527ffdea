"""``--inject`` of exec and explain."""

from __future__ import annotations

from pathlib import Path

import pytest

from anykvm.cli.app import run
from anykvm.cli.common import ExitCode


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex("b068 e6e9 8a1e 0090 f4"))  # 'h' to port 0xE9; mov bl, [0x9000]; hlt
    return str(path)


def test_exec_injects_says_what_and_how_to_replay_it(image: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = run(["exec", image, "--backend", "soft", "--inject", "KVM_RUN:errno=EIO,nth=2"])
    out, err = capfd.readouterr()
    assert (code, out) == (ExitCode.ERRNO, "h")
    assert "injected KVM_RUN: EIO, late, KVM_EXIT_UNKNOWN (call 2, vCPU 0); replay: KVM_RUN:errno=EIO,nth=2\n" in err
    assert err.splitlines()[-1].startswith("anykvm: KVM_RUN") and "injected EIO" in err.splitlines()[-1]


def test_exec_takes_files_and_several_rules(image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nsite = "hva_to_pfn"\nfault = "no_vma"\ngpa = 0x9000\n')
    options = ["--backend", "soft", "--inject", str(rules), "--inject", "KVM_RUN:race=immediate_exit"]
    assert run(["exec", image, *options]) == ExitCode.MEMORY_FAULT
    err = capfd.readouterr().err
    assert "injected KVM_RUN: immediate_exit is set" in err and "injected hva_to_pfn: no_vma (call 1" in err


def test_nothing_matched_is_said(image: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["exec", image, "--backend", "soft", "--inject", "KVM_RUN:errno=EIO,nth=99"]) == ExitCode.OK
    assert "injected nothing: no call matched" in capfd.readouterr().err


def test_explain_explains_what_was_injected(image: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The look-up fails, and the host has the page: there is a failure and no cause, which is said."""
    code = run(["explain", image, "--inject", "hva_to_pfn:fault=no_vma,gpa=0x9000"])
    assert code == ExitCode.FAILED
    assert "the host now grants every page" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("KVM_RUN:errno=EXDEV", "anykvm: --inject: errno: KVM_RUN"),
        ("none.toml", "anykvm: --inject none.toml: No such file or directory"),
        ("", "anykvm: --inject: site: no site ''"),
    ],
)
@pytest.mark.parametrize("command", ["exec", "explain"])
def test_a_wrong_rule_is_one_line(
    command: str, rule: str, line: str, image: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([command, image, "--backend", "soft", "--inject", rule]) == ExitCode.USAGE
    assert capfd.readouterr().err.splitlines()[-1].startswith(line)
