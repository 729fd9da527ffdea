"""Random sequences: a part of those the oracle recorded, on the soft backend; and the machinery around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from anykvm.conformance.golden_file import Record
from anykvm.conformance.oracle import qemu
from anykvm.conformance.sequences import Sequence, Step, generate, step
from anykvm.conformance.sequences.archive import archived, kernel_archive, read_archive, slim
from anykvm.conformance.sequences.batch import Batch, in_oracle, parse_seeds, read_batch, record_batch
from anykvm.conformance.sequences.disagreement import Disagreement, disagreement, disagreements
from anykvm.conformance.sequences.guest_programs import GROUPS, MODES
from anykvm.conformance.sequences.perform import OPS
from anykvm.conformance.sequences.shorten import shorten
from anykvm.testing.assembler import assemble
from conftest import probe
from vmm_helpers import anykvm, assert_one_line

EVERY: Final = 1 if os.environ.get("ANYKVM_RANDOM") == "1" else 2
"""Which sequences are run here; `make random` runs all, on the kernel too."""
BITS: Final = {"protected": 32, "real": 16}
KERNEL: Final = kernel_archive("linux-7.3")


def test_the_archive_says_of_which_kernel_and_when() -> None:
    about = KERNEL.about
    assert about["kernel"].startswith("7.3.") and about["modules"] == ["kvm_amd"] and len(about["date"]) == 10
    assert sorted(KERNEL.sequences) == list(range(4000))


@pytest.mark.timeout(900)
def test_soft_does_what_the_kernel_did() -> None:
    found = probe("soft")
    if not found.usable:
        pytest.skip(f"soft backend: {found.reason}")
    seeds = list(range(0, 4000, EVERY))
    got = {seed: [slim(r) for r in records] for seed, records in record_batch(seeds, "soft", "linux-7.3", jobs=2)}
    assert sorted(got) == seeds
    told = [line for one in disagreements(KERNEL.sequences, got) for line in one.lines()]
    assert not told, "\n".join(told)


def test_the_sequences_have_all_kinds_of_steps() -> None:
    used = {step.op for seed in range(2000) for step in generate(seed).steps}
    assert used == OPS.keys() - {"memory", "show", "put_guest"}  # these are for regression scenarios


@pytest.mark.parametrize("group", GROUPS)
def test_programs_are_what_their_names_say(group: str) -> None:
    for assembly, code in GROUPS[group].items():
        source = f".intel_syntax noprefix\n{assembly.replace('; ', chr(10))}"
        assert assemble(source, bits=BITS.get(MODES.get(group, ""), 64)).hex() == code, assembly


def test_an_archive_reads_back() -> None:
    records = [{"s": "0.a", "e": 0, "x": 1}, {"s": "1.b", "e": 22}, {"s": "2.c", "e": 22, "x": {"y": 2}}]
    batch = Batch({"n": "ABOUT"}, {7: records, 3: []})
    assert read_archive(archived(batch)) == batch


def test_the_first_difference_is_told_with_what_led_to_it() -> None:
    sequence = Sequence(5, "slots", "plain", [step("delete_me", slot=1), step("run", count=1), step("never")])
    expected: list[Record] = [{"s": "0.delete_me", "e": 0}, {"s": "1.run.0", "er": "HLT", "rip": "0x1"}]
    got: list[Record] = [{"s": "0.delete_me", "e": 0}, {"s": "1.run.0", "er": "IO", "rip": "0x2"}, {"s": "2.never"}]
    found = disagreement(5, expected, got)
    assert found is not None
    lines = list(found.lines(sequence))
    assert lines == [
        "seed 5 (slots, plain):",
        '   0 step("delete_me", slot=1)',
        '   1 step("run", count=1)',
        "  -> 1.run.0 er: expected HLT, got IO",
        "  -> 1.run.0 rip: expected 0x1, got 0x2",
    ]


def test_a_sequence_is_shortened_to_what_makes_the_difference() -> None:
    steps = [step("a"), step("cause"), step("b"), step("c"), step("effect"), step("d")]

    def find(sequence: Sequence) -> Disagreement | None:
        ops = [s.op for s in sequence.steps]
        if "cause" not in ops or "effect" not in ops:
            return None
        at = ops.index("effect")
        one: list[Record] = [{"s": f"{at}.effect", "x": 1}]
        return disagreement(sequence.seed, one, [{"s": f"{at}.effect", "x": 2}])

    sequence, found = shorten(Sequence(1, "slots", "plain", steps), find)
    assert [s.op for s in sequence.steps] == ["cause", "effect"] and found.step == 1
    with pytest.raises(ValueError, match="both do the same"):
        shorten(sequence._replace(steps=steps[:1]), find)


@pytest.mark.parametrize("text", ["", "x", "3:", "1:2:3", "-1", "1,,2"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not SEED or FIRST:END"):
        parse_seeds(text)


def batch(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anykvm.conformance.sequences.batch", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_batch_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    output = tmp_path / "soft.jsonl"
    assert batch(output, "--seeds", "0:2", "--jobs", "1").returncode == 0
    text = output.read_text()
    output.write_text(text + '{"seed": 2, "rec')  # ended while it wrote
    assert batch(output, "--seeds", "0:3").returncode == 0
    assert output.read_text().startswith(text.splitlines()[0])
    assert sorted(read_batch(output).sequences) == [0, 1, 2]
    assert all(json.loads(line) for line in output.read_text().splitlines())


def test_a_batch_that_hangs_says_where(tmp_path: Path) -> None:
    done = batch(tmp_path / "soft.jsonl", "--seeds", "5:9", "--jobs", "2", "--patience", "0.0001")
    assert done.returncode == 1 and "it hangs in one of the seeds 5, 6; leave it out" in done.stderr


def test_the_kernel_of_this_machine_is_never_tried(tmp_path: Path) -> None:
    assert not in_oracle()
    with pytest.raises(RuntimeError, match="only in `anykvm oracle`"):
        next(record_batch([0], "device"))
    done = batch(tmp_path / "x", "--backend", "device", "--seeds", "0")
    assert done.returncode and "only in `anykvm oracle`" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--seeds", "x"], 2, "--seeds"),
        (["--seeds", "5:3"], 2, "--seeds: '5:3' has no seed"),
        (["--seeds", "0:2,7:7"], 2, "'7:7' has no seed"),
        (["--kernel", "/nonexistent/vmlinuz", "--archive", "/nonexistent/x"], 2, "--archive /nonexistent/x"),
        (["--seeds", "5000"], 2, "no records of seed 5000"),
        (["--records", "x"], 2, "need --kernel"),
        (["--seeds", "0", "--profile", "nobody"], 2, "nobody"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str) -> None:
    assert_one_line(anykvm("conformance", "random", *arguments), code, words)


def test_a_missing_kernel_is_one_line() -> None:
    """Without QEMU the command begins by getting that, as root by installing it; a test must not."""
    if not qemu.usable():
        pytest.skip("NOT TESTED: a missing kernel: there is no qemu-system-x86_64, 8 or newer")
    assert_one_line(anykvm("conformance", "random", "--kernel", "/nonexistent/vmlinuz"), 3, "No such file")


def test_the_command_compares(tmp_path: Path) -> None:
    done = anykvm("conformance", "random", "--seeds", "0:3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("expected: Linux 7.3.") and done.stdout.endswith(
        "soft, profile linux-7.3: 3 of 3 sequences agree\n"
    )


def test_a_step_is_written_as_what_makes_it() -> None:
    for made in generate(11).steps:
        names: dict[str, Any] = {"step": step}
        assert eval(str(made), names) == Step(made.op, made.args)
