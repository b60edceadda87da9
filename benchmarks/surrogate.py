"""How fast the surrogate simulates, what it needs, and how fast environments over it are.

Throughput is on one core, with generated traffic whose lengths are scaled to the profiled model's
context (and, in the figures that end in `_long`, at the generator's own lengths), at LOAD of what
single-device replicas sustain, advanced in steps of one decision interval as training does. Ticks
use two cores: an interval of one surrogate is a tick; an environment's tick has the decision
pipeline (planner, observation) besides. Figures are medians over rounds; a spread is (max - min) /
median.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig
from controller.workload import fit_typing
from engine.cluster import ParallelConfig, WorkloadTyping, dense_deployment
from engine.profile import Crowding, ProfiledCluster, StepTimeModel
from envs.build import DEFAULT_PROFILE, surrogate_parts
from envs.serving_env import ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic import mean_mix
from envs.vec_env import ServingVecEnv
from envs.workload import Trace, WorkloadConfig, generate

REPLICAS = (1, 4, 16, 64)
FORKS = ((4, 100), (4, 1000), (16, 100), (16, 1000))  # replicas, live requests
LOAD, INTERVAL_S = 0.8, 15.0
SINGLE = ParallelConfig(1, 1)
STEP_S = 0.01  # of the run that counts iterations
TICK_DEVICES, TICK_RATE_PER_S, BUSY_RATE_PER_S, CORES = 16, 10.0, 200.0, 2
GOALS = {
    "requests_per_s_4": 500_000,
    "requests_per_s_64": 300_000,
    "bytes_per_request": 200,
    "ticks_per_s": 6_000,
}


@dataclass(frozen=True, slots=True)
class Setup:
    """The profile, a sample of traffic whose lengths fit it, and what one replica sustains."""

    cluster: ProfiledCluster
    sample: Trace
    typing: WorkloadTyping
    rate_per_s: float

    def pool(self, devices: int) -> ProfiledCluster:
        """The profiled cluster with another number of devices, which share nothing."""
        spec = replace(self.cluster.spec, num_devices=devices, devices_per_node=devices)
        profile = replace(self.cluster.profile, crowding=Crowding())
        return ProfiledCluster(spec, profile)

    def surrogate(self, replicas: int) -> SurrogateCluster:
        initial = dense_deployment([SINGLE] * replicas)
        return SurrogateCluster(self.pool(replicas), initial, columns=True, max_queue=10**7)

    def traffic(self, number: int, rate_per_s: float, seed: int = 1) -> Trace:
        """`number` requests, Poisson, with lengths drawn from the sample."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(len(self.sample), size=number)
        arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, number))
        lengths = self.sample.prompt_tokens[chosen], self.sample.output_tokens[chosen]
        return Trace(arrival_s, *lengths)


def build_setup(cluster: ProfiledCluster) -> Setup:
    context, config = cluster.spec.model.max_model_len, WorkloadConfig()
    sample = generate(config, 6 * 3600.0, np.random.default_rng(0))
    sample = sample.scale_lengths(min(1.0, context / config.max_tokens), context)
    typing = fit_typing(sample.prompt_tokens, sample.output_tokens, 4, seed=0)
    planner = build_pipeline(cluster, typing, DecisionConfig()).planner
    shares, lengths = mean_mix(sample, typing)
    rate_per_s = planner.estimate([SINGLE], shares, lengths).headroom
    return Setup(cluster, sample, typing, rate_per_s)


def build_long_setup(cluster: ProfiledCluster) -> Setup:
    """At the generator's own lengths: the same step times with a context and a KV cache that are
    large enough for them."""
    spec, longest = cluster.spec, WorkloadConfig().max_tokens
    if spec.model.max_model_len < longest:
        model = replace(spec.model, max_model_len=longest)
        grown = spec.device_memory_bytes * longest // spec.model.max_model_len
        spec = replace(spec, model=model, device_memory_bytes=grown)
    return build_setup(replace(cluster, spec=spec))


# --------------------------------------------------------------------------------------
# One core


def drive(surrogate: SurrogateCluster, trace: Trace, keep: bool = False) -> float:
    """Seconds to simulate the trace, submitted and advanced interval by interval; to the end."""
    kept, first, until_s = [], 0, 0.0
    begun_s = time.perf_counter()
    while first < len(trace):
        until_s += INTERVAL_S
        last = int(np.searchsorted(trace.arrival_s, until_s, side="right"))
        due = slice(first, last)
        surrogate.submit_columns(
            trace.arrival_s[due], trace.prompt_tokens[due], trace.output_tokens[due]
        )
        surrogate.advance(until_s)
        ended = surrogate.take_columns()
        if keep:
            kept.append(ended)
        first = last
    return time.perf_counter() - begun_s


