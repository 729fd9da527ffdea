"""Random sequences: from a seed to steps, their records on any KVM, and where two KVMs begin to differ.

>>> from anykvm.conformance.sequences import generate
>>> sequence = generate(1)
>>> sequence.theme, sequence.steps[0].op
('host', 'slot')
"""

from anykvm.conformance.sequences.generator import Sequence as Sequence
from anykvm.conformance.sequences.generator import generate as generate
from anykvm.conformance.sequences.perform import perform as perform
from anykvm.conformance.sequences.step import Step as Step
from anykvm.conformance.sequences.step import step as step
