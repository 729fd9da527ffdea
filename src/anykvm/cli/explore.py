"""``anykvm explore``: what a change of the memory-fault ABI would break, as traces."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from anykvm.cli.common import ExitCode, Fail, JsonOption
from anykvm.cli.output import line, print_json
from anykvm.explorer import (
    ARCHITECTURES,
    DEPTH,
    ENTRIES,
    POLICIES,
    RULES,
    Game,
    Property,
    Trace,
    architecture,
    named,
    table,
    words,
)
from anykvm.explorer import search as search_game
from anykvm.explorer.diagram import diagram
from anykvm.explorer.search import Found

if TYPE_CHECKING:
    from anykvm.explorer.replay import Campaign, Replay

HELP = """Search KVM_RUN's error ABI for traces in which a VMM misreads, loses or repeats something.

For each policy (what KVM writes and promises) and each VMM, the table names the traces and their numbers of moves, the
shortest first. A dash: there is none among the states named. --trace shows one. Exit code: 0; 1 if a replay on a guest
differs from the model; 3 if the soft backend cannot replay here; 11 if --trace names a trace that is not there."""
_MAX_DEPTH = 64
_T = TypeVar("_T")


def explore(
    trace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show one trace: T1 to T15, or another name.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Only this policy: {', '.join(POLICIES)}.")
    ] = None,
    rule: Annotated[str | None, typer.Option(metavar="NAME", help=f"Only this VMM: {', '.join(RULES)}.")] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only x86, arm64, riscv, loongarch, ppc, mips or s390.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, max=_MAX_DEPTH, help="Moves that a trace may have.")] = DEPTH,
    replay: Annotated[bool, typer.Option("--replay", help="Also perform the traces on guests of soft.")] = False,
    json: JsonOption = False,
) -> None:
    """Search, and print the table or a trace."""
    policies, rules = _chosen("--policy", policy, POLICIES), _chosen("--rule", rule, RULES)
    try:
        kind = None if arch is None else architecture(arch)
    except ValueError as error:
        raise Fail(ExitCode.USAGE, f"--arch: {error}") from None
    if trace is not None:
        entry = _one("--trace", trace, ENTRIES)
        game = Game(POLICIES[policy or entry.policy], RULES[rule or entry.rule], kind or ARCHITECTURES[entry.arch])
        _show_trace(trace, game, depth, replay=replay, json=json)
        return
    archs = list(ARCHITECTURES.values()) if kind is None else [kind]
    found = [one for of in archs for one in table.searches(of, policies, rules, depth)]
    campaign = _replayed(found) if replay else None
    if json:
        print_json(_plain(found, campaign))
    else:
        _show_table(found)
        if campaign is not None:
            _show_campaign(campaign)
    if campaign is not None and campaign.disagreeing:
        raise typer.Exit(ExitCode.FAILED)


def _one(option: str, name: str, known: Mapping[str, _T]) -> _T:
    if name not in known:
        raise Fail(ExitCode.USAGE, f"{option}: no {name!r}; there are {', '.join(known)}")
    return known[name]


def _chosen(option: str, name: str | None, known: Mapping[str, _T]) -> list[_T]:
    return list(known.values()) if name is None else [_one(option, name, known)]


def _show_trace(name: str, game: Game, depth: int, *, replay: bool, json: bool) -> None:
    found = search_game(game, depth)
    trace = named(found).get(name)
    if trace is None:
        where = f"policy {game.policy.name}, VMM {game.rule.name}, {game.arch.name}"
        raise Fail(ExitCode.NOTHING, f"{name}: none with {where} ({table.extent(found)})")
    performed, why = _performed(trace) if replay else (None, None)
    if json:
        print_json(words.plain(trace) | ({"replay": _plain_replay(performed, why)} if replay else {}))
    else:
        line("\n".join(diagram(trace)))
        if replay:
            line()
            line("\n".join(_replay_lines(performed, why)))
    if performed is not None and not performed.agrees:
        raise typer.Exit(ExitCode.FAILED)


def _performed(trace: Trace) -> tuple[Replay | None, str | None]:
    from anykvm.explorer.replay import replay, why_not  # only here: it needs the engine

    why = why_not(trace)
    return (None, why) if why is not None else (_guarded(lambda: replay(trace)), None)


def _replayed(found: list[Found]) -> Campaign:
    from anykvm.explorer.replay import replay_all

    return _guarded(lambda: replay_all(found))


def _guarded(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except (ImportError, OSError) as error:
        raise Fail(ExitCode.BACKEND, f"soft backend: {error}; try `anykvm doctor`") from None


def _replay_lines(performed: Replay | None, why: str | None) -> list[str]:
    if performed is None:
        return [f"not replayed: {why}"]
    lines = [f"replayed on a guest of profile {performed.profile}:"]
    for number, step in enumerate(performed.steps, 1):
        lines.append(f"{number:2}  {step.what}: {step.real}" + ("" if step.agrees else f"; the model: {step.model}"))
    return [*lines, "as in the model" if performed.agrees else "not as in the model"]


def _plain_replay(performed: Replay | None, why: str | None) -> dict[str, Any]:
    if performed is None:
        return {"replayed": False, "why_not": why}
    steps = [step._asdict() | {"agrees": step.agrees} for step in performed.steps]
    return {"replayed": True, "profile": performed.profile, "agrees": performed.agrees, "steps": steps}


def _plain(found: list[Found], campaign: Campaign | None) -> dict[str, Any]:
    plain: dict[str, Any] = {"games": [table.plain(one) for one in found]}
    if campaign is not None:
        plain["replays"] = {
            name: [_plain_replay(one, None) for _, one in replays] for name, replays in campaign.replays.items()
        }
        plain["not_replayed"] = campaign.refused
    return plain


def _show_table(found: list[Found]) -> None:
    """Print tables if stdout is a terminal and they fit; else a line for each game."""
    archs = dict.fromkeys(one.game.arch for one in found)
    first = [one for one in found if one.game.arch is next(iter(archs))]
    parts = {f"{first[0].game.arch.name}, by VMM": [table.grid(first, wanted) for wanted in Property]}
    if len(archs) > 1:
        parts["by architecture, whatever the VMM"] = [table.architectures(found, wanted) for wanted in Property]
    if not sys.stdout.isatty() or not _draw(parts):
        line("\n".join(table.line(one) for one in found))
    if not sys.stdout.isatty():
        return
    names = dict.fromkeys(name for one in found for name in named(one))
    for name, entry in ENTRIES.items():
        if name in names:
            line(f"{name:6} {entry.title}")
    states = sum(one.states for one in found)
    whole = "all there are" if all(one.complete for one in found) else f"those within {found[0].depth} moves"
    line(f"\n{len(found)} searches, {states} states: {whole}")


def _draw(parts: Mapping[str, list[list[list[str]]]]) -> bool:
    """Draw tables on the terminal. False, and nothing is drawn, if one could not be without breaking a name."""
    from rich.console import Console  # only here: it takes long to import
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(highlight=False)
    unlimited = console.options.update(width=sys.maxsize)
    grids: list[tuple[str, list[Table]]] = []
    for title, all_rows in parts.items():
        tables = []
        for rows in all_rows:
            shown = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
            for row in rows[1:]:
                shown.add_row(*row)
            if Measurement.get(console, unlimited, shown).minimum > console.width:
                return False
            tables.append(shown)
        grids.append((title, tables))
    for title, tables in grids:
        console.print(f"{title}\n", style="bold", markup=False)
        for shown in tables:
            console.print(shown)
            console.print()
    return True


def _show_campaign(campaign: Campaign) -> None:
    for name in ENTRIES:
        if replays := campaign.replays.get(name):
            profiles = ", ".join(dict.fromkeys(one.profile for _, one in replays))
            agreeing = sum(one.agrees for _, one in replays)
            line(f"{name}: {agreeing} of {len(replays)} replays as in the model ({profiles})")
        elif name in campaign.refused:
            line(f"{name}: not replayed: {campaign.refused[name]}")
    for trace, one in campaign.disagreeing:
        line("\n".join([*diagram(trace), "", *_replay_lines(one, None)]))
