"""Which calls a rule meets, counted; and what was injected."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace

from anykvm.layers.inject.rule import Rule


@dataclass(frozen=True)
class Fired:
    """Something that was injected."""

    rule: Rule
    call: str
    """The call: an ioctl's name, ``open``, ``mmap``, or a look-up's function."""
    nth: int
    """Which of the calls that the rule's site and selection match, from 1."""
    vcpu: int = -1
    """The vCPU's id; -1: not a vCPU's call."""
    gpa: int = -1
    """The guest-physical page; -1: the call is not about one."""

    @property
    def replay(self) -> str:
        """The rule that injects this again, and nothing else: one line for ``anykvm exec --inject``."""
        return str(replace(self.rule, nth=self.nth, times=1, probability=1.0, seed=0))

    def __str__(self) -> str:
        """Say what was injected where, and how to replay it."""
        where = f", vCPU {self.vcpu}" if self.vcpu >= 0 else ""
        page = f", gpa {self.gpa:#x}" if self.gpa >= 0 else ""
        call = "" if self.call == self.rule.site else f"{self.call} by "
        return f"{call}{self.rule.what()} (call {self.nth}{where}{page}); replay: {self.replay}"


class Counter:
    """A rule with the number of calls it has met."""

    def __init__(self, rule: Rule) -> None:
        """Has met none."""
        self.rule = rule
        self.met = 0
        """Matching calls so far."""
        self.fired = 0
        self._random = random.Random(rule.seed)
        self._owed = False
        self._lock = threading.Lock()

    def meets(self, vcpu: int, gpa: int, size: int) -> int:
        """Count a call of the rule's site; returns its number if it is to fail, else 0."""
        rule = self.rule
        if rule.vcpu not in (-1, vcpu):
            return 0
        if rule.gpa >= 0 and (gpa < 0 or gpa + max(size, 1) <= rule.gpa or gpa >= rule.gpa_end):
            return 0
        with self._lock:
            self.met += 1
            due = self.met >= rule.nth and (not rule.times or self.fired < rule.times)
            if due and rule.probability < 1 and not self._owed:
                due = self._random.random() < rule.probability
            if not due:
                return 0
            self.fired += 1
            self._owed = False
            return self.met

    def put_off(self) -> None:
        """Take back the last one: the call ended before it could fail. The next one fails."""
        with self._lock:
            self.fired -= 1
            self._owed = True
