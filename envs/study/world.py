"""One cell of the study made real: pool, traffic at its load, and windows run under a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig, DecisionPipeline
from controller.planner import Planner
from controller.scoring import Objective
from controller.slo import read_slo
from controller.workload import PromptPosterior, assign, centres
from engine.cluster import WorkloadTyping, deployment_key, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.build import surrogate_parts
from envs.experiment import experiment_reward
from envs.lookahead import EnvOutlook
from envs.reward import RewardConfig
from envs.scenarios import DeviceFailure, Disturbances
from envs.serving_env import ServingEnv
from envs.study.config import GENERATED, Cell, StudyConfig
from envs.study.scores import Objectives, WindowRecord
from envs.surrogate.cluster import SurrogateCluster
from envs.traces import load_trace
from envs.traffic import (
    DAY_S,
    fit_trace_typing,
    homogeneous_keys,
    mean_mix,
    measure_capacity,
    spaced_windows,
)
from envs.workload import Trace, WorkloadConfig, generate
from policies.base import Policy, TrafficColumns

PROFILES = Path(__file__).parents[2] / "configs" / "profiles"
GENERATED_S = 4 * DAY_S
GENERATED_TRAFFIC = WorkloadConfig(mean_rate_per_s=2.0, cycle_s=DAY_S, regime_s=3600.0)
PREDICTOR = "ewma4"
OBJECTIVES: tuple[Objective, Objective] = ("goodput", "latency")
Floats = NDArray[np.float64]
MakePolicy = Callable[[DecisionPipeline, ServingEnv], Policy]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a window."""

    seconds: float
    rates: Floats  # [J] requests per second
    lengths: Floats  # [J, 2] mean tokens
    mixing: Floats  # [J, J] of types guessed at arrival; see `PromptPosterior.mixing`


@dataclass(frozen=True, slots=True)
class World:
    """What all rules of a cell share."""

    config: StudyConfig
    cell: Cell
    cluster: ProfiledCluster
    typing: WorkloadTyping
    planner: Planner  # by headroom
    fast_planner: Planner  # by latency
    training: tuple[Trace, ...]  # windows, loaded
    test: tuple[Trace, ...]
    parts: tuple[Part, ...]  # of the test windows
    peak_loads: dict[str, float]  # of static deployments; the lowest is the cell's load
    moving_load: float  # the same where each part has the deployment that is best for it
    factor: float  # of the rates of the trace
    objectives: Objectives
    initial_key: str  # where all but the static ones start


def _read(cell: Cell, traces: Path, seed: int) -> Trace:
    if cell.trace == GENERATED:
        return generate(GENERATED_TRAFFIC, GENERATED_S, np.random.default_rng(seed))
    return load_trace(traces / cell.trace)


def split_s(trace: Trace, share: float) -> float:
    """Where training ends: at the end of a day where there are several, else after that share."""
    days = trace.duration_s / DAY_S
    return float(round(days * share)) * DAY_S if days >= 2 else share * trace.duration_s


def parts_of(windows: Sequence[Trace], part_s: float, typing: WorkloadTyping) -> list[Part]:
    """The windows in parts of about `part_s`, those without a request left out."""
    found = []
    for window in windows:
        posterior = PromptPosterior(typing)
        types = assign(typing, window.prompt_tokens, window.output_tokens)
        posterior.observe(window.prompt_tokens.tolist(), types)
        number = max(1, round(window.duration_s / part_s))
        for i in range(number):
            part = window.window(i * window.duration_s / number, window.duration_s / number)
            if len(part):
                shares, lengths = mean_mix(part, typing)
                found.append(
                    Part(part.duration_s, shares * part.mean_rate_per_s, lengths, posterior.mixing)
                )
    return found


def best_for(planners: Sequence[Planner], part: Part) -> list[str]:
    """Deployments that the planners find best for a part's traffic."""
    return [
        deployment_key(p.optimum(part.rates, lengths=part.lengths, mixing=part.mixing))
        for p in planners
    ]


def peak_loads(planner: Planner, parts: Sequence[Part], keys: Iterable[str]) -> dict[str, float]:
    """By deployment its utilisation in the part that loads it most; above 1 it is overloaded."""

    def utilisation(key: str, part: Part) -> float:
        configs = parse_deployment_key(key)
        found = planner.estimate(configs, part.rates, part.lengths, part.mixing)
        return planner.config.max_utilisation / max(found.headroom, 1e-9)

    return {key: max(utilisation(key, part) for part in parts) for key in keys}


