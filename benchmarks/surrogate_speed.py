"""How fast the surrogate simulates: one core, generated traffic at 0.8 of what it can serve.

Every round submits the same traffic to a fresh surrogate and advances it in steps of one decision
interval, as training does. Figures are medians over rounds; spread is (max - min) / median.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig
from controller.workload import fit_typing
from engine.cluster import ParallelConfig, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic import measure_capacity
from envs.workload import Trace, WorkloadConfig, generate

PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "tiny_llama_cpu4.json"
LOAD, INTERVAL_S = 0.8, 15.0
FORKS = ((4, 100), (4, 1000), (16, 100), (16, 1000))  # replicas, live requests


def make_traffic(cluster: ProfiledCluster, duration_s: float) -> tuple[Trace, str]:
    """Traffic at LOAD of the best static deployment's capacity, and that deployment's key."""
    context = cluster.spec.model.max_model_len
    config = WorkloadConfig()
    sample = generate(config, duration_s, np.random.default_rng(0))
    sample = sample.scale_lengths(context / config.max_tokens, context)
    typing = fit_typing(sample.prompt_tokens, sample.output_tokens, 4, seed=0)
    planner = build_pipeline(cluster, typing, DecisionConfig()).planner
    capacity = measure_capacity(planner, sample, typing)
    rate_per_s = LOAD * capacity.rate_per_s
    return sample.resample(rate_per_s, np.random.default_rng(1)), capacity.key


def run_round(cluster: ProfiledCluster, trace: Trace, key: str) -> tuple[float, int]:
    """Seconds to simulate the trace, and the tokens that it generated."""
    surrogate = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)), columns=True)
    surrogate.submit_columns(trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    start_s = time.perf_counter()
    for step in range(1, int(np.ceil(trace.duration_s / INTERVAL_S)) + 1):
        surrogate.advance(step * INTERVAL_S)
        surrogate.take_columns()
    wall_s = time.perf_counter() - start_s
    tokens = sum(r.generated_tokens_total for r in surrogate.snapshot().replicas)
    return wall_s, tokens


def fork_us(cluster: ProfiledCluster, num_devices: int, num_live: int) -> float:
    """Median microseconds of a fork with so many replicas of one device and live requests."""
    spec = replace(cluster.spec, num_devices=num_devices, devices_per_node=num_devices)
    deployment = dense_deployment([ParallelConfig(1, 1)] * num_devices)
    surrogate = SurrogateCluster(replace(cluster, spec=spec), deployment, columns=True)
    ones = np.ones(num_live, np.int64)
    surrogate.submit_columns(np.zeros(num_live), 20 * ones, spec.model.max_model_len * ones)
    surrogate.advance(0.01)
    assert surrogate.snapshot().num_arrived == num_live
    walls_s = []
    for _ in range(200):
        start_s = time.perf_counter()
        surrogate.fork()
        walls_s.append(time.perf_counter() - start_s)
    return round(1e6 * float(np.median(walls_s)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one simulated hour, three rounds")
    args = parser.parse_args()
    hours, rounds = (1, 3) if args.quick else (24, 7)
    cluster = load_profiled_cluster(PROFILE)
    trace, key = make_traffic(cluster, hours * 3600.0)
    run_round(cluster, trace.window(0.0, 60.0), key)  # compiles
    results = [run_round(cluster, trace, key) for _ in range(rounds)]
    walls_s = np.array([wall_s for wall_s, _ in results])
    wall_s, tokens = float(np.median(walls_s)), results[0][1]
    figures = {
        "benchmark": "surrogate_speed",
        "requests_per_s": round(len(trace) / wall_s),
        "decode_tokens_per_s": round(tokens / wall_s),
        "times_real_time": round(trace.duration_s / wall_s),
        "tick_ms": round(1000 * wall_s * INTERVAL_S / trace.duration_s, 3),
        "spread": round(float(np.ptp(walls_s)) / wall_s, 3),
    }
    for devices, live in FORKS:
        figures[f"fork_us_{devices}_{live}"] = fork_us(cluster, devices, live)
    table = Table("figure", "value")
    table.add_row("traffic", f"{len(trace)} requests in {hours} h on {key}, load {LOAD}")
    for name, value in list(figures.items())[1:]:
        table.add_row(name, str(value))
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
