"""`python -m bench`: measure, print the table, save bench-results.json at the top of the checkout."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anykvm import probe_device
from anykvm.layers.contract import Contract
from bench import measure, memory


@dataclass
class Result:
    """One row: ours, the bar, and the peers by name."""

    name: str
    value: float
    unit: str
    bar: str
    ok: bool
    peers: dict[str, float] = field(default_factory=dict)


def pio() -> Result:
    value = measure.pio_exit("soft", 100_000)
    peers = {"Unicorn's Python binding": measure.stock_pio_exit(10_000)}
    if probe_device().usable:
        peers["/dev/kvm"] = measure.pio_exit("device", 10_000)
    ok = value <= 1.5 and peers["Unicorn's Python binding"] / value >= 6
    return Result(
        "PIO exit round trip, vcpu.run() in Python", value, "us", "<= 1.5 and 6x faster than the binding", ok, peers
    )


def contract() -> Result:
    plain, value = measure.layer_cost(Contract)
    cost = (value / plain - 1) * 100
    return Result("contract layer on a PIO exit", cost, "%", "< 10", cost < 10, {"us without": plain, "us with": value})


def fault() -> Result:
    value = measure.fault_exit("guard")
    peers = {"the same with mmap() over the page": measure.fault_exit("mmap")}
    return Result("memory-fault exit, Python maps the page, resume", value, "us", "<= 8", value <= 8, peers)


def paging() -> Result:
    value, plain = measure.demand_paging(), measure.plain_c_touch()
    ok = value >= 300_000 and value >= 0.5 * plain
    return Result(
        "demand paging of fresh memory", value, "pages/s", ">= 300000 and >= 0.5x plain C", ok, {"plain C loop": plain}
    )


def code() -> Result:
    value, stock = measure.guest_code(), measure.stock_guest_code()
    return Result(
        "guest code speed", value, "M insn/s", ">= 0.9x raw Unicorn", value >= 0.9 * stock, {"raw Unicorn": stock}
    )


def start() -> Result:
    value = measure.first_exit()
    return Result("import anykvm, create a VM, first exit", value, "s", "<= 0.25", value <= 0.25)


def dirty_log() -> Result:
    value, clean, many = memory.harvest(100), memory.harvest(0), memory.harvest(10_000)
    cleared = {pages: memory.harvest(pages, manual=True) for pages in (0, 100, 10_000)}
    peers = {"none dirty": clean, "10000 dirty": many}
    peers |= {f"GET and CLEAR, {pages} dirty": took for pages, took in cleared.items()}
    ok = value <= 200
    return Result("dirty-log harvest of 1 GiB, 100 pages dirty", value, "us", "<= 200", ok, peers)


def slots() -> Result:
    one, hundred, value = memory.slots((1, 100, 10_000))
    ok = value <= 1.5 * one
    peers = {"beside 1": one, "beside 100": hundred}
    return Result("memslot create and delete, beside 10000", value, "us", "<= 1.5x beside 1", ok, peers)


BENCHMARKS: list[Callable[[], Result]] = [pio, contract, fault, paging, code, start, dirty_log, slots]


def main() -> None:
    """Run all of them."""
    console = Console()
    results = []
    for benchmark in BENCHMARKS:
        with console.status(f"measuring: {benchmark.__name__}"):
            results.append(benchmark())
    table = Table(
        title=f"anykvm, soft backend; {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    )
    for heading in ("what", "anykvm", "bar", "ok", "peers, same run"):
        table.add_column(heading, justify="right" if heading == "anykvm" else "left")
    for r in results:
        peers = ", ".join(f"{name}: {value:,.4g}" for name, value in r.peers.items())
        table.add_row(r.name, f"{r.value:,.4g} {r.unit}", r.bar, "yes" if r.ok else "NO", peers)
    console.print(table)
    path = Path(__file__).resolve().parent.parent / "bench-results.json"
    path.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    console.print(f"saved {path.name}")


if __name__ == "__main__":
    main()
