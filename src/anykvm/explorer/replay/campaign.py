"""Replay whatever a set of searches found, each different trace once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from anykvm.explorer.catalogue import named
from anykvm.explorer.replay.perform import Replay, replay
from anykvm.explorer.replay.possible import why_not
from anykvm.explorer.search import Found, Trace


@dataclass
class Campaign:
    """What came of it."""

    replays: dict[str, list[tuple[Trace, Replay]]] = field(default_factory=dict)
    """By the trace's name."""
    refused: dict[str, str] = field(default_factory=dict)
    """Names of which no trace could be replayed, and why not."""

    @property
    def disagreeing(self) -> list[tuple[Trace, Replay]]:
        """Those in which the guest did otherwise than the model."""
        return [one for replays in self.replays.values() for one in replays if not one[1].agrees]


def replay_all(found: Iterable[Found]) -> Campaign:
    """Replay the shortest trace of each name of each game. Raises as ``replay``."""
    campaign, done = Campaign(), set()
    for one in found:
        for name, trace in named(one).items():
            if (why := why_not(trace)) is not None:
                campaign.refused.setdefault(name, why)
                continue
            key = (trace.game.policy.profile, tuple(step.move for step in trace.steps))
            if key not in done:
                done.add(key)
                campaign.replays.setdefault(name, []).append((trace, replay(trace)))
    for name in campaign.replays:
        campaign.refused.pop(name, None)
    return campaign