def measure_throughput(setup: Setup, replicas: int, number: int) -> tuple[float, float]:
    """Requests and generated tokens per second of wall time."""
    trace = setup.traffic(number, LOAD * setup.rate_per_s * replicas)
    surrogate = setup.surrogate(replicas)
    wall_s = drive(surrogate, trace)
    tokens = sum(r.generated_tokens_total for r in surrogate.snapshot().replicas)
    return len(trace) / wall_s, tokens / wall_s


def measure_iterations(setup: Setup, replicas: int, iterations: int) -> float:
    """Steps of replicas per second of wall time, with full batches. Every step lasts STEP_S and no
    replica ever idles, so that a span of time is a number of steps."""
    steps = tuple(
        StepTimeModel(s.parallel, STEP_S, 0.0, 0.0, 0.0, stage_share=s.stage_share)
        for s in setup.cluster.profile.steps
    )
    pool = setup.pool(replicas)
    constant = replace(pool, profile=replace(pool.profile, steps=steps))
    initial = dense_deployment([SINGLE] * replicas)
    surrogate = SurrogateCluster(constant, initial, columns=True, max_queue=10**7)
    duration_s = iterations / replicas * STEP_S
    mean_tokens = float(setup.sample.output_tokens.mean())
    most = 2 * int(setup.cluster.spec.max_num_seqs * iterations / mean_tokens) + 1000 * replicas
    trace = setup.traffic(most, most / 1e-3)  # all of it is there at once
    surrogate.submit_columns(trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    surrogate.advance(1.0)
    begun_s = time.perf_counter()
    surrogate.advance(1.0 + duration_s)
    wall_s = time.perf_counter() - begun_s
    assert all(r.num_waiting for r in surrogate.snapshot().replicas), "a replica went idle"
    return iterations / wall_s


def measure_memory(setup: Setup, number: int) -> float:
    """Peak bytes per request: its trace, its simulation, and its outcome kept to the end."""
    tracemalloc.start()
    trace = setup.traffic(number, LOAD * setup.rate_per_s * 4)
    drive(setup.surrogate(4), trace, keep=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / number


def measure_fork(setup: Setup, replicas: int, live: int, repeats: int = 200) -> float:
    """Median microseconds of a fork with so many requests live."""
    surrogate, ones = setup.surrogate(replicas), np.ones(live, np.int64)
    longest = setup.cluster.spec.model.max_model_len
    surrogate.submit_columns(np.zeros(live), 20 * ones, longest * ones)
    surrogate.advance(0.01)
    assert surrogate.snapshot().num_finished == 0
    walls_s = []
    for _ in range(repeats):
        begun_s = time.perf_counter()
        surrogate.fork()
        walls_s.append(time.perf_counter() - begun_s)
    return 1e6 * float(np.median(walls_s))


# --------------------------------------------------------------------------------------
# Two cores


def measure_ticks(setup: Setup, ticks: int, surrogates: int = 4) -> float:
    """Intervals per second over several surrogates on CORES threads."""
    number = int(ticks * INTERVAL_S * TICK_RATE_PER_S)
    runs = [
        (setup.surrogate(TICK_DEVICES), setup.traffic(number, TICK_RATE_PER_S, seed))
        for seed in range(surrogates)
    ]
    with ThreadPoolExecutor(CORES) as threads:
        begun_s = time.perf_counter()
        list(threads.map(lambda run: drive(*run), runs))
        wall_s = time.perf_counter() - begun_s
    simulated_s = sum(float(trace.arrival_s[-1]) for _, trace in runs)
    return simulated_s / INTERVAL_S / wall_s


def measure_env_ticks(
    setup: Setup, ticks: int, rate_per_s: float, num_threads: int, num_envs: int = 8
) -> float:
    """Decisions per second of a `ServingVecEnv` that keeps its deployment, with a planner that
    has nothing cached yet."""
    cluster = setup.pool(TICK_DEVICES)
    pipelines = [build_pipeline(cluster, setup.typing, DecisionConfig()) for _ in range(num_envs)]
    number = int((ticks + 2) * INTERVAL_S * rate_per_s)
    key = f"{TICK_DEVICES}xtp1pp1"

    def make_trace(rng: np.random.Generator) -> Trace:
        return setup.traffic(number, rate_per_s, int(rng.integers(2**31)))

    envs = []
    for pipeline in pipelines:
        pipeline.planner = pipelines[0].planner
        envs.append(ServingEnv(surrogate_parts(pipeline, make_trace, key, columns=True)))
    venv = ServingVecEnv(envs, num_threads)
    venv.seed(0)
    venv.reset()
    keep = np.zeros(num_envs, np.int64)
    venv.step(keep)
    begun_s = time.perf_counter()
    for _ in range(ticks):
        venv.step(keep)
    wall_s = time.perf_counter() - begun_s
    venv.close()
    return ticks * num_envs / wall_s


# --------------------------------------------------------------------------------------


def median_of(rounds: int, measure: Callable[[], float]) -> tuple[float, float]:
    """Median and spread."""
    values = np.array([measure() for _ in range(rounds)])
    return float(np.median(values)), float(np.ptp(values) / np.median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests, three rounds")
    parser.add_argument("--profile", type=Path, default=DEFAULT_PROFILE, help="cluster JSON")
    args = parser.parse_args()
    number, rounds, million = (100_000, 3, 200_000) if args.quick else (500_000, 5, 1_000_000)
    env_ticks = 10 if args.quick else 100
    setup = build_setup(load_profiled_cluster(args.profile))
    long = build_long_setup(setup.cluster)
    measure_throughput(setup, 2, 1000)  # compiles
    figures: dict[str, float] = {}
    spreads: dict[str, float] = {}

    def record(name: str, measure: Callable[[], float], digits: int = 0) -> None:
        value, spreads[name] = median_of(rounds, measure)
        figures[name] = round(value, digits) if digits else round(value)

    for replicas in REPLICAS:
        pairs = [measure_throughput(setup, replicas, number) for _ in range(rounds)]
        requests, tokens = np.array(pairs).T
        for name, values in (("requests", requests), ("decode_tokens", tokens)):
            key = f"{name}_per_s_{replicas}"
            figures[key] = round(float(np.median(values)))
            spreads[key] = float(np.ptp(values) / np.median(values))
        count = partial(measure_iterations, setup, replicas, number)
        record(f"iterations_per_s_{replicas}", count)
    for replicas in (4, 64):
        record(
            f"requests_per_s_{replicas}_long",
            lambda n=replicas: measure_throughput(long, n, number // 10)[0],  # type: ignore[misc]
        )

    def growth() -> float:
        """Time per request of ten times as many, over that of the few."""
        few, many = (measure_throughput(setup, 4, n)[0] for n in (million // 10, million))
        return few / many

    record("time_per_request_growth_10x", growth, 3)
    for replicas, live in FORKS:
        name = f"fork_us_{replicas}_{live}"
        record(name, partial(measure_fork, setup, replicas, live), 1)
    figures["bytes_per_request"] = round(measure_memory(setup, million), 1)
    record("ticks_per_s", lambda: measure_ticks(setup, number // 500))
    for name, rate_per_s in (("", TICK_RATE_PER_S), ("busy_", BUSY_RATE_PER_S)):
        for threads in (1, CORES):
            measure = partial(measure_env_ticks, setup, env_ticks, rate_per_s, threads)
            record(f"env_ticks_per_s_{name}{threads}_threads", measure)
    spread = round(max(spreads.values()), 3)
    sample = setup.sample
    table = Table("figure", "value", "goal", "spread")
    for name, value in figures.items():
        seen = f"{spreads[name]:.2f}" if name in spreads else ""
        table.add_row(name, f"{value:,}", f"{GOALS[name]:,}" if name in GOALS else "", seen)
    console = Console(width=110)
    console.print(
        f"{setup.cluster.profile.model}: prompts {sample.prompt_tokens.mean():.0f} and outputs "
        f"{sample.output_tokens.mean():.0f} tokens in the mean, {setup.rate_per_s:.1f} requests/s "
        f"per replica; {number} requests a round, {million} for growth and memory; long: prompts "
        f"{long.sample.prompt_tokens.mean():.0f}, outputs {long.sample.output_tokens.mean():.0f}"
    )
    console.print(table)
    print(json.dumps({"benchmark": "surrogate"} | figures | {"spread_max": spread}))


if __name__ == "__main__":
    main()
