"""What the control service costs: decisions asked for, ticks, watchers, a restart.

The pool is 16 H100s that serve Llama-2-70B. Service and clients are processes of their own, and
talk over gRPC on loopback; engines only tell of themselves. The policy is the shipped one of
`policies/artifacts/h100-16`, which decides by hysteresis; `learned`: its first member.

- decide_ms_p50: one client asks one decision after the other, each for a grid interval later, the
  interval's events reported just before; `_events`: with those 300 events in the request;
  rpc_ms_p50: a call that has nothing to do, which is what gRPC at both ends takes of each.
- decide_ms_p99_64: 64 clients at once, each with pauses of half a second on average, which is 30
  times as often as the grid; `_closed`: without pauses, which tells of throughput (decide_per_s).
- tick_ms_*: all pure steps of a tick at 10 requests/s per 16 devices: events, forecast, candidates,
  masks, rule, and every fifth tick the plan of a switch; `_cpu`: processor time of the same.
- fanout_ms_200_p99: from a tick's publication until each of 200 watchers has it.
- restart_s: from the start of `python -m controller` after a SIGKILL, with the log of an hour, to
  its first decision, by a rule; restart_learned_s: by the trained policy.

On a machine with other work wall-clock figures say more of that work: the load average is told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

import numpy as np
from controlling import restart, ticks
from controlling.load import decide, fan_out, round_trips, served
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "policies" / "artifacts" / "h100-16"
LEARNED = SHIPPED / "seed0"
KEY_16, KEY_1024 = "2xtp8pp1", "128xtp8pp1"
CLIENTS, WATCHERS, PAUSE_S = 64, 200, 0.5
GOALS = {
    "decide_ms_p50": 1.0,
    "decide_ms_p99_64": 25.0,
    "tick_ms_16_p99": 50.0,
    "tick_ms_1024_p99": 500.0,
    "restart_s": 3.0,
}


def measure_service(figures: dict[str, float], quick: bool) -> None:
    single, paced, closed, num_ticks = (200, 6, 4, 5) if quick else (1000, 20, 20, 30)
    with served(16, KEY_16, LEARNED) as service:
        one = asyncio.run(decide(service, 1, single, 0.0, False, KEY_16))
        figures["decide_ms_p50_learned"] = float(np.median(one))
    with served(16, KEY_16, SHIPPED) as service:
        one = asyncio.run(decide(service, 1, single, 0.0, False, KEY_16))
        figures["decide_ms_p50"], figures["decide_ms_p99"] = np.percentile(one, [50, 99])
        figures["rpc_ms_p50"] = float(np.median(asyncio.run(round_trips(service, single))))
        told = asyncio.run(decide(service, 1, single // 10, 0.0, True, KEY_16))
        figures["decide_ms_p50_events"] = float(np.median(told))
        many = asyncio.run(decide(service, CLIENTS, paced, PAUSE_S, False, KEY_16))
        figures["decide_ms_p50_64"], figures["decide_ms_p99_64"] = np.percentile(many, [50, 99])
        full = asyncio.run(decide(service, CLIENTS, closed, 0.0, False, KEY_16))
        figures["decide_ms_p99_64_closed"] = float(np.percentile(full, 99))
        figures["decide_per_s"] = CLIENTS / float(np.mean(full)) * 1000.0
        seen = asyncio.run(fan_out(service, WATCHERS, num_ticks))
        figures["fanout_ms_200_p50"] = float(np.median(seen))
        figures["fanout_ms_200_p99"] = float(np.percentile(seen, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls, ticks and restarts")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    for devices, key, full in ((16, KEY_16, 500), (1024, KEY_1024, 60)):
        num = full // 10 if quick else full
        wall, cpu, switches = ticks.measure(devices, key, num)
        for name, took in (("", wall), ("_cpu", cpu)):
            figures[f"tick_ms_{devices}_p50{name}"] = float(np.median(took))
            figures[f"tick_ms_{devices}_p99{name}"] = float(np.percentile(took, 99))
        figures[f"tick_{devices}_switches"] = switches
    measure_service(figures, quick)
    past = 60 if quick else restart.PAST_TICKS
    for name, seconds in restart.measure(KEY_16, LEARNED, 1 if quick else 5, past).items():
        figures[name], figures[f"{name}_max"] = float(np.median(seconds)), max(seconds)
    figures["load_average"] = os.getloadavg()[0]
    table = Table("figure", "value", "goal")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}", f"< {GOALS[name]:g}" if name in GOALS else "")
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "control"} | {k: round(v, 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
