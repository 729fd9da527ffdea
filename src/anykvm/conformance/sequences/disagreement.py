"""Where two KVMs begin to differ in a sequence, told with the steps that led there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from anykvm.conformance.compare import Difference, compare_scenario
from anykvm.conformance.golden_file import Record
from anykvm.conformance.sequences.generator import Sequence, generate

_SHOWN: Final = 8


class Disagreement(NamedTuple):
    """A sequence whose records differ."""

    seed: int
    step: int
    """The number of the first step that differs."""
    differences: list[Difference]
    """Of the first record that differs."""

    def lines(self, sequence: Sequence | None = None) -> Iterator[str]:
        """Tell the steps up to the first that differs, and how it does."""
        sequence = sequence or generate(self.seed)
        yield f"seed {self.seed} ({sequence.theme}, {sequence.setup}):"
        for number, step in enumerate(sequence.steps[: self.step + 1]):
            yield f"  {number:2} {step}"
        for difference in self.differences[:_SHOWN]:
            field = f"{difference.step} {difference.field}".rstrip()
            yield f"  -> {field}: expected {difference.expected}, got {difference.got}"
        if len(self.differences) > _SHOWN:
            yield f"  -> and {len(self.differences) - _SHOWN} more"


def disagreement(seed: int, expected: list[Record], got: list[Record]) -> Disagreement | None:
    """Compare the records of a sequence; None if they agree.

    >>> one, other = [{"s": "0.slot", "e": 0}, {"s": "1.run.0", "rip": "0x1"}], [{"s": "0.slot", "e": 0}]
    >>> disagreement(0, one, one), disagreement(0, one, other).step
    (None, 1)
    """
    differences = compare_scenario(f"random_{seed}", expected, got)
    if not differences:
        return None
    order = {record["s"]: at for at, record in enumerate((*expected, *got))}
    first = min(differences, key=lambda difference: order.get(difference.step, 0)).step
    number = first.partition(".")[0]
    step = int(number) if number.isdigit() else 0
    return Disagreement(seed, step, [difference for difference in differences if difference.step == first])


def disagreements(expected: Mapping[int, list[Record]], got: Mapping[int, list[Record]]) -> Iterator[Disagreement]:
    """Compare the sequences that both have, in the order of their seeds."""
    for seed in sorted(expected.keys() & got.keys()):
        if found := disagreement(seed, expected[seed], got[seed]):
            yield found
