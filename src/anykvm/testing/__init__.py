"""A bench for guests: what tests, conformance and examples need to try one instruction in one mode."""

from anykvm.testing.assembler import assemble
from anykvm.testing.machine import Machine, Trap

__all__ = ["Machine", "Trap", "assemble"]
