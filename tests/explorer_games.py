"""What the explorer's tests share: each game is searched once, and the replays are done once."""

from __future__ import annotations

from functools import cache

from anykvm.explorer import ARCHITECTURES, DEPTH, POLICIES, RULES, Game
from anykvm.explorer.replay import Campaign, replay_all
from anykvm.explorer.search import Found
from anykvm.explorer.table import searches


@cache
def games(arch: str = "x86") -> tuple[Found, ...]:
    """Every game of an architecture, as deep as the command searches."""
    return tuple(searches(ARCHITECTURES[arch], POLICIES.values(), list(RULES.values()), DEPTH))


def found(policy: str, rule: str, arch: str = "x86") -> Found:
    """One of them."""
    return next(one for one in games(arch) if (one.game.policy.name, one.game.rule.name) == (policy, rule))


def game(policy: str, rule: str, arch: str = "x86") -> Game:
    return found(policy, rule, arch).game


def everything() -> list[Found]:
    """Those of every architecture."""
    return [one for arch in ARCHITECTURES for one in games(arch)]


@cache
def campaign() -> Campaign:
    """Whatever the searches found, on guests."""
    return replay_all(everything())
