"""Signals around a KVM_RUN: a timer that ends a run that does not end, and counts of what arrived."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Final

_REPEAT: Final = 0.2
"""Seconds between alarms after the first: one may come just before KVM_RUN is entered and be lost."""


class Signals:
    """Counts SIGALRM and SIGUSR1, and gives a KVM_RUN a time limit. Works in the main thread only."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.alarms = 0
        self.users = 0
        self.bus_errors: list[dict[str, int]] = []
        """SIGBUS seen since the last ``clear``: si_code, addr_lsb and address; filled by ``sigbus.catch``."""

    def install(self) -> None:
        """Install the handlers for this process."""
        signal.signal(signal.SIGALRM, self._alarm)
        signal.signal(signal.SIGUSR1, self._user)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        self.alarms += 1

    def _user(self, number: int, frame: FrameType | None) -> None:
        self.users += 1

    def start(self, seconds: float) -> None:
        """Forget what was counted, and send SIGALRM after ``seconds``, again and again until ``stop``."""
        self.clear()
        signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT)

    def stop(self) -> None:
        """Stop the alarm."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def clear(self) -> None:
        """Forget what was counted."""
        self.alarms = self.users = 0
        self.bus_errors.clear()

    def fields(self) -> dict[str, Any]:
        """Give what arrived as fields of a record; nothing for a signal that did not."""
        seen: dict[str, Any] = {}
        if self.bus_errors:
            seen["sigbus"] = {"count": len(self.bus_errors), **self.bus_errors[-1]}
        if self.alarms:
            seen["sigalrm"] = 1  # how many more came before the timer was stopped is a matter of the machine's load
        if self.users:
            seen["sigusr1"] = self.users
        return seen
