"""`anykvm explore`, and the page that it wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import anykvm.explorer.replay
from anykvm.cli import app
from anykvm.explorer import ARCHITECTURES, ENTRIES, POLICIES, RULES, Property, trace
from anykvm.explorer.diagram import diagram
from anykvm.explorer.replay import Compared, Replay
from anykvm.explorer.replay.campaign import Campaign
from anykvm.explorer.search import Found
from explorer_games import campaign, found, games
from vmm_helpers import command, environment, require_soft

ROOT = Path(__file__).parent.parent


def explore(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    code = app.run(["explore", *arguments])
    return (code, *capsys.readouterr())


def test_plain_lines_when_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = explore(capsys, "--policy", "P3b")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{arch} P3b {rule}" for arch in ARCHITECTURES for rule in RULES]
    states = found("P3b", "deferring").states
    assert (
        "x86 P3b deferring: misread -; fault lost T7(2), T15(2); access lost T9f(3), T9(4); repeated -"
        f" (all {states} states)" in lines
    )


def test_depth(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = explore(capsys, "--policy", "P3b", "--rule", "deferring", "--depth", "3", "--arch", "x86")
    assert code == 0 and "access lost T9f(3); repeated - (depth 3, " in out


def test_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = explore(capsys, "--policy", "P3b", "--rule", "qemu", "--arch", "loongarch")
    assert code == 0 and "repeated T10(4)" in out


def on_a_terminal(*arguments: str, columns: int = 80) -> str:
    """What the command prints on one; it must end with 0."""
    master, slave = pty.openpty()
    variables = {**environment(), "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(command("explore", *arguments), stdout=slave, env=variables, text=True) as child:
        os.close(slave)
        seen = b""
        while True:
            try:
                block = os.read(master, 4096)
            except OSError:  # its end, on Linux
                break
            if not block:
                break
            seen += block
    os.close(master)
    assert child.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m|\r", "", seen.decode())


def test_a_terminal_gets_tables() -> None:
    text = on_a_terminal("--policy", "P1", "--rule", "qemu")
    for wanted in Property:
        assert re.search(rf"^{wanted.value} +qemu", text, re.MULTILINE)
        assert re.search(rf"^{wanted.value} +x86 +arm64 ", text, re.MULTILINE)
    assert ENTRIES["T6"].title in text and "states: all there are" in text


@pytest.mark.parametrize("columns", [1, 40, 80, 132, 200])
def test_no_name_is_broken_at_any_width(columns: int) -> None:
    """Tables where they fit, lines where they do not."""
    text = on_a_terminal("--depth", "3", "--arch", "x86", columns=columns)
    words = set(text.replace(",", " ").replace(";", " ").replace(":", " ").split())
    assert {*RULES, *POLICIES, "T8n(3)", "T9f(3)"} <= words
    assert ("x86, by VMM" in text) == (columns == 200)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    code, out, _ = explore(capsys, "--policy", "P3a", "--rule", "two-threads", "--arch", "x86", "--json", "--replay")
    assert code == 0
    result = json.loads(out)
    (played,) = result["games"]
    assert played["complete"] and played["states"] == found("P3a", "two-threads").states
    erased = next(one for one in played["traces"] if one["name"] == "T11")
    assert [move["what"] for move in erased["moves"]] == [
        "KVM_RUN",
        "KVM_RUN of another thread, with a wrong argument",
        "the VMM looks and decides",
    ]
    assert erased["moves"][1]["exit_reason"] == "UNKNOWN" and erased["property"] == "access lost"
    (replayed,) = result["replays"]["T11"]
    assert replayed["agrees"] and len(replayed["steps"]) == 3
    assert set(result["not_replayed"]) == {"T6", "T7s"}


def test_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    require_soft()
    code, out, _ = explore(capsys, "--trace", "T15", "--replay")
    assert code == 0
    assert out.startswith("\n".join(diagram(trace("T15"))) + "\n\nreplayed on a guest of profile linux-7.3:\n")
    assert out.endswith("\nas in the model\n")


def test_a_trace_of_another_game(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = explore(capsys, "--trace", "T12", "--rule", "errno-blind", "--policy", "P3a", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["policy"], result["rule"], result["name"], len(result["moves"])) == ("P3a", "errno-blind", "T12", 5)


def test_a_trace_that_cannot_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = explore(capsys, "--trace", "T6", "--replay")
    assert code == 0 and out.endswith("\nnot replayed: soft has no asynchronous page faults\n")
    code, out, _ = explore(capsys, "--trace", "T6", "--replay", "--json")
    assert json.loads(out)["replay"] == {"replayed": False, "why_not": "soft has no asynchronous page faults"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--trace", "T99"), 2, "--trace: no 'T99'; there are T1, T2, "),
        (("--policy", "P9"), 2, "--policy: no 'P9'; there are P0, P1, "),
        (("--rule", "bochs"), 2, "--rule: no 'bochs'; there are documented, "),
        (("--trace", "T1", "--rule", "bochs"), 2, "--rule: no 'bochs'; there are documented, "),
        (("--arch", "vax"), 2, "--arch: no architecture named 'vax'; there are x86, arm64, "),
        (("--depth", "0"), 2, "--depth"),
        (("--trace", "T9", "--policy", "P1"), 11, "T9: none with policy P1, VMM deferring, x86 (all "),
        (("--trace", "T9", "--depth", "3"), 11, "T9: none with policy P3b, VMM deferring, x86 (depth 3, "),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = explore(capsys, *arguments)
    assert (got, out) == (code, "")
    assert message in err and err.startswith("anykvm: ") and err.count("\n") == 1


def test_a_replay_that_differs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and both sides are shown."""
    other = Replay(trace("T7"), "linux-7.3", (Compared("KVM_RUN", "0, HLT", "-EFAULT, UNKNOWN"),))
    monkeypatch.setattr(anykvm.explorer.replay, "replay", lambda _: other)
    code, out, _ = explore(capsys, "--trace", "T7", "--replay")
    assert code == 1 and "KVM_RUN: -EFAULT, UNKNOWN; the model: 0, HLT\nnot as in the model\n" in out
    whole = Campaign(replays={"T7": [(trace("T7"), other)]}, refused={})
    monkeypatch.setattr(anykvm.explorer.replay, "replay_all", lambda _: whole)
    code, out, _ = explore(capsys, "--policy", "P1", "--rule", "qemu", "--replay")
    assert code == 1 and "T7: 0 of 1 replays as in the model" in out and "not as in the model" in out


