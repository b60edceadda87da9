"""How many hours of traffic `evaluate.py replay` gets through in a minute.

The pool is 16 H100s that serve Llama-2-70B, at 0.85 of the best static deployment's capacity; an
hour counts once per policy that it is replayed under. The policies are hysteresis, keep and a
member of the shipped policy, with decisions as in production. Reading the trace and starting the
processes are within the time measured, compiling for the first time is not: two windows of each
policy are replayed before. Each round is a fresh run; the figure is the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from envs.offline.replay_command import follow, summary
from envs.offline.replays import Plan
from envs.setting import SettingOptions

SHIPPED = Path(__file__).parents[1] / "policies" / "artifacts" / "h100-16"
POLICIES = ("hysteresis", "keep", f"{SHIPPED}:seed0")
LOAD, GOAL = 0.85, "> 100"


def measure(trace: Path | None, windows: int, seeds: int, processes: int) -> dict[str, Any]:
    """One run: hours simulated, and seconds from plan to table."""
    options = SettingOptions(num_windows=windows, window_s=3600.0)
    begun_s = time.monotonic()
    plan = Plan(SHIPPED, POLICIES, options, (trace,), (LOAD,), tuple(range(seeds)))
    jobs = plan.jobs()
    results = follow(jobs, None, processes, shows=False)
    told = summary(jobs, results, POLICIES)
    arrived = sum(sum(w["arrived"]) for result in results for w in result["windows"])
    seconds = time.monotonic() - begun_s
    return {"hours": told["simulated_hours"], "seconds": seconds, "requests": int(arrived)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="trace file (default: the embedded generator)")
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--quick", action="store_true", help="one short round")
    args = parser.parse_args()
    measure(args.trace, 2, 1, 1)
    windows, seeds, rounds = (2, 1, 1) if args.quick else (6, 2, 3)
    found = [measure(args.trace, windows, seeds, args.processes) for _ in range(rounds)]
    rates = [60.0 * f["hours"] / f["seconds"] for f in found]
    middle = statistics.median(rates)
    result: dict[str, Any] = {
        "benchmark": "replay",
        "sim_hours_per_min": round(middle, 2),
        "spread": round((max(rates) - min(rates)) / middle, 3),
        "hours": found[0]["hours"],
        "requests": found[0]["requests"],
        "processes": args.processes,
        "trace": args.trace.name if args.trace else "embedded generator",
    }
    table = Table("figure", "value", "goal")
    for key, value in result.items():
        table.add_row(key, str(value), GOAL if key == "sim_hours_per_min" else "")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