def build_world(config: StudyConfig, cell: Cell, traces: Path) -> World:
    """Raises TidewrightErrors."""
    cluster = load_profiled_cluster(PROFILES / cell.profile)
    cluster = replace(cluster, spec=replace(cluster.spec, num_devices=cell.devices))
    windows = config.windows_of(cell)
    whole = _read(cell, traces, config.seed)
    whole = whole.scale_lengths(cell.length_factor, cluster.spec.model.max_model_len)
    cut_s = split_s(whole, windows.training_share)
    training, test = whole.window(0.0, cut_s), whole.window(cut_s, whole.duration_s - cut_s)
    typing = fit_trace_typing(training, config.num_types, config.seed)
    planner, fast_planner = (
        build_pipeline(cluster, typing, DecisionConfig(objective=objective), PREDICTOR).planner
        for objective in OBJECTIVES
    )
    scored = spaced_windows(test, windows.number, windows.window_s)
    natural = parts_of(scored, windows.peak_s, typing)
    keys = {key for part in natural for key in best_for((planner,), part)}
    loads = peak_loads(planner, natural, sorted(keys | set(homogeneous_keys(planner))))
    factor = cell.load / min(loads.values())
    moving = max(min(peak_loads(planner, (p,), best_for((planner,), p)).values()) for p in natural)

    def loaded(found: Sequence[Trace], stream: int) -> tuple[Trace, ...]:
        rngs = [np.random.default_rng((config.seed, stream, i)) for i in range(len(found))]
        return tuple(
            w.resample(factor * w.mean_rate_per_s, rng) if len(w) else w
            for w, rng in zip(found, rngs, strict=True)
        )

    scored_windows, adversary = loaded(scored, 1), cell.adversary
    if adversary is not None:
        rng = np.random.default_rng((config.seed, 2))
        scored_windows = tuple(adversary.shape(w, typing, rng) for w in scored_windows)
    first = loaded(spaced_windows(training, windows.tuning, windows.window_s), 0)
    number = config.times_tuning * windows.tuning
    tuning = loaded(spaced_windows(training, number, windows.window_s), 0)
    interactive = read_slo().spec(cluster.profile.device, "interactive")
    measured = measure_capacity(planner, test, typing)
    reward = experiment_reward(planner, measured, interactive, device_hour_cost=0.0)
    return World(
        config,
        cell,
        cluster,
        typing,
        planner,
        fast_planner,
        tuning,
        scored_windows,
        tuple(parts_of(scored_windows, windows.peak_s, typing)),
        {key: factor * load for key, load in loads.items()},
        factor * moving,
        factor,
        _objectives(cluster, typing, reward),
        _first_key(planner, parts_of(first, windows.peak_s, typing)),
    )


def _objectives(
    cluster: ProfiledCluster, typing: WorkloadTyping, reward: RewardConfig
) -> Objectives:
    """Of the types those with the longer half of requests are batch in the mixed objective."""
    slo, device = read_slo(), cluster.profile.device
    tokens = centres(typing).sum(axis=1)
    is_batch = tuple(bool(t > np.median(tokens)) for t in tokens)
    return Objectives(reward.slo, slo.spec(device, "batch"), is_batch, reward)


def mean_latency_s(planner: Planner, parts: Sequence[Part], key: str) -> float:
    """Estimated for a deployment that stays."""
    configs = parse_deployment_key(key)
    each = [planner.estimate(configs, p.rates, p.lengths, p.mixing).latency_s for p in parts]
    return float(np.average(each, weights=[p.seconds * p.rates.sum() for p in parts]))


def _first_key(planner: Planner, parts: Sequence[Part]) -> str:
    """Equal replicas that have the least estimated latency on the tuning windows."""
    return min(homogeneous_keys(planner), key=lambda key: mean_latency_s(planner, parts, key))


# --------------------------------------------------------------------------------------
# Running


def run_windows(
    world: World,
    windows: Sequence[Trace],
    make_policy: MakePolicy,
    pipeline: DecisionPipeline,
    initial_key: str | None = None,
    kind: type[SurrogateCluster] = SurrogateCluster,
) -> tuple[WindowRecord, ...]:
    """Each window from its start under a fresh policy."""
    return tuple(
        _run_window(world, window, make_policy, pipeline, initial_key or world.initial_key, kind)
        for window in windows
        if len(window)
    )


def lost_at_s(window: Trace) -> float:
    """When devices are lost, in cells that lose some."""
    return window.duration_s / 3.0


def make_env(
    world: World,
    window: Trace,
    pipeline: DecisionPipeline,
    key: str,
    kind: type[SurrogateCluster] = SurrogateCluster,
) -> ServingEnv:
    parts = surrogate_parts(pipeline, lambda rng: window, key, columns=True, kind=kind)
    lost = world.cell.lost_devices
    failures = tuple(
        DeviceFailure(lost_at_s(window), device, 2.0 * window.duration_s) for device in range(lost)
    )
    adversary = world.cell.adversary
    stale = adversary.disturbances(window.duration_s).stale if adversary else ()
    drawn = Disturbances(failures, stale)
    return ServingEnv(replace(parts, make_disturbances=lambda rng, s: drawn))


def _run_window(
    world: World,
    window: Trace,
    make_policy: MakePolicy,
    pipeline: DecisionPipeline,
    key: str,
    kind: type[SurrogateCluster],
) -> WindowRecord:
    env = make_env(world, window, pipeline, key, kind)
    env.reset(seed=world.config.seed)
    policy, traffic = make_policy(pipeline, env), []
    outlook = getattr(policy, "outlook", None)
    policy.reset()
    device_s = 0.0
    while not env.is_over:
        prepared = env.prepared
        assert prepared is not None
        device_s += env.grid_s * len(prepared.snapshot.deployment.devices)
        action = int(np.argmax(policy.probabilities(prepared.observation)))
        *_, info = env.step(action)
        traffic.append(TrafficColumns(**info["traffic"]))
        if isinstance(outlook, EnvOutlook):
            outlook.observe(traffic[-1])
    tickets = env.tickets
    env.close()
    return WindowRecord(
        window,
        TrafficColumns.join(traffic),
        env.end_s,
        device_s,
        key,
        tuple((t.started_s - env.start_s, t.to_key) for t in tickets),
        sum(t.duration_s for t in tickets if t.phase.is_terminal),
    )


def shares_of_types(world: World, windows: Sequence[Trace]) -> list[float]:
    """[J] of the windows' requests together."""
    types = [assign(world.typing, w.prompt_tokens, w.output_tokens) for w in windows]
    counts = np.bincount(np.concatenate(types), minlength=len(world.typing.types))
    return list((counts / max(counts.sum(), 1)).tolist())