def test_no_engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Replay:
        raise ImportError("anykvm was installed without its engine")

    monkeypatch.setattr(anykvm.explorer.replay, "replay", broken)
    code, _, err = explore(capsys, "--trace", "T7", "--replay")
    assert code == 3 and err == "anykvm: soft backend: anykvm was installed without its engine; try `anykvm doctor`\n"


@pytest.mark.parametrize("name", ENTRIES)
def test_pictures(name: str) -> None:
    """Life lines stand in their columns, and nothing runs over them."""
    lines = diagram(trace(name))
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("VMM "))
    assert lines[-1] and not lines[-2]
    for line in lines[start + 2 if lines[start].startswith("VMM ") else start + 1 : -2]:
        if line.startswith(("policy", "VMM", "architecture")) or not line or "guest" in line[45:]:
            continue
        for column in (4, 36, 50):
            assert line[column] in "|*<>", line


def thread_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_thread", ROOT / "tools" / "gen_thread.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_searches_say(monkeypatch: pytest.MonkeyPatch) -> None:
    require_soft()
    tool = thread_tool()
    monkeypatch.setattr(tool, "games", games)
    monkeypatch.setattr(tool, "replay_all", lambda _: campaign())
    text = tool.FILE.read_text()
    assert tool.generated(text) == text, "run tools/gen_thread.py"
    shown = set(re.findall(r"<!-- explore: trace (\S+) -->", text))
    assert {f"T{number}" for number in range(1, 16)} <= shown <= set(ENTRIES)


def test_the_page_is_not_what_something_else_says() -> None:
    """The check of the page can fail."""
    tool = thread_tool()
    text = "<!-- explore: trace T7 -->\nstale\n<!-- end -->\n"
    assert tool.generated(text) != text and tool.generated(tool.generated(text)) == tool.generated(text)
    with pytest.raises(KeyError):
        tool.generated("<!-- explore: nothing T7 -->\n<!-- end -->\n")


def test_the_answer_of_the_page_is_the_tables() -> None:
    """What the page's answer claims of the tables, word for word where a table can say it."""

    def named(one: Found, wanted: Property) -> set[str]:
        from anykvm.explorer.catalogue import classify

        return {classify(violation) for violation in one.traces if violation.property is wanted}

    for policy in POLICIES:
        lost = named(found(policy, "documented"), Property.FAULT_LOST)
        assert ({"T7", "T15"} & lost == set()) == (policy == "P1d")
        assert "T13" in named(found(policy, "documented"), Property.ACCESS_LOST) or policy == "P0"
        assert "T14" in named(found(policy, "errno-blind"), Property.MISREAD)
