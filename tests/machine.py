"""The bench for guests (``anykvm.testing``) under its old name: programs beside this checkout import it from here."""

from __future__ import annotations

from anykvm.testing.assembler import assemble as assemble
from anykvm.testing.machine import CODE as CODE
from anykvm.testing.machine import DATA as DATA
from anykvm.testing.machine import PML4 as PML4
from anykvm.testing.machine import STACK as STACK
from anykvm.testing.machine import WITH_ERROR as WITH_ERROR
from anykvm.testing.machine import Machine as Machine
from anykvm.testing.machine import Trap as Trap
from anykvm.testing.machine import segment as segment
