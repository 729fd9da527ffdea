"""The instruction fuzzer: its quick slice, whether it finds what it is for, and that it overlooks no helper."""

from __future__ import annotations

import fnmatch
import re
import textwrap
from pathlib import Path

import pytest

from instruction_fuzz.campaign import campaign
from instruction_fuzz.forms import SPACE, case, may_stay
from test_engine_traps import in_child, symbols

CASES = 7000
DOCUMENT = Path(__file__).parents[1] / "docs/engine_helpers.md"


def test_no_instruction_harms_the_process() -> None:
    report = campaign(CASES, seed=0)
    assert not report.findings, "\n".join(map(str, report.findings))
    assert report.cases == CASES


def test_the_walk_covers_all_forms_evenly() -> None:
    """Every opcode map and mode is met as often as another."""
    cases = [case(number) for number in range(4000)]
    kinds = {kind: sum(one.kind == kind for one in cases) for kind in ("one", "page", "random", "registers")}
    assert kinds["one"] > 3000 and min(kinds.values()) > 80
    modes = [sum(one.mode == mode for one in cases) for mode in {one.mode for one in cases}]
    assert len(modes) == 8 and min(modes) > 400
    assert len({one.code for one in cases}) > 3900 and SPACE > 10**6
    assert case(7) == case(7) and case(7, seed=1) != case(7)


def test_what_may_run_for_ever() -> None:
    for code in ("ebfe", "7ffe", "f3a4", "66f2af", "0f84", "ff20"):
        assert may_stay(bytes.fromhex(code), 32), code
    for code in ("f7fb", "660f3a60c100", "90", "0fa2", "d9fa"):
        assert not may_stay(bytes.fromhex(code), 32), code
    assert may_stay(bytes.fromhex("48ebfe"), 64) and not may_stay(bytes.fromhex("48ebfe"), 32)


@pytest.mark.parametrize("code, want", [("cc", "killed by SIGTRAP"), ("ebfe", "did not end"), ("0f0b", "wrote to")])
def test_the_fuzzer_finds_a_broken_helper(code: str, want: str) -> None:
    """FSQRT's is broken in a child: it kills the process, does not return, or traps."""
    done = in_child(finds(f'poke("helper_fsqrt_x86_64", bytes.fromhex("{code}"))', "d9fa"))
    assert want in done.stdout, (done.stdout, done.stderr)


def test_the_fuzzer_finds_a_write_beside_the_guest_s_memory() -> None:
    """The helper writes where the canary is: mov $address, %rax; movb $1, (%rax); ret."""
    source = """
        class Leaky(bed.Bed):
            def execute(self, case):
                code = b"\\x48\\xb8" + (self.address + 100).to_bytes(8, "little") + b"\\xc6\\x00\\x01\\xc3"
                poke("helper_fsqrt_x86_64", code)
                super().execute(case)
        campaign.Bed = Leaky
        """
    done = in_child(finds(source, "d9fa"))
    assert "memory beside the slot has changed" in done.stdout, (done.stdout, done.stderr)


def finds(first: str, code: str) -> str:
    """Source of a child that runs a campaign of one case, and prints what it finds."""
    return "\n".join(
        [
            "from instruction_fuzz import bed, campaign",
            "from instruction_fuzz.forms import Case",
            "from test_engine_traps import Guest, poke",
            "campaign.STUCK_CPU = 1.0",
            f'campaign.case = lambda number, seed: Case(number, "long0", bytes.fromhex("{code}"), "one")',
            "Guest()",
            textwrap.dedent(first),
            "print(*campaign.campaign(1).findings)",
        ]
    )


def test_every_helper_is_in_the_document() -> None:
    """And every pattern there is of one."""
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]
    helpers = [match[1] for name in symbols() if (match := re.fullmatch(r"helper_(\w+?)(?:_x86_64)?", name))]
    assert len(helpers) > 900
    assert [name for name in helpers if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not fnmatch.filter(helpers, pattern)] == []
