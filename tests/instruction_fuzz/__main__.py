"""``python -m instruction_fuzz``: as many cases as one likes, or one again."""

from __future__ import annotations

import argparse
import sys

from instruction_fuzz.campaign import campaign
from instruction_fuzz.forms import case


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m instruction_fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, in total (600)")
    parser.add_argument("--seed", type=int, default=1, help="which walk through the cases (1)")
    parser.add_argument("--start", type=int, default=0, help="the first case (0)")
    parser.add_argument("--case", type=int, help="this one alone, and what it is")
    return parser.parse_args()


def main() -> int:
    """Run it; 1 if something was found."""
    given = arguments()
    if given.case is not None:
        one = case(given.case, given.seed)
        print(f"{one.mode}, {one.kind}: {one.code[:64].hex(' ')}{' ...' if len(one.code) > 64 else ''}")
    start, count = (given.start, sys.maxsize >> 8) if given.case is None else (given.case, 1)
    report = campaign(count, given.seed, start, given.seconds, lambda line: print(line, flush=True))
    print(f"{report.cases} cases, {len(report.findings)} findings (seed {given.seed})")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
