"""`python -m tests.torture`: kills by hand, with progress and a summary."""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from tests.torture.lives import MODES, Lives, Outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of all modes together")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all in turn")
    parser.add_argument("--seed", type=int, help="default: another one each time; it is printed")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    parser.add_argument("--every", type=int, default=10, help="kills between lines of progress")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 31)
    names = arguments.mode or list(MODES)
    print(f"seed {seed}: {arguments.kills} kills in modes {', '.join(names)}", flush=True)
    outcomes: list[Outcome] = []
    failed = ""
    for place, name in enumerate(names):
        # As even as it goes, the earlier modes one more.
        kills = arguments.kills // len(names) + (place < arguments.kills % len(names))
        if kills == 0:
            continue
        print(f"{name}: {MODES[name].what}", flush=True)
        lives = Lives(MODES[name], seed)
        outcomes.append(lives.outcome)
        try:
            lives.run(kills, _progress(kills, arguments.every))
        except AssertionError as fault:  # a Fault, or a daemon that does not start
            failed = str(fault)
            break
        _show(lives.outcome, kills)
    summary = {
        "seed": seed,
        "kills": sum(outcome.kills for outcome in outcomes),
        "failed": failed or None,
        "modes": [outcome.to_json() for outcome in outcomes],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    if failed:
        print(f"FAULT: {failed}", file=sys.stderr)
        return 1
    compared = sum(outcome.counts["compared"] for outcome in outcomes)
    print(f"{summary['kills']} kills, {compared:,} keys compared, no fault")
    return 0


def _progress(kills: int, every: int) -> Callable[[Outcome], None]:
    shown = 0

    def show(outcome: Outcome) -> None:
        nonlocal shown
        if outcome.kills - shown >= every:
            shown = outcome.kills
            _show(outcome, kills)

    return show


def _show(outcome: Outcome, kills: int) -> None:
    counts = outcome.counts
    found = counts["found"] / counts["compared"] if counts["compared"] else 0.0
    print(
        f"  {outcome.kills}/{kills} kills ({outcome.kills_before_ready} before ready), "
        f"{outcome.clean_stops} orderly stops, {outcome.reboots} reboots, "
        f"{counts['puts']:,} puts, {counts['deletes']:,} deletes, {counts['flushes']} flushes, "
        f"{counts['resizes']} resizes, {counts['gets']:,} gets; "
        f"{counts['compared']:,} compared, {found:.0%} there; {outcome.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
