"""Find the shortest part of a sequence in which the kernel and the soft backend still differ.

``python -m anykvm.conformance.sequences.shorten SEED`` runs where both are: in the oracle. It drops steps one after the
other, and keeps a step out if what is left still differs in the same field of the same kind of step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from anykvm.backends import backend as make_backend
from anykvm.backends.base import Backend
from anykvm.conformance.sequences.archive import slim
from anykvm.conformance.sequences.batch import in_oracle, record_sequence
from anykvm.conformance.sequences.disagreement import Disagreement, disagreement
from anykvm.conformance.sequences.generator import Sequence, generate
from anykvm.conformance.sequences.step import Step


def differ(sequence: Sequence, one: Callable[[], Backend], other: Callable[[], Backend]) -> Disagreement | None:
    """Run a sequence on two backends; None if they agree."""
    expected, got = ([slim(record) for record in record_sequence(sequence, make)] for make in (one, other))
    return disagreement(sequence.seed, expected, got)


def shorten(sequence: Sequence, find: Callable[[Sequence], Disagreement | None]) -> tuple[Sequence, Disagreement]:
    """Drop what is not needed for two backends to differ as they do in ``sequence``.

    Raises ValueError if they do not.
    """
    found = find(sequence)
    if found is None:
        raise ValueError(f"seed {sequence.seed}: both do the same")
    sequence = _without_rest(sequence, found)
    wanted = _kind(sequence, found)
    for at in reversed(range(len(sequence.steps) - 1)):
        shorter = sequence._replace(steps=sequence.steps[:at] + sequence.steps[at + 1 :])
        still = find(shorter)
        if still is not None and _kind(shorter, still) == wanted:
            sequence, found = _without_rest(shorter, still), still
    return sequence, found


def _without_rest(sequence: Sequence, found: Disagreement) -> Sequence:
    return sequence._replace(steps=sequence.steps[: found.step + 1])


def _kind(sequence: Sequence, found: Disagreement) -> tuple[Step | None, str]:
    step = sequence.steps[found.step] if found.step < len(sequence.steps) else None
    return step, found.differences[0].field


def main(arguments: list[str] | None = None) -> int:
    """Shorten the sequence of a seed; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m anykvm.conformance.sequences.shorten", description=main.__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--profile", default="linux-7.3", help="which KVM the soft backend is to be")
    options = parser.parse_args(arguments)
    if not in_oracle():
        parser.error("only in `anykvm oracle`: never on this machine's own kernel")
    kernel, soft = (lambda: make_backend("device")), (lambda: make_backend("soft", options.profile))
    try:
        sequence, found = shorten(generate(options.seed), lambda candidate: differ(candidate, kernel, soft))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(found.lines(sequence)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
